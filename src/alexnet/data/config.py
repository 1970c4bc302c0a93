"""The group `data` of a run's configuration."""

from dataclasses import dataclass
from enum import StrEnum


class Resident(StrEnum):
    """Does the store live on the device? (Not yes and no, which YAML reads as true and false.)"""

    auto = "auto"  # if it takes less than SHARE of the device's memory
    always = "always"
    never = "never"


@dataclass
class DataConfig:
    """Which store a run reads, and how."""

    name: str = "synthetic"
    root: str = "data/synthetic"  # holds the stores train/ and val/
    batch_size: int = 128  # images per step, all devices together
    eval_batch_size: int = 256  # images per evaluation step and device
    drop_last: bool = False  # drop the epoch's last batch if it is smaller than the others
    resident: Resident = Resident.auto
    num_workers: int = 0  # threads that read a streamed store; 0: one per core, at most MAX_WORKERS
