"""Evaluate checkpoints: python scripts/evaluate.py checkpoint=<file or run directory> [views=10] [split=val].

Several (checkpoint=[a,b,c]) are evaluated one by one and averaged, as the paper's ensembles are.
"""

from alexnet.cli import command
from alexnet.evaluate import Evaluate, evaluate


@command("evaluate", Evaluate)
def main(config: Evaluate) -> None:
    evaluate(config)


if __name__ == "__main__":
    main()
