"""metrics.csv: its columns, its rows, its writing and its reading."""

import csv
import io
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
)

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


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, empty cells as empty strings."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
