"""metrics.csv: its columns, its two kinds of rows, its writing and its reading. Nothing else knows its columns.

    steps   every `log_every` steps: means over the images of these steps, and their speed
    epoch   at the end of an epoch: means over its images, and what the holdout gave after it

The last column names the kind. Files of before it have none: there an epoch's row is one with a loss of the holdout.
"""

import csv
import io
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from alexnet.errors import UserError
from alexnet.system import write_whole


class Kind(StrEnum):
    steps = "steps"
    epoch = "epoch"


TRAIN = {"loss": "train/loss", "top1_error": "train/top1_error"}
HOLDOUT = {"loss": "holdout/loss", "top1_error": "holdout/top1_error", "top5_error": "holdout/top5_error"}
# Columns read off a clock: the only ones that may differ between a resumed and an uninterrupted run.
CLOCK_COLUMNS = ("images_per_second", "seconds")
COLUMNS = ("step", "epoch", "lr", *TRAIN.values(), *HOLDOUT.values(), *CLOCK_COLUMNS, "kind")
FEW_EPOCHS = 20  # fewer are drawn by their rows of steps

Curve = tuple[list[float], list[float]]  # epochs done, values


# Reading --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One row. `train` and `holdout` hold the quantities it has: loss (nats), top1_error, top5_error (fractions)."""

    kind: Kind
    step: int  # updates done
    epoch: int  # from 0
    train: dict[str, float]
    holdout: dict[str, float]
    images_per_second: float | None

    @classmethod
    def of(cls, cells: Mapping[str, str | None]) -> "Row":
        def numbers(columns: Mapping[str, str]) -> dict[str, float]:
            return {quantity: float(cell) for quantity, name in columns.items() if (cell := cells.get(name))}

        step, epoch = (int(cells[column] or "") for column in ("step", "epoch"))
        cell = cells.get("images_per_second")
        speed = float(cell) if cell else None
        return cls(Kind(_kind(cells)), step, epoch, numbers(TRAIN), numbers(HOLDOUT), speed)


def _kind(cells: Mapping[str, str | None]) -> str:
    return cells.get("kind") or (Kind.epoch if cells.get(HOLDOUT["loss"]) else Kind.steps)


@dataclass
class Metrics:
    """The rows of one run, and what is asked of them."""

    rows: Sequence[Row] = ()

    @cached_property
    def steps(self) -> list[Row]:
        return [row for row in self.rows if row.kind == Kind.steps]

    @cached_property
    def epochs(self) -> list[Row]:
        return [row for row in self.rows if row.kind == Kind.epoch]

    @property
    def steps_done(self) -> int:
        return self.rows[-1].step if self.rows else 0

    @property
    def last_train(self) -> dict[str, float]:
        """Loss and error of the last row; empty if there is none."""
        return self.rows[-1].train if self.rows else {}

    @property
    def diverged(self) -> bool:
        """Whether the loss of training, or of the holdout after it, ended as NaN or infinity."""
        last = [self.rows[-1].train, self.rows[-1].holdout] if self.rows else []
        return not all(math.isfinite(values.get("loss", 0.0)) for values in last)

    @property
    def images_per_second(self) -> float:
        """The median, which a suspended or shared machine moves little; 0 without any."""
        return statistics.median([r.images_per_second for r in self.rows if r.images_per_second] or [0.0])

    def train_by_steps(self, quantity: str) -> list[tuple[float, float]]:
        """(epochs done, mean over the last few steps) of training; empty before the end of an epoch."""
        x, y = self._curve(self.steps or self.epochs, "train", quantity)
        return list(zip(x, y, strict=True))

    def curves(self, quantity: str) -> dict[str, Curve]:
        """`train` and `holdout` against epochs done; empty before the end of an epoch.

        Training is drawn by its rows of steps while epochs are few, else by an epoch's mean at the epoch's middle.
        """
        if not self.epochs:
            return {}
        few = len(self.epochs) < FEW_EPOCHS and len(self.steps) > len(self.epochs)
        x, y = self._curve(self.steps if few else self.epochs, "train", quantity)
        middle = 0.0 if few else 0.5
        train = [epochs_done - middle for epochs_done in x], y
        return {"train": train, "holdout": self._curve(self.epochs, "holdout", quantity)}

    def _curve(self, rows: Sequence[Row], part: str, quantity: str) -> Curve:
        if not self.epochs:
            return [], []
        steps_per_epoch = self.epochs[-1].step / (self.epochs[-1].epoch + 1)
        return [row.step / steps_per_epoch for row in rows], [getattr(row, part)[quantity] for row in rows]


