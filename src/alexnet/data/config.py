"""The group `data` of a run's configuration, and the names of the known data sets."""

import os
import re
import shlex
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

SourceKind = StrEnum("SourceKind", "synthetic tiny_imagenet imagenette imagewoof imagenet folder")


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

    def __post_init__(self) -> None:
        self.root = os.path.expanduser(self.root)

    def remedy(self) -> str:
        """The command that makes the stores, for messages; imagenet100 and imagenet_100 are subsets of imagenet."""
        known = [kind for kind in SourceKind if self.name.startswith(kind)]
        kind = max(known, key=len, default=SourceKind.folder)
        words = ["python scripts/prepare_data.py", f"data={kind}"]
        if kind in (SourceKind.imagenet, SourceKind.folder):  # the others are downloaded
            words.append("path=<folder or archive>")
        subset = re.fullmatch(rf"{kind}_?(\d+)", self.name)
        if subset and kind != SourceKind.synthetic:  # tiny_imagenet_20; of the synthetic set it counts images
            words.append(f"n_classes={subset[1]}")
        if self.name != kind:
            words.append(shlex.quote(f"name={self.name}"))
        if (data_dir := str(Path(self.root).parent)) != "data":
            words.append(shlex.quote(f"data_dir={data_dir}"))
        return f"make it with `{' '.join(words)}`"


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
