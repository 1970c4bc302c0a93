"""The networks that compete: ours, the same of stock modules, and torchvision's, each with a training step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.bench.timing import Contestant, Kind
from alexnet.classifier import typed
from alexnet.layers import Backends, cross_entropy
from alexnet.model import AlexNet, ModelConfig, Ties, layer_table
from alexnet.optim import OptimConfig, parameter_groups
from alexnet.optim_masters import FusedKrizhevsky, Shadows

CLASSES = 1000
RATE = 1e-6  # so small that a hundred steps on noise do no harm
TUNED = "channels-last, fused SGD"

MODELS: dict[str, dict[str, Any]] = {
    "paper": {},
    # conf/model/mini.yaml
    "mini": {
        "image_px": 56,
        "kernel_size": [7, 5, 3, 3, 3],
        "stride": [2, 1, 1, 1, 1],
        "padding": [[1, 2, 1, 2], [2, 2, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]],
        "hidden": [2048, 2048],
    },
}


def model_config(model: str) -> ModelConfig:
    return typed(ModelConfig, {**MODELS[model], "num_classes": CLASSES})


@dataclass
class Task:
    """What every contestant of a row is given."""

    config: ModelConfig
    images: Tensor  # (N, 3, px, px) float32 in 0..255 minus the mean, channels-last
    labels: Tensor
    dtype: torch.dtype

    @property
    def cast(self) -> Tensor:
        return self.images.to(self.dtype)


def task(model: str, batch: int, dtype: str, device: str) -> Task:
    config = model_config(model)
    generator = torch.Generator().manual_seed(0)
    images = 50 * torch.randn(batch, 3, config.image_px, config.image_px, generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return Task(config, images, labels.to(device), getattr(torch, dtype))


def multiply_adds(config: ModelConfig) -> float:
    """Of one image in a training step: forward, and two products as large backward; conv1 has no input gradient."""
    macs = {row.name: row.macs for row in layer_table(config)}
    return 3 * sum(macs.values()) - macs["conv1"]


def ours(task: Task, backend: str, own_input: bool = False) -> Contestant:
    """Our network and update: float32, or bfloat16 shadows of float32 masters.

    own_input: the caller puts a new batch into the task before each step, and its cast is part of the step.
    """
    device = task.images.device
    net = AlexNet(task.config, Backends(default=backend).resolve(device.type), seed=0)  # type: ignore[arg-type]
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    shadows = None if task.dtype == torch.float32 else Shadows(net, task.dtype)
    optimizer = FusedKrizhevsky(parameter_groups(net, OptimConfig(lr=RATE)), shadows, lr=RATE)
    forward, cast, key = shadows or net, task.cast, torch.tensor(7, device=device)

    def step() -> Tensor:
        x = task.cast if own_input else cast
        optimizer.zero_grad()
        loss = cross_entropy(forward(x, key), task.labels, backend=net.backends["cross_entropy"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    return Contestant(backend, Kind.ours, step)


def stock_network(config: ModelConfig) -> nn.Sequential:
    """The same network of torch.nn modules, as one would write it: norms over all maps, first tie wins."""
    modules: list[nn.Module] = []
    inputs, groups = 3, (1, config.towers, 1, config.towers, config.towers)
    for i, outputs in enumerate(config.widths):
        left, right, top, bottom = config.padding[i]
        if (left, top) != (right, bottom):
            modules.append(nn.ZeroPad2d((left, right, top, bottom)))
        symmetric = 0 if (left, top) != (right, bottom) else left
        kernel, stride = config.kernel_size[i], config.stride[i]
        modules += [nn.Conv2d(inputs, outputs, kernel, stride, symmetric, groups=groups[i]), nn.ReLU()]
        if i < 2:
            alpha = config.lrn_alpha * config.lrn_size  # nn.LocalResponseNorm divides it
            modules.append(nn.LocalResponseNorm(config.lrn_size, alpha, config.lrn_beta, config.lrn_k))
        if i in (0, 1, 4):
            modules.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        inputs = outputs
    flat = {row.name: row for row in layer_table(config)}["pool5"]
    features, (fc6, fc7) = flat.channels * flat.px**2, config.hidden
    modules += [nn.Flatten(), nn.Linear(features, fc6), nn.ReLU(), nn.Dropout(config.dropout)]
    modules += [nn.Linear(fc6, fc7), nn.ReLU(), nn.Dropout(config.dropout), nn.Linear(fc7, config.classes)]
    return nn.Sequential(*modules)


class Float32Norm(nn.LocalResponseNorm):
    """torch's norm has no bfloat16 kernel on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def bfloat16_weights(net: nn.Sequential, device_type: str = "cpu") -> nn.Sequential:
    """The weights themselves in bfloat16 (on a CPU the norms in float32): the cheapest form that stock modules have."""
    modules = [
        Float32Norm(m.size, m.alpha, m.beta, m.k)
        if isinstance(m, nn.LocalResponseNorm) and device_type == "cpu"
        else m
        for m in net
    ]
    return nn.Sequential(*modules).bfloat16()


def stock_compiled(function: Any) -> Any:
    """A baseline through torch.compile at its best: shapes constant, whatever was compiled before it."""
    return torch.compile(function, dynamic=False)


