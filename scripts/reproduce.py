"""Test claims of the paper: python scripts/reproduce.py [claim=all|<name>|<name>,<name>] [scale=cpu] [seeds=3].

Again: what is finished stays, what was interrupted goes on. print=true lists the commands instead; report=true only
renders the report; plan=true says what so many seeds could find; compare=<results.json> sets two reports side by
side. Several processes may be given the same claims: a run is done by one of them.
conf/claim holds the claims, conf/experiment/claims_<scale>.yaml what all runs share.
"""

import re
import sys

from alexnet.claims.config import Reproduce
from alexnet.claims.runner import reproduce
from alexnet.cli import command


@command("reproduce", Reproduce)
def main(config: Reproduce) -> None:
    reproduce(config)


if __name__ == "__main__":
    # conf/claim is data and no configuration group, but Hydra would take claim=... for the choice of one.
    sys.argv[1:] = [re.sub(r"^claim=\[?([^\]]*)\]?$", r"claims=[\1]", argument) for argument in sys.argv[1:]]
    main()
