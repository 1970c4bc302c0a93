"""The network with its loss, its update rule and its views of an image, as a LightningModule.

Everything drawn at random in a step is drawn by rule: crops, flips and colour from (seed, epoch, image), dropout
masks from (seed, step, layer, row of the global batch, unit), initial weights from (seed, name). So a step
depends neither on the number of devices or workers nor on where a run was resumed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alexnet.cli import typed
from alexnet.data.module import Batch
from alexnet.layers import cross_entropy, dropout_key
from alexnet.optim import Krizhevsky, OptimConfig, build_optimizer, build_scheduler, conv1_scale
from alexnet.training.master_weights import WorkingCopies, build_fused
from alexnet.training.metrics import HOLDOUT
from alexnet.training.network import Network


class Classifier(Network, pl.LightningModule):
    """A Network in training. With `master_weights`, it computes with bfloat16 copies of the parameters."""

    def __init__(
        self, optim: dict[str, Any], backend: dict[str, str], classes: list[dict[str, str]], **more: Any
    ) -> None:
        super().__init__(optim=optim, backend=backend, classes=classes, **more)
        self.save_hyperparameters(self.arguments)
        self.optim_config = typed(OptimConfig, optim)
        self.loss_backend = backend["cross_entropy"]
        self.copies: WorkingCopies | None = None
        self.captured = False  # the step is one CUDA graph (capture.py)
        # Looks at the loss of each step before the step changes the weights.
        self.inspect: Callable[[Classifier, Batch, int, Tensor], None] | None = None
        self.plateau: ReduceLROnPlateau | None = None
        self.plateau_state: dict[str, Any] | None = None
        self.holdout_top1 = MulticlassAccuracy(len(classes), top_k=1, average="micro")
        self.holdout_top5 = MulticlassAccuracy(len(classes), top_k=min(5, len(classes)), average="micro")
        self.holdout_loss = MeanMetric(nan_strategy="disable")  # a loss that is no number must show

    def logits(self, x: Tensor, dropout_key: int | Tensor | None = None, first_row: int = 0) -> Tensor:
        """As training computes them: with the working copies of the weights, if there are any."""
        if self.copies is None:
            return self.net(x, dropout_key, first_row)
        return self.copies(x.to(self.copies.dtype), dropout_key, first_row)

    @property
    def progress(self) -> float:
        """Fraction of the epochs that are over: what switches of 2012 went by."""
        return self.current_epoch / self.optim_config.epochs

    def on_train_epoch_start(self) -> None:
        """conv1 is slowed down and frozen by epochs; not called again in a resumed epoch, whose checkpoint has it."""
        for group in self.optimizers(use_pl_optimizer=False).param_groups:  # type: ignore[union-attr]
            if group["name"].startswith("conv1."):
                group["scale"] = conv1_scale(self.optim_config, self.progress)

    @property
    def colour_on(self) -> bool:
        """Whether this epoch's images get colour noise."""
        return self.progress < self.augment.config.colour_until

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        key = dropout_key(self.seed, self.global_step, 0)
        outputs = self.outputs(batch, key, self.colour_on)
        if self.inspect is not None:
            self.inspect(self, batch, key, outputs["loss"].detach())
        return outputs

    def origin(self, batch: Batch, key: int) -> str:
        """Where the first NaN or infinite value came from, in a step that has not changed the weights yet.

        A step computes input -> layers -> loss, then the gradients in reverse, then the new weights. If its loss
        is not finite, three places can have started it: the input, the weights (the step before left them so),
        or a layer that made such a value of finite ones. A gradient that is not finite reaches every layer
        before its own, so of the layers with broken weights the last one was the first.
        """

        def broken(values: Tensor) -> int:
            """How many images (N, ...) have a value that is not finite."""
            return int((~values.isfinite()).flatten(1).any(1).sum())

        x = self.augment.from_crops(batch.images, batch.draws, self.colour_on)
        if broken(x):
            return f"the input: {broken(x)} of its {len(x)} images, augmentation and mean image included"
        weights = dict(self.net.named_parameters()) if self.copies is None else self.copies.by_name
        for name, w in reversed(weights.items()):
            if not w.isfinite().all():
                return f"{name}: the update of the step before made it so"
        found: list[str] = []

        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not found and broken(output):
                found.append(f"the output of {names[module]}, for {broken(output)} of {len(output)} images")

        names = {module: name for name, module in self.net.named_modules() if not list(module.children())}
        with torch.no_grad(), ExitStack() as hooks:
            for module in names:
                hooks.enter_context(module.register_forward_hook(look))
            self.logits(x, key, batch.first_row)
        return found[0] if found else "the loss itself: the logits are finite"

    def outputs(self, batch: Batch, key: int | Tensor, colour_on: bool) -> dict[str, Tensor]:
        """loss: the batch's mean loss, a number with a gradient. totals: (2,) float64, the sum of its images' losses
        and how many of them are classified wrongly.

        `key` names the dropout masks of this step.
        """
        x = self.augment.from_crops(batch.images, batch.draws, colour_on)
        logits = self.logits(x, key, batch.first_row)
        smoothing = self.optim_config.label_smoothing
        loss = cross_entropy(logits, batch.labels, label_smoothing=smoothing, backend=self.loss_backend)
        wrong = (logits.detach().argmax(1) != batch.labels).sum()
        totals = torch.stack([loss.detach().double() * len(batch.labels), wrong.double()])
        return {"loss": loss, "totals": totals}

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        logits = self.logits(self.augment.centre(batch.images)).float()
        self.holdout_top1.update(logits, batch.labels)
        self.holdout_top5.update(logits, batch.labels)
        losses = cross_entropy(logits, batch.labels, reduction="none", backend=self.loss_backend)
        # One by one: this metric's own weights are lost with nan_strategy="disable".
        self.holdout_loss.update(losses)

    def on_validation_epoch_end(self) -> None:
        """Errors on the holdout: the only images the plateau rule and the choice of a checkpoint see."""
        self.refresh_copies()
        values = {
            HOLDOUT["loss"]: self.holdout_loss.compute(),
            HOLDOUT["top1_error"]: 1 - self.holdout_top1.compute(),
            HOLDOUT["top5_error"]: 1 - self.holdout_top5.compute(),
        }
        self.log_dict(values, logger=False)  # MetricsFile hands them to the loggers
        self.log("holdout_error", values[HOLDOUT["top1_error"]], prog_bar=True, logger=False)
        for metric in (self.holdout_loss, self.holdout_top1, self.holdout_top5):
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, data = self.make_optimizer(), self.trainer.datamodule  # type: ignore[attr-defined]
        # Not trainer.estimated_stepping_batches: asked for here, it sets the loaders up before the checkpoint
        # is read, and their positions in it are lost.
        batches, limit = len(data.train_dataloader()), self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        scheduler = build_scheduler(optimizer, self.optim_config, batches * self.optim_config.epochs)
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        self.plateau = scheduler
        if self.plateau_state is not None:
            scheduler.load_state_dict(self.plateau_state)
        return optimizer

    def make_optimizer(self) -> Krizhevsky:
        """The update rule, in the form that `speedups` says."""
        self.copies = WorkingCopies(self.net) if self.speedups.master_weights else None
        if self.speedups.fused_update:
            return build_fused(self.net, self.optim_config, self.copies)
        return build_optimizer(self.net, self.optim_config)

    # Not only the update changes the weights: a checkpoint is loaded; in validation their average takes their place.

    def refresh_copies(self) -> None:
        if self.copies is not None:
            self.copies.refresh()

    on_train_start = on_validation_epoch_start = refresh_copies

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Lightning would look for gradients at the master weights; where there are working copies, these have them."""
        if not gradient_clip_val:
            return
        parameters = list(self.parameters() if self.copies is None else self.copies.by_name.values())
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def optimizer_zero_grad(self, epoch: int, batch_index: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning asks for it after `training_step`; a captured step has used its gradients by then."""
        if not self.captured:
            optimizer.zero_grad()

    # Lightning would step the plateau rule after the epoch's checkpoint and not at all when resumed from it, so the
    # rule is stepped here, before the checkpoint, and its state travels with the module.

    def on_train_epoch_end(self) -> None:
        if self.plateau is not None:
            self.plateau.step(float(self.trainer.callback_metrics[HOLDOUT["top1_error"]]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["plateau"] = None if self.plateau is None else self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.plateau_state = checkpoint["plateau"]