def stock_step(
    net: nn.Module,
    task: Task,
    tuned: bool,
    autocast: bool = False,
    compiled: bool = False,
    own_input: bool = False,
) -> Callable[[], Tensor]:
    """A step of stock modules: torch's loss and SGD, no `.item()`. Tuned: channels-last and fused SGD."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    device = task.images.device
    net.to(device, memory_format=layout)  # type: ignore[call-overload]

    def given() -> Tensor:
        return (task.images if autocast else task.cast).contiguous(memory_format=layout)

    optimizer = torch.optim.SGD(net.parameters(), RATE, 0.9, weight_decay=5e-4, fused=tuned or None)
    forward, fixed = stock_compiled(net) if compiled else net, given()

    def step() -> Tensor:
        x = given() if own_input else fixed
        optimizer.zero_grad()
        with torch.autocast(device.type, task.dtype, enabled=autocast):
            loss = F.cross_entropy(forward(x).float(), task.labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def stock(task: Task, quick: bool) -> list[Contestant]:
    """Every form of the stock network worth timing: which is the best differs from machine to machine."""

    forms = stock_forms(task.dtype)
    return [stock_named(name, task) for name in (list(forms)[:2] if quick else forms)]


def stock_forms(dtype: torch.dtype) -> dict[str, dict[str, bool]]:
    """By name, how each is made; the first two are usually the best."""
    if dtype == torch.float32:
        return {
            f"stock eager, {TUNED}": {"tuned": True},
            f"stock compiled, {TUNED}": {"tuned": True, "compiled": True},
            "stock eager": {"tuned": False},
            "stock compiled": {"tuned": False, "compiled": True},
        }
    return {
        f"stock eager, bf16 weights, {TUNED}": {"tuned": True, "weights": True},
        f"stock compiled, bf16 weights, {TUNED}": {"tuned": True, "weights": True, "compiled": True},
        "stock eager, autocast": {"tuned": False, "autocast": True},
        f"stock eager, autocast, {TUNED}": {"tuned": True, "autocast": True},
        "stock compiled, autocast": {"tuned": False, "autocast": True, "compiled": True},
        f"stock compiled, autocast, {TUNED}": {"tuned": True, "autocast": True, "compiled": True},
    }


def stock_named(name: str, task: Task) -> Contestant:
    how = dict(stock_forms(task.dtype)[name])
    net = stock_network(task.config)
    if how.pop("weights", False):
        net = bfloat16_weights(net, task.images.device.type)
    return Contestant(name, Kind.baseline, stock_step(net, task, **how))


def torchvision_step(task: Task, compiled: bool) -> Contestant:
    """torchvision's alexnet (one tower, no response norm), tuned; a yardstick of another network."""
    from torchvision.models import alexnet

    net = alexnet(num_classes=task.config.classes).to(task.dtype)
    name = f"torchvision {'compiled' if compiled else 'eager'}, no norm, {TUNED}"
    return Contestant(name, Kind.yardstick, stock_step(net, task, tuned=True, compiled=compiled))


# Largest relative difference (Frobenius norm) of a parameter's gradient: thousands of float32 terms in another order.
TOLERANCE = 1e-4


def check(model: str, backend: str, dtype: str, device: str) -> float:
    """Compares the gradients of two images, without dropout; AssertionError if they are not as they must be.

    In float32 ours with the reference's, and the reference's with the stock net's. In bfloat16 rounding decides
    pooling ties anew, so ours must be no further from float32 than the reference is in bfloat16 (a quarter more, or
    a hundredth, is let pass). Returns the largest difference in float32, or from float32.
    """
    given, exact = task(model, 2, dtype, device), task(model, 2, "float32", device)
    config = replace(given.config, dropout=0.0)
    expected = _our_gradients(config, "reference", exact)
    ours = differences(expected, _our_gradients(config, backend, given))
    if dtype == "float32":
        common = replace(config, lrn_within_tower=False, pool_ties=Ties.first)  # what stock modules can do
        stock = _stock_gradients(common, given)
        ours += differences(_our_gradients(common, "reference", given), stock)
        allowed = [TOLERANCE] * len(ours)
    else:
        rounded = _our_gradients(config, "reference", given)
        allowed = [1.25 * d + 0.01 for d in differences(expected, rounded)]
    wrong = [f"{d:.1e}" for d, limit in zip(ours, allowed, strict=True) if d > limit]
    assert not wrong, f"{model}, {dtype}, {backend}: gradients differ by {', '.join(wrong)}; nothing is timed"
    return max(ours)


def _our_gradients(config: ModelConfig, backend: str, given: Task) -> list[Tensor]:
    device = given.images.device
    choice: Any = backend
    net = AlexNet(config, Backends(default=choice).resolve(device.type), seed=0)
    return _gradients(net.to(device, given.dtype, memory_format=torch.channels_last), given)  # type: ignore[call-overload]


def _stock_gradients(config: ModelConfig, given: Task) -> list[Tensor]:
    net, device = stock_network(config), given.images.device
    weights = AlexNet(config, seed=0).parameters()
    for theirs, ours in zip(net.parameters(), weights, strict=True):
        theirs.data.copy_(ours.data)
    return _gradients(net.to(device), given)


def _gradients(net: nn.Module, given: Task) -> list[Tensor]:
    loss = F.cross_entropy(net(given.cast).float(), given.labels)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def differences(expected: list[Tensor], actual: list[Tensor]) -> list[float]:
    both = [(e.float(), a.float()) for e, a in zip(expected, actual, strict=True)]
    return [float((a - e).detach().norm() / e.detach().norm().clamp(min=1e-12)) for e, a in both]
