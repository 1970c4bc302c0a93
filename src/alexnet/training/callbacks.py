"""What happens beside the step: checkpoints that resume exactly, averaged weights, watchdog, progress bar.

Resume is bit-exact because everything that outlives a step is either drawn by rule or in the checkpoint: weights,
velocities, schedule and loop counters (lightning), the loader's position (data/module.py), the sums of the running
epoch and the text of metrics.csv (metrics.py).
"""

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    Callback,
    Checkpoint,
    EMAWeightAveraging,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from alexnet.data.module import Batch
from alexnet.errors import UserError
from alexnet.system import replaced
from alexnet.training.checkpoint import BEST, LAST, OF_A_NETWORK, PREVIOUS
from alexnet.training.classifier import Classifier
from alexnet.training.interrupt import Interrupted, Signals
from alexnet.training.metrics import HOLDOUT, MetricsFile
from alexnet.training.probe import explain_stall


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears whole or not at all, and the one before last.ckpt is kept beside it as previous.ckpt.
    best.ckpt holds the network alone: without velocities, and with averaged weights only where both are kept.

    Lightning's own would write it to TMPDIR first, and move it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        if path.name == BEST:
            checkpoint = {key: value for key, value in checkpoint.items() if key in OF_A_NETWORK}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial:
            with partial.open("wb") as file:  # given a path, torch does not say that a disk is full
                torch.save(checkpoint, file)
            if path.name != LAST or not path.exists():
                return
            with replaced(path.with_name(PREVIOUS)) as link:  # at no moment is there neither
                try:
                    link.unlink(missing_ok=True)
                    os.link(path, link)
                except OSError:  # a file system without links
                    os.replace(path, link)


class LastCheckpoint(Checkpoint):
    """last.ckpt, every `every` steps, at the end of every epoch, and when a signal asks the run to stop.

    Not after the last batch of an epoch: the holdout has not been seen there, and a resume from between the two
    would skip it.
    """

    def __init__(
        self, directory: Path, every: int, identity: dict[str, Any], signals: Signals, look_every: int
    ) -> None:
        self.path, self.every, self.identity = directory / LAST, every, identity
        self.signals, self.look_every = signals, look_every

    def on_train_start(self, *_: Any) -> None:
        self.signals.listen()  # Lightning has put its own handler in the place of ours
        self.signals.waits = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            return
        stop = self._asked_to_stop(trainer)
        if stop or (self.every and trainer.global_step % self.every == 0):
            trainer.save_checkpoint(self.path)
        if stop:
            raise Interrupted(stop, trainer.global_step)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.path)
        if stop := self._asked_to_stop(trainer, now=True):
            raise Interrupted(stop, trainer.global_step)

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        self.signals.waits = False
        if self.signals.received:  # since the end of the last epoch
            raise Interrupted(self.signals.received, trainer.global_step)

    def on_exception(self, *_: Any) -> None:
        self.signals.waits = False

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint says which run it is of, for the day that run.json is gone."""
        checkpoint["identity"] = self.identity

    def _asked_to_stop(self, trainer: Trainer, now: bool = False) -> int:
        """The signal that ends this run after this step, on every rank the same one; 0 for none.

        Several devices agree on it every `look_every` steps: it costs a wait.
        """
        if trainer.world_size == 1:
            return self.signals.received
        if not now and trainer.global_step % self.look_every:
            return 0
        received = torch.tensor(self.signals.received, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))


class BestCheckpoint(ModelCheckpoint):
    """best.ckpt: the epoch with the lowest holdout error, chosen without a look at val."""

    def __init__(self, directory: Path) -> None:
        super().__init__(
            directory,
            filename=Path(BEST).stem,
            monitor=HOLDOUT["top1_error"],
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = self._device or trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
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
    """Stops a run that has gone wrong, and says what did. mode: stop | warn | off.

    A value that is NaN or infinite: on a CPU each loss is looked at before its step changes the weights. Elsewhere a
    look waits for the device, so it is taken every `every` steps and before a checkpoint. The run then goes back to
    its last checkpoint and repeats its steps with `each_step`, which finds the first bad one (run.py).

    A loss that still stands at ln(classes) after `steps` steps, as if every image looked the same: the plateau on
    which the paper's initialisation can stay for thousands of steps. Networks have left it after 8,000, so this stops
    a run only where the initialisation probe predicts the plateau too, and warns otherwise. Weights that were loaded
    (init_from) are not predicted.
    """

    def __init__(
        self, mode: str, steps: int, checkpoint_every: int, each_step: bool = False, every: int = 50
    ) -> None:
        self.mode, self.steps, self.each_step = mode, steps, each_step
        # A checkpoint of broken weights would be no place to go back to.
        self.looks = (every, checkpoint_every or every, steps)
        self.mean: torch.Tensor | None = None
        self.warned = False  # of the plateau
        self.broken = False  # a value that is not finite was reported

    def state_dict(self) -> dict[str, Any]:
        return {"mean": None if self.mean is None else float(self.mean), "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        mean = state_dict["mean"]
        self.mean = None if mean is None else torch.tensor(mean, dtype=torch.float64)
        self.warned = state_dict["warned"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        looks = self.mode != "off" and (self.each_step or pl_module.device.type == "cpu")
        pl_module.inspect = self._look_at_step if looks and not pl_module.captured else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.inspect = None  # type: ignore[assignment]

    def _look_at_step(self, classifier: Classifier, batch: Batch, key: Any, loss: torch.Tensor) -> None:
        if not self.broken and not math.isfinite(float(loss)):
            self._report(classifier, float(loss), classifier.global_step + 1, classifier.origin(batch, key))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if self.mode == "off" or self.broken:
            return
        # Mean over about the last 50 losses: one batch strays from ln(classes) by more than a percent.
        loss = outputs["loss"].detach().double()
        self.mean = loss if self.mean is None else self.mean.to(loss.device).lerp(loss, 1 / 50)
        if all(trainer.global_step % step for step in self.looks):
            return
        assert isinstance(pl_module, Classifier)
        mean = float(self.mean)
        if not math.isfinite(mean):
            self._report(pl_module, mean, trainer.global_step, seen_late=True)
        elif self.warned or trainer.global_step < self.steps:
            return
        elif abs(mean / math.log(len(pl_module.classes)) - 1) < 0.01:
            data = trainer.datamodule  # type: ignore[attr-defined]
            stop = not pl_module.loaded and pl_module.initial_probe(data.train_store, data.split[0]).stalls
            self._report(pl_module, mean, trainer.global_step, stop=stop)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights that the last step of an epoch broke are never saved."""
        assert isinstance(pl_module, Classifier)
        loss = float(trainer.callback_metrics.get(HOLDOUT["loss"], 0.0))
        if self.mode != "off" and not self.broken and not math.isfinite(loss):
            self._report(pl_module, loss, trainer.global_step, "the holdout, after this step")

    def _report(
        self,
        classifier: Classifier,
        loss: float,
        step: int,
        origin: str = "",
        stop: bool = True,
        seen_late: bool = False,
    ) -> None:
        used = None if classifier.copies is None else classifier.copies.by_name
        text = explain_stall(classifier.net, loss, len(classifier.classes), step, used, origin)
        self.broken, self.warned = not math.isfinite(loss), True
        if self.mode == "warn" or not stop:
            rank_zero_only(print)(text, flush=True)  # scripts silence Lightning's own messages
            return
        raise Stalled(text + "\nwatchdog=warn goes on all the same.", seen_late)


