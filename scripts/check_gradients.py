"""Prove every gradient: python scripts/check_gradients.py [backend=fast] [mutants=true] [full=true].

Prints a table, writes results.json and report.html (the lesson), and exits with 1 if anything failed. The default
takes half a minute on two cores; backend=fast takes longer the first time, for what it compiles.
"""

from alexnet.cli import command
from alexnet.gradcheck.config import CheckGradients
from alexnet.gradcheck.run import prove


@command("check_gradients", CheckGradients)
def main(config: CheckGradients) -> None:
    if not prove(config).passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
