"""The network with its loss, its update rule and its views of an image, as a LightningModule.

Everything drawn at random in a step is drawn by rule: crops, flips and colour from (seed, epoch, image), dropout
masks from (seed, step, layer, row of the global batch, unit), initial weights from (seed, name). So a step
depends neither on the number of devices or workers nor on where a run was resumed.
"""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from alexnet.data.augment import Augment, AugmentConfig
from alexnet.data.module import Batch, ImageData
from alexnet.layers import cross_entropy, dropout_key
from alexnet.model import AlexNet, ModelConfig
from alexnet.optim import Krizhevsky, OptimConfig, build_optimizer, build_scheduler, conv1_scale
from alexnet.training.master_weights import Shadows, build_fused


class Classifier(pl.LightningModule):
    """One network in training or evaluation.

    `classes` are the wnid and words of each label, `px` the side of the stored images, `data` the name of their set,
    `resample` how they were made smaller (data/prepare.py).
    All arguments are plain dicts, lists and numbers, so that a checkpoint is tensors and plain data and loads with
    `weights_only=True`. `statistics` (mean image, colour eigenvectors) become buffers of `self.augment`; they are
    None when a checkpoint brings them. With `masters`, training computes with bfloat16 shadows of the parameters.
    """

    def __init__(
        self,
        model: dict[str, Any],
        augment: dict[str, Any],
        optim: dict[str, Any],
        backend: dict[str, str],
        classes: list[dict[str, str]],
        px: int,
        seed: int,
        data: str = "",
        resample: str = "area",
        statistics: dict[str, Any] | None = None,
        masters: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["statistics", "masters"])
        self.optim_config = typed(OptimConfig, optim)
        augment_config = typed(AugmentConfig, augment)
        self.net = AlexNet(typed(ModelConfig, model), backend, seed)
        self.compiles = "compiled" in backend.values()
        self.augment = Augment(augment_config, px, statistics, in_one_pass=self.compiles)
        self.colour_until = augment_config.colour_until
        self.loss_backend = backend["cross_entropy"]
        if self.compiles:  # the layout its graphs work in
            self.net.to(memory_format=torch.channels_last)
        self.masters = masters
        self.shadows: Shadows | None = None
        self.captured = False  # the step is one CUDA graph (capture.py)
        self.classes = classes
        self.seed = seed
        self.plateau: ReduceLROnPlateau | None = None
        self.plateau_state: dict[str, Any] | None = None
        self.holdout_top1 = MulticlassAccuracy(len(classes), top_k=1, average="micro")
        self.holdout_top5 = MulticlassAccuracy(len(classes), top_k=min(5, len(classes)), average="micro")
        self.holdout_loss = MeanMetric(nan_strategy="disable")  # a loss that is no number must show

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, crop, crop) as `augment` makes it -> logits (N, classes)."""
        return self.net(x)

    def logits(self, x: Tensor, dropout_key: int | Tensor | None = None, first_row: int = 0) -> Tensor:
        """As training computes them: with the shadows, if there are any."""
        if self.shadows is None:
            return self.net(x, dropout_key, first_row)
        return self.shadows(x.to(self.shadows.dtype), dropout_key, first_row)

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
        return self.progress < self.colour_until

    def training_step(self, batch: Batch, batch_index: int) -> dict[str, Tensor]:
        return self.outputs(batch, dropout_key(self.seed, self.global_step, 0), self.colour_on)

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
        self.holdout_loss.update(
            losses
        )  # one by one: this metric's own weights are lost with nan_strategy="disable"

    def on_validation_epoch_end(self) -> None:
        """Errors on the holdout: the only images the plateau rule and the choice of a checkpoint see."""
        self.refresh_shadows()
        values = {
            "holdout/loss": self.holdout_loss.compute(),
            "holdout/top1_error": 1 - self.holdout_top1.compute(),
            "holdout/top5_error": 1 - self.holdout_top5.compute(),
        }
        self.log_dict(values, rank_zero_only=False)
        self.log("holdout_error", values["holdout/top1_error"], prog_bar=True, logger=False)
        for metric in (self.holdout_loss, self.holdout_top1, self.holdout_top5):
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer()
        scheduler = build_scheduler(optimizer, self.optim_config, self._steps())
        if not isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        self.plateau = scheduler
        if self.plateau_state is not None:
            scheduler.load_state_dict(self.plateau_state)
        return optimizer

    def make_optimizer(self) -> Krizhevsky:
        """The update rule: one compiled pass over memory where the layers are compiled; with shadows, if asked for."""
        self.shadows = Shadows(self.net) if self.masters else None
        if self.compiles or self.masters:
            return build_fused(self.net, self.optim_config, self.shadows)
        return build_optimizer(self.net, self.optim_config)

    # Masters change behind the update's back when a checkpoint is loaded, and when their average is validated.

    def on_train_start(self) -> None:
        self.refresh_shadows()

    def on_validation_epoch_start(self) -> None:
        self.refresh_shadows()

    def refresh_shadows(self) -> None:
        if self.shadows is not None:
            self.shadows.refresh()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Lightning looks for gradients at the masters; where there are shadows, these have them."""
        if not gradient_clip_val:
            return
        parameters = list(self.parameters() if self.shadows is None else self.shadows.of.values())
        if gradient_clip_algorithm == "value":
            nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        else:
            nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def clip(self, optimizer: Any) -> None:
        """Clips the gradients as trainer.gradient_clip_val says; for a step that Lightning does not run."""
        trainer = self.trainer
        self.configure_gradient_clipping(
            optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm or "norm"
        )

    def optimizer_zero_grad(self, epoch: int, batch_index: int, optimizer: torch.optim.Optimizer) -> None:
        """Lightning asks for it after `training_step`; a captured step has used its gradients by then."""
        if not self.captured:
            optimizer.zero_grad()

    def _steps(self) -> int:
        """Updates in the whole run. Not trainer.estimated_stepping_batches: asked for here, it sets the loaders up
        before the checkpoint is read, and their positions in it are lost."""
        data: ImageData = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = len(data.train_dataloader())
        limit = self.trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        return batches * self.optim_config.epochs

    # Lightning would step the plateau rule after the epoch's checkpoint and not at all when resumed from it, so the
    # rule is stepped here, before the checkpoint, and its state travels with the module.

    def on_train_epoch_end(self) -> None:
        if self.plateau is not None:
            self.plateau.step(float(self.trainer.callback_metrics["holdout/top1_error"]))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["plateau"] = None if self.plateau is None else self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.plateau_state = checkpoint["plateau"]


def typed(schema: type[Any], values: dict[str, Any]) -> Any:
    """A configuration dataclass from plain data; unknown keys and wrong types raise, `__post_init__` checks."""
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data, enums by name: what a checkpoint may hold."""
    container = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}
