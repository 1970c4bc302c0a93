"""The configuration of one run: the groups of `conf/`, each with its owner's dataclass, and keys of its own."""

from collections.abc import Mapping, Sequence
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

# Arguments of lightning.Trainer that every run needs; conf/trainer/auto.yaml has them.
NEEDED = ("accelerator", "devices", "strategy", "precision", "max_epochs", "enable_progress_bar")

# The values that other arguments may have, and what to do instead of another value: it would end a run, step its rate
# or look at the holdout elsewhere than the schedule does, or have no effect; Lightning would say so late or never.
_EVERY_EPOCH = "the holdout is evaluated after every epoch, leave it out"
_SET_HERE = "it is set by this project, leave it out"
ALLOWED: dict[str, tuple[tuple[Any, ...], str]] = {
    "_target_": (("lightning.pytorch.Trainer",), "leave it out"),
    "accelerator": (("auto", "cpu", "gpu", "cuda"), "choose one of auto, cpu, gpu"),
    "max_steps": ((None, -1), "set optim.epochs, or trainer.limit_train_batches for shorter epochs"),
    "max_time": ((None,), "stop the process instead, the same command resumes with the same bits"),
    "accumulate_grad_batches": ((None, 1), "set data.batch_size, one update is one minibatch"),
    "fast_dev_run": ((None, False), "set trainer=debug, three batches an epoch in a directory of its own"),
    "check_val_every_n_epoch": ((1,), _EVERY_EPOCH),
    "val_check_interval": ((None, 1.0), _EVERY_EPOCH),
    "overfit_batches": ((0, 0.0), "set trainer.limit_train_batches"),
    "barebones": ((False,), "leave it out"),
    "enable_checkpointing": ((None, True), "set checkpoint_every=0 for one checkpoint an epoch"),
    "callbacks": ((), "add one to the group, +callbacks.<name>._target_=<class>"),
    "logger": ((), "choose one of the group, logger=tensorboard"),
    "plugins": ((), _SET_HERE),
    "default_root_dir": ((), _SET_HERE),
    "enable_model_summary": ((), _SET_HERE),
    "num_sanity_val_steps": ((), _SET_HERE),
    "use_distributed_sampler": (
        (False,),
        "images are dealt out to the devices by data/module.py, leave it out",
    ),
}
# Callbacks of Lightning that end a run at its start unless there is a logger.
LOGGING = ("LearningRateMonitor", "DeviceStatsMonitor")


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
        check_trainer(self.trainer)
        if self.trainer["max_epochs"] != self.optim.epochs:
            raise UserError(
                f"trainer.max_epochs={self.trainer['max_epochs']}, but the schedule is of optim.epochs="
                f"{self.optim.epochs}: set optim.epochs alone"
            )
        check_callbacks(self.callbacks, self.logger)
        self.freeze = Freeze(self.freeze)
        if self.freeze != Freeze.none and self.init_from is None:
            raise UserError(f"freeze={self.freeze} would freeze random weights: set init_from=<checkpoint>")
        for name, least in {"log_every": 1, "checkpoint_every": 0, "watchdog_steps": 1}.items():
            if getattr(self, name) < least:
                none = "" if least else ", or 0 for none within an epoch"
                raise UserError(f"{name}={getattr(self, name)} must be a positive integer{none}")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raises UserError for an argument that is missing, or has a value with which a run could not be trained."""
    for key in NEEDED:
        if key not in trainer:
            raise UserError(f"trainer.{key} is missing: it cannot be deleted with ~trainer")
    for key, (allowed, remedy) in ALLOWED.items():
        value = trainer.get(key)
        if key in trainer and not any(type(value) is type(a) and value == a for a in allowed):
            raise UserError(f"trainer.{key}={value} is not supported: {remedy}")
    for key in ("limit_train_batches", "limit_val_batches"):
        limit = trainer.get(key, 1.0)
        if not (type(limit) is int and limit >= 1) and not (type(limit) is float and 0 < limit <= 1):
            raise UserError(
                f"trainer.{key}={limit} must be a positive integer (batches) or in (0, 1] (a fraction of them)"
            )


def single_device(trainer: Mapping[str, Any]) -> bool:
    """Whether one process trains on one device."""
    return trainer["devices"] in (1, "1") and trainer["strategy"] == "auto"


def check_callbacks(callbacks: Mapping[str, Any], loggers: Mapping[str, Any]) -> None:
    for name, callback in callbacks.items():
        if not isinstance(callback, dict) or "_target_" not in callback:
            raise UserError(f"callbacks.{name} must have a _target_: +callbacks.{name}._target_=<class>")
        kind = str(callback["_target_"]).rpartition(".")[2]
        if kind in LOGGING and not loggers:
            raise UserError(f"callbacks.{name}: {kind} needs a logger, set logger=tensorboard")


def compose_train(overrides: Sequence[str]) -> Train:
    """conf/train.yaml with these overrides. Raises UserError, one line, for what the user can put right."""
    return compose("train", Train, overrides)