class Stalled(UserError):
    """Training was stopped by the watchdog. `seen_late`: some steps after the one that started it."""

    def __init__(self, text: str, seen_late: bool = False) -> None:
        super().__init__(text)
        self.seen_late = seen_late


class FirstKernels(Callback):
    """The kernels of conv1 as a picture at each epoch, for loggers that take pictures (TensorBoard, wandb)."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from alexnet.pages.figures import scaled_kernels  # matplotlib is an extra

        assert isinstance(pl_module, Classifier)
        picture = scaled_kernels(pl_module.net.conv1.weight)
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image("conv1", picture, trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("conv1", [picture], trainer.global_step)


class Pace(Callback):
    """Images per second since the start or resume of a run, and the time that is left at this pace."""

    first_step: int | None = None

    # On every rank: Lightning asks all of them for the metrics of its bar after a validation.
    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        if self.first_step is None:
            self.first_step, self.first_time = trainer.global_step, time.monotonic()
        self.images = len(batch.labels) * trainer.world_size
        super().on_train_batch_start(trainer, module, batch, index)

    def said(self, trainer: Trainer) -> dict[str, str]:
        steps = trainer.global_step - (self.first_step or 0)
        if steps <= 0:
            return {}
        per_step = (time.monotonic() - self.first_time) / steps
        left = (int(trainer.estimated_stepping_batches) - trainer.global_step) * per_step
        return {"images/s": f"{self.images / per_step:.0f}", "left": f"{left / 60:.1f} min"}


class Progress(Pace, TQDMProgressBar):
    """Lightning's bar with images/s and the time left for the whole run: for a terminal."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return {**items, **self.said(trainer)}


class Lines(Pace):
    """The same for a file or a pipe: one line per epoch, and one per minute within it."""

    def __init__(self, metrics: MetricsFile, seconds: float = 60.0) -> None:
        self.metrics, self.seconds, self.last = metrics, seconds, time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.on_train_epoch_end(trainer)

    def on_train_epoch_end(self, trainer: Trainer, *_: Any) -> None:
        self.last = time.monotonic()
        if not trainer.is_global_zero:
            return
        said = [f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", f"step {trainer.global_step:,}"]
        row = self.metrics.latest
        if row is not None:
            said += [f"loss {row.train['loss']:.3f}", f"error {row.train['top1_error']:.1%}"]
            said += [f"holdout error {row.holdout['top1_error']:.1%}"] if row.holdout else []
        said += [f"{value} {name}" for name, value in self.said(trainer).items()]
        print(", ".join(said), flush=True)