def read_metrics(path: Path) -> Metrics:
    """metrics.csv; empty if there is none. Raises UserError if it is damaged.

    A last line without its end is left out: somebody may be writing it.
    """
    if not path.exists():
        return Metrics()
    try:
        text = path.read_text(encoding="utf-8")
        return Metrics([Row.of(cells) for cells in _cells(text[: text.rfind("\n") + 1])])
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged ({error}): delete it, the same command writes it anew from the last checkpoint"
        ) from error


def _cells(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# Writing --------------------------------------------------------------------------------------------------


def _line(cells: Mapping[str, Any]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerow(cells)
    return text.getvalue()


HEADER = _line(dict(zip(COLUMNS, COLUMNS, strict=True)))


class MetricsFile(Callback):
    """Writes metrics.csv: a row every `every` steps and one per epoch.

    A checkpoint carries the text as it was then, and the sums of the running epoch. On resume the file is written
    anew from that text, so it fits the weights whatever became of the file.
    """

    def __init__(self, path: Path, every: int = 50) -> None:
        self.path, self.every = path, every
        self.text = HEADER
        self.window = Sums()
        self.epoch = Sums()
        self.seconds_before = 0.0
        self.started: float | None = None
        self.latest: Row | None = None  # the last row that was written

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        text = state_dict.get("text")
        self.text = self._first_bytes(state_dict["bytes"]) if text is None else text
        self.seconds_before = state_dict["seconds"]
        self.epoch.load(state_dict["epoch"])
        self.window.load(state_dict["window"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "text": self.text,
            "seconds": self.seconds(),
            "epoch": self.epoch.plain(),
            "window": self.window.plain(),
        }

    def _first_bytes(self, size: int) -> str:
        """Of the file, for a checkpoint that knows only how long it was (until November 2026)."""
        content = self.path.read_bytes() if self.path.exists() else b""
        try:
            rows = _cells(content[:size].decode())
            if len(content) < size or any(Row.of(row).step < 0 for row in rows):
                raise ValueError("it is shorter than at the last checkpoint")
        except (ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(
                f"{self.path} does not fit the last checkpoint ({error}): restore it, or overwrite=true"
            ) from error
        return HEADER + "".join(_line({**row, "kind": _kind(row)}) for row in rows)

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.started = self.window_started = time.monotonic()
        if trainer.is_global_zero:
            write_whole(self.path, self.text)

    def seconds(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        here = 0.0 if self.started is None else time.monotonic() - self.started
        return self.seconds_before + here

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        totals = outputs["totals"]
        if trainer.world_size > 1:
            totals = trainer.strategy.reduce(totals, reduce_op="sum")
        images = len(batch.labels) * trainer.world_size
        self.window.add(totals, images)
        self.epoch.add(totals, images)
        if trainer.global_step % self.every == 0:
            now = time.monotonic()
            speed = self.window.images_here / max(now - self.window_started, 1e-9)
            self._write(trainer, Kind.steps, self.window, {"images_per_second": f"{speed:.1f}"})
            self.window, self.window_started = Sums(), now

    def on_validation_start(self, *_: Any) -> None:
        self.validation_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        self.window_started += time.monotonic() - self.validation_started  # images/s are those of training
        if self.epoch.images:
            values = {column: repr(float(trainer.callback_metrics[column])) for column in HOLDOUT.values()}
            self._write(trainer, Kind.epoch, self.epoch, values)
            self.epoch = Sums()

    def _write(self, trainer: Trainer, kind: Kind, sums: "Sums", more: Mapping[str, str]) -> None:
        """Appends a row; loggers of conf/logger get its numbers too."""
        if not trainer.is_global_zero:
            return
        # The rate that the schedule moves: biases may keep theirs, and conv1 may be frozen.
        rate = next(g["lr"] for g in trainer.optimizers[0].param_groups if g["name"] == "others.weight")
        means = {TRAIN[quantity]: repr(mean) for quantity, mean in sums.means().items()}
        row = {"lr": float(rate), **means, **more, "seconds": f"{self.seconds():.1f}"}
        cells = {"step": trainer.global_step, "epoch": trainer.current_epoch, **row, "kind": kind}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(cells))
        self.text += _line(cells)
        self.latest = Row.of({column: str(cell) for column, cell in cells.items()})
        # An epoch's means would mix with those of its last steps.
        numbers: Mapping[str, Any] = row if kind == Kind.steps else more
        for logger in trainer.loggers:
            logger.log_metrics({name: float(value) for name, value in numbers.items()}, trainer.global_step)


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

    def means(self) -> dict[str, float]:
        loss, wrong = self.totals.tolist()
        return {"loss": loss / max(self.images, 1), "top1_error": wrong / max(self.images, 1)}

    def plain(self) -> list[float]:
        return [*self.totals.tolist(), float(self.images)]

    def load(self, values: list[float]) -> None:
        self.totals = torch.tensor(values[:2], dtype=torch.float64)
        self.images = int(values[2])
