"""What can be asked of scripts/reproduce.py."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from alexnet.errors import UserError

MOST_SEEDS = 1000  # every run of them is listed before the first starts


class Scale(StrEnum):
    smoke = "smoke"  # synthetic pictures, minutes on two cores: does everything run?
    cpu = "cpu"  # some classes of Tiny ImageNet and a narrow net
    gpu = "gpu"  # all 200 classes and `tiny`


@dataclass
class Reproduce:
    """scripts/reproduce.py."""

    # Names of conf/claim, or all; claim=a,b on the command line.
    claims: list[str] = field(default_factory=lambda: ["all"])
    scale: Scale = Scale.smoke
    # Runs per arm; a claim that needs more (an ensemble of five) takes more.
    seeds: int = 3
    # Refuse to start when the estimate is longer; null: no limit.
    budget_minutes: float | None = None
    # Print the commands of the runs that are missing, for a scheduler, and start none.
    print: bool = False
    # Render the report from what is finished, and start nothing.
    report: bool = False
    # Print what so many seeds could find and how long they take, and start nothing.
    plan: bool = False
    # Print this report beside another results.json, and start nothing.
    compare: str | None = None
    # Copy the records of finished runs there, all but weights and pictures; copied back, they are finished runs.
    keep: str | None = None
    # Overrides of every run, before those of its arm.
    overrides: list[str] = field(default_factory=list)
    output_dir: str = "outputs"
    data_dir: str = "data"

    @property
    def report_directory(self) -> Path:
        """<output_dir>/reproduce/<scale>, and below it one for every choice of claims that is not all."""
        directory = Path(self.output_dir) / "reproduce" / self.scale
        return directory if self.claims == ["all"] else directory / "+".join(self.claims)

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise UserError(f"seeds={self.seeds} must be in 1 to {MOST_SEEDS}; 3 give an interval")
        if self.budget_minutes is not None and self.budget_minutes <= 0:
            raise UserError(f"budget_minutes={self.budget_minutes:g} must be positive; null is no limit")
