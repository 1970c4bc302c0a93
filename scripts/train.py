"""Train one network: python scripts/train.py [experiment=...] [group=choice] [key=value]. Again: resume.

`--help` lists every choice; conf/train.yaml is where they start.
"""

from alexnet.cli import command
from alexnet.training.config import Train
from alexnet.training.run import after_sweep, train


@command("train", Train, after_sweep=after_sweep)
def main(config: Train) -> float | None:
    return train(config)


if __name__ == "__main__":
    main()
