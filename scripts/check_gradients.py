"""Prove every gradient, ours or your own: python scripts/check_gradients.py [backend=fast] [mutants=true] [full=true].

Prints a table, writes results.json and report.html (the lesson), and exits with 1 if anything failed. The default
takes half a minute on two cores; backend=fast takes longer the first time, for what it compiles.

    exercise=list               what there is to write yourself, in the recommended order
    exercise=relu               writes exercises/relu.py (into=<path>: elsewhere); with hint=1, 2, 3: a hint
    mine=exercises/relu.py      the same proof of what you wrote, and the name of the mistake
"""

from alexnet.cli import command
from alexnet.gradcheck.config import CheckGradients
from alexnet.gradcheck.run import check


@command("check_gradients", CheckGradients)
def main(config: CheckGradients) -> None:
    if not check(config):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
