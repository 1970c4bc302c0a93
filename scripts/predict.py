"""What is on these pictures? python scripts/predict.py checkpoint=<file or run directory> images=<file or folder>.

Prints the most probable classes, writes JSON, CSV and a contact sheet. A picture that cannot be read is named, the
others go on, and the exit code is 1.
"""

from alexnet.cli import command
from alexnet.predict import Predict, predict


@command("predict", Predict)
def main(config: Predict) -> None:
    if not predict(config):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
