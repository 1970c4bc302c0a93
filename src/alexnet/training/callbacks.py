"""What happens beside the step: checkpoints that resume exactly, averaged weights, watchdog, progress bar.

Resume is bit-exact because everything that outlives a step is either drawn by rule or in the checkpoint: weights,
velocities, schedule and loop counters (lightning), the loader's position (data/module.py), the sums of the running
epoch and the length of metrics.csv (metrics.py).
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from alexnet.errors import UserError
from alexnet.training.classifier import Classifier
from alexnet.training.probe import explain_stall


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears whole or not at all: a kill while writing leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        final = Path(path)
        partial = final.with_name(final.name + ".partial")
        super().save_checkpoint(checkpoint, partial, storage_options)
        os.replace(partial, final)


class LastCheckpoint(Checkpoint):
    """last.ckpt, every `every` steps and at the end of every epoch.

    Not after the last batch of an epoch: the holdout has not been seen there, and a resume from between the two
    would skip it.
    """

    def __init__(self, directory: Path, every: int) -> None:
        self.path, self.every = directory / "last.ckpt", every

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.every and trainer.global_step % self.every == 0 and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.path)


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt: the epoch with the lowest holdout error, chosen without a look at val."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            directory,
            filename="best",
            monitor="holdout/top1_error",
            mode="min",
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A run may have been moved since: its paths follow, or lightning would forget the best score."""
        moved = str(state_dict["dirpath"])

        def here(path: Any) -> str:
            return str(path).replace(moved, str(self.dirpath), 1)

        paths = {key: here(value) for key, value in state_dict.items() if key.endswith("path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **paths, "best_k_models": best})


class AveragedWeights(EMAWeightAveraging):
    """Lightning's exponential average, on the device that trains and without waiting for it.

    Lightning makes the average before it moves the network there, and would leave it where it was made: every step
    would copy all weights to the CPU. Torch's update reads its own counter back from the device twice a step.
    """

    def __init__(self, decay: float) -> None:
        super().__init__(decay=decay)
        self.decay = decay

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._device = self._device or trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """average <- decay average + (1 - decay) weights; after the first step average <- weights."""
        assert self._average_model is not None
        if trainer.global_step <= self._latest_update_step:
            return
        averages = [*self._average_model.module.parameters(), *self._average_model.module.buffers()]
        now = [*pl_module.parameters(), *pl_module.buffers()]
        if self._latest_update_step == 0:
            torch._foreach_copy_(averages, now)
        else:
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, torch._foreach_mul(now, 1 - self.decay))
        self._average_model.n_averaged += 1
        self._latest_update_step = trainer.global_step


class Watchdog(Callback):
    """Explains a loss that is no number, or that still stands at ln(classes) after `steps` steps.

    ln(classes) is the loss of a network that tells every image the same: the plateau on which the paper's
    initialisation can stay for thousands of steps (`probe=true` predicts it). mode: stop | warn | off.
    """

    def __init__(self, mode: str = "stop", steps: int = 2000, every: int = 50) -> None:
        if mode not in ("stop", "warn", "off"):
            raise UserError(f"watchdog={mode!r} is no mode: choose stop, warn or off")
        self.mode, self.steps, self.every = mode, steps, every
        self.mean: torch.Tensor | None = None
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        return {"mean": None if self.mean is None else float(self.mean), "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mean = state_dict["mean"]
        self.mean = None if mean is None else torch.tensor(mean, dtype=torch.float64)
        self.warned = state_dict["warned"]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.mode == "off" or self.warned:
            return
        # Mean over about the last 50 losses: one batch strays from ln(classes) by more than a percent.
        loss = outputs["loss"].detach().double()
        self.mean = loss if self.mean is None else self.mean.to(loss.device).lerp(loss, 1 / 50)
        if trainer.global_step % self.every and trainer.global_step != self.steps:
            return
        assert isinstance(pl_module, Classifier)
        mean, classes = float(self.mean), len(pl_module.classes)
        stalled = trainer.global_step >= self.steps and abs(mean / math.log(classes) - 1) < 0.01
        if stalled or not math.isfinite(mean):
            used = None if pl_module.shadows is None else pl_module.shadows.of
            self._report(explain_stall(pl_module.net, mean, classes, trainer.global_step, used))

    def _report(self, text: str) -> None:
        self.warned = True
        if self.mode == "warn":
            rank_zero_only(print)(text, flush=True)  # scripts silence Lightning's own messages
            return
        raise Stalled(text + "\nwatchdog=warn goes on all the same.")


class Stalled(UserError):
    """Training was stopped by the watchdog."""


class Progress(TQDMProgressBar):
    """Lightning's bar with images/s and the time left for the whole run."""

    def __init__(self, refresh_rate: int = 10) -> None:
        super().__init__(refresh_rate=refresh_rate)
        self.first_step: int | None = None

    # On every rank: Lightning asks all of them for the metrics after a validation.
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.first_step is None:
            self.first_step, self.first_time = trainer.global_step, time.monotonic()
        self.batch_images = len(batch.labels) * trainer.world_size
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        steps = trainer.global_step - (self.first_step or 0)
        if steps > 0:
            per_step = (time.monotonic() - self.first_time) / steps
            left = (int(trainer.estimated_stepping_batches) - trainer.global_step) * per_step
            items["images/s"] = f"{self.batch_images / per_step:.0f}"
            items["left"] = f"{left / 60:.1f} min"
        return items
