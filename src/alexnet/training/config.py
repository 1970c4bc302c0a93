"""The configuration of one run: the groups of `conf/`, each with its owner's dataclass, and keys of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from alexnet.cli import compose
from alexnet.data.augment import AugmentConfig
from alexnet.data.config import DataConfig
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.model import ModelConfig
from alexnet.optim import OptimConfig


class Watch(StrEnum):
    stop = "stop"
    warn = "warn"
    off = "off"


class Freeze(StrEnum):
    none = "none"
    features = "features"  # the convolutions


@dataclass
class Train:
    """scripts/train.py."""

    model: ModelConfig = field(default_factory=ModelConfig)
    backend: Backends = field(default_factory=Backends)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: dict[str, Any] = field(default_factory=dict)  # arguments of lightning.Trainer
    callbacks: dict[str, Any] = field(default_factory=dict)  # {name: {_target_: ...}}, beside our own
    logger: dict[str, Any] = field(default_factory=dict)  # {name: {_target_: ...}}, beside metrics.csv
    seed: int = 0
    # Names the run's directory; None: the experiment, else <model>-<data>.
    name: str | None = None
    output_dir: str = "outputs"
    data_dir: str = "data"
    # Fine-tuning: what to begin with (a checkpoint, a run, an export, torchvision's file), and what stays as it is.
    init_from: str | None = None
    freeze: Freeze = Freeze.none
    # Only run the initialisation probe: will this network leave the plateau at ln(classes)?
    probe: bool = False
    # What happens when the loss still stands at ln(classes) after `watchdog_steps` steps, or is no number.
    watchdog: Watch = Watch.stop
    watchdog_steps: int = 2000
    # Steps between two rows of metrics.csv and between two checkpoints (one is written every epoch in any case).
    log_every: int = 50
    checkpoint_every: int = 200
    # Evaluate val once when training ends.
    evaluate: bool = True
    # Delete what lies in the run's directory and start anew.
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.freeze = Freeze(self.freeze)
        if self.freeze != Freeze.none and self.init_from is None:
            raise UserError(f"freeze={self.freeze} would freeze random weights: set init_from=<checkpoint>")
        for name, least in {"log_every": 1, "checkpoint_every": 0, "watchdog_steps": 1}.items():
            if getattr(self, name) < least:
                wanted = (
                    "a positive integer" if least else "a positive integer, or 0 for none within an epoch"
                )
                raise UserError(f"{name}={getattr(self, name)} must be {wanted}")


def compose_train(overrides: Sequence[str]) -> Train:
    """conf/train.yaml with these overrides. Raises UserError, one line, for what the user can put right."""
    config: Train = compose("train", Train, overrides)
    return config
