"""A network, its views of an image and the names of its classes: what a checkpoint holds, ready to be asked.

It knows nothing of training and of Lightning, whose import alone takes longer than a prediction.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alexnet.cli import typed
from alexnet.data.augment import Augment, AugmentConfig
from alexnet.data.store import Store
from alexnet.model import AlexNet, ModelConfig
from alexnet.training.probe import Probe, probe, spread

PROBE_IMAGES = 64


@dataclass(frozen=True)
class Speedups:
    """What a backend switches on besides its pairs of functions: decided here, printed and recorded with the run."""

    channels_last: bool  # weights in the layout in which compiled graphs work
    one_pass_augmentation: bool  # crop, mirror, colour and mean in one compiled pass over memory
    fused_update: bool  # the update in one compiled pass over memory
    master_weights: bool  # float32; bfloat16 working copies do the work

    @classmethod
    def of(cls, backend: Mapping[str, str], master_weights: bool = False) -> "Speedups":
        compiles = "compiled" in backend.values()
        return cls(compiles, compiles, compiles or master_weights, master_weights)

    def __str__(self) -> str:
        return ", ".join(name.replace("_", " ") for name, on in asdict(self).items() if on)


class Network(nn.Module):
    """One network, trained or to be trained.

    `classes` are the wnid and words of each label, `px` the side of the stored images, `data` the name of their set,
    `resample` how they were made smaller (data/prepare.py).
    All arguments are plain dicts, lists and numbers, so that a checkpoint is tensors and plain data and loads with
    `weights_only=True`; `arguments` keeps them. `statistics` (mean image, colour eigenvectors) become buffers of
    `self.augment`; they are None when a checkpoint brings them.
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
        master_weights: bool = False,
    ) -> None:
        super().__init__()
        plain = {"model": model, "augment": augment, "optim": optim, "backend": backend, "classes": classes}
        self.arguments: dict[str, Any] = {**plain, "px": px, "seed": seed, "data": data, "resample": resample}
        self.net = AlexNet(typed(ModelConfig, model), backend, seed)
        self.speedups = Speedups.of(backend, master_weights)
        one_pass = self.speedups.one_pass_augmentation
        self.augment = Augment(typed(AugmentConfig, augment), px, statistics, in_one_pass=one_pass)
        if self.speedups.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.classes = classes
        self.seed = seed
        self.loaded = False  # training began with the weights of another network (fine_tune.py)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, crop, crop) as `augment` makes it -> logits (N, classes)."""
        return self.net(x)

    def initial_probe(self, store: Store, trained: Tensor) -> Probe:
        """What the probe says of this network as it was before its first step, on a few of the training images, whose
        rows in the store are `trained`. With loaded weights it must not have been trained yet: they are not kept."""
        device = self.augment.mean.device
        net = AlexNet(self.net.config, self.net.backends, self.seed).to(device)
        if self.loaded:
            net.load_state_dict(self.net.state_dict())
        rows = spread(trained.numpy(), PROBE_IMAGES)
        images, labels = (torch.from_numpy(array[rows]).to(device) for array in (store.images, store.labels))
        return probe(net, self.augment.centre(images), labels)
