"""Train one network: python scripts/train.py [experiment=...] [group=choice] [key=value]. Again: resume.

`--help` lists every choice; conf/train.yaml is where they start.
"""

from alexnet.cli import Train, command
from alexnet.training.run import train


@command("train")
def main(config: Train) -> float | None:
    return train(config)


if __name__ == "__main__":
    main()
