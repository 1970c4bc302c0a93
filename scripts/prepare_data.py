"""Make the stores of a data set: python scripts/prepare_data.py data=<name> [path=<archive or folder>].

Again: nothing to do, or goes on where it was killed. verify=true checks the hash of every array.
"""

from alexnet.cli import command
from alexnet.data.prepare import PrepareData, prepare, verify


@command("prepare_data", PrepareData)
def main(config: PrepareData) -> None:
    if config.verify:
        for store in verify(config):
            print(f"{store.path}: {len(store):,} images, every hash as written")
        return
    for split in prepare(config):
        print(split.summary())


if __name__ == "__main__":
    main()
