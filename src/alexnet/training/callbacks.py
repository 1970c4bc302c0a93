"""What happens beside the step: the metrics file, checkpoints that resume exactly, the watchdog, the progress bar.

Resume is bit-exact because everything that outlives a step is either drawn by rule or in the checkpoint: weights,
velocities, schedule and loop counters (lightning), the loader's position (data/module.py), and here the sums of the
running epoch and the length of metrics.csv.
"""

import csv
import io
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

COLUMNS = (
    "step",
    "epoch",
    "lr",
    "train/loss",
    "train/top1_error",
    "holdout/loss",
    "holdout/top1_error",
    "holdout/top5_error",
    "images_per_second",
    "seconds",
)
# Columns read off a clock: the only ones that may differ between a resumed and an uninterrupted run.
CLOCK_COLUMNS = ("images_per_second", "seconds")


class MetricsFile(Callback):
    """metrics.csv: a row every `every` steps (means over those steps) and one per epoch (means over the epoch).

    The file only grows. A checkpoint remembers its length in bytes; on resume what came later is cut off, and the
    sums of the epoch go on where they stood.
    """

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self.bytes = 0
        self.window = Sums()
        self.epoch = Sums()
        self.seconds_before = 0.0
        self.started: float | None = None
        self.images_per_second = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.resumed = False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.bytes = state_dict["bytes"]
        self.seconds_before = state_dict["seconds"]
        self.epoch.load(state_dict["epoch"])
        self.window.load(state_dict["window"])
        self.resumed = True

    def state_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "seconds": self.seconds(),
            "epoch": self.epoch.plain(),
            "window": self.window.plain(),
        }

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = self.window_started = time.monotonic()
        if not trainer.is_global_zero:
            return
        if self.resumed:
            os.truncate(self.path, self.bytes)
        else:
            self.path.unlink(missing_ok=True)
            self._append(dict(zip(COLUMNS, COLUMNS, strict=True)))

    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        here = 0.0 if self.started is None else time.monotonic() - self.started
        return self.seconds_before + here

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        totals = outputs["totals"]
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        images = len(batch.labels) * trainer.world_size
        self.window.add(totals, images)
        self.epoch.add(totals, images)
        if trainer.global_step % self.every == 0:
            self._write_window(trainer)

    def _write_window(self, trainer: pl.Trainer) -> None:
        now = time.monotonic()
        self.images_per_second = self.window.images_here / max(now - self.window_started, 1e-9)
        row = self._row(trainer, self.window)
        row["images_per_second"] = f"{self.images_per_second:.1f}"
        self._append_at_zero(trainer, row)
        for logger in trainer.loggers:
            logger.log_metrics({"train/loss": float(row["train/loss"])}, step=trainer.global_step)
        self.window, self.window_started = Sums(), now

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.window_started += time.monotonic() - self.validation_started  # images/s are those of training
        if not self.epoch.images:
            return
        row = self._row(trainer, self.epoch)
        for name in ("holdout/loss", "holdout/top1_error", "holdout/top5_error"):
            row[name] = repr(float(trainer.callback_metrics[name]))
        self._append_at_zero(trainer, row)
        self.epoch = Sums()

    def _row(self, trainer: pl.Trainer, sums: "Sums") -> dict[str, Any]:
        loss, wrong = sums.totals.tolist()
        # The rate of the weights, which the schedule moves; biases may keep theirs.
        return {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "lr": trainer.optimizers[0].param_groups[-2]["lr"],
            "train/loss": repr(loss / max(sums.images, 1)),
            "train/top1_error": repr(wrong / max(sums.images, 1)),
            "seconds": f"{self.seconds():.1f}",
        }

    def _append_at_zero(self, trainer: pl.Trainer, row: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            self._append(row)

    def _append(self, row: dict[str, Any]) -> None:
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerow(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
            self.bytes = file.tell()


class Sums:
    """Loss, wrong answers and images since some moment. The totals stay on their device: reading them would wait."""

    def __init__(self) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64)  # loss times images, wrong answers
        self.images = 0
        self.images_here = 0  # in this process: what a clock here can be compared with

    def add(self, totals: torch.Tensor, images: int) -> None:
        self.totals = totals.clone() if not self.images else totals + self.totals.to(totals.device)
        self.images += images
        self.images_here += images

    def plain(self) -> list[float]:
        return [*self.totals.tolist(), float(self.images)]

    def load(self, values: list[float]) -> None:
        self.totals = torch.tensor(values[:2], dtype=torch.float64)
        self.images = int(values[2])


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
