"""The networks that compete: ours, the same of stock modules, and torchvision's, each with a training step."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.bench.timing import Contestant, Kind
from alexnet.cli import compose_group
from alexnet.layers import Backend, Backends, SameMapNorm, cross_entropy
from alexnet.model import AlexNet, ModelConfig, Order, layer_table
from alexnet.optim import OptimConfig, parameter_groups
from alexnet.training.capture import CudaGraphs
from alexnet.training.master_weights import FusedKrizhevsky, WorkingCopies

CLASSES = 1000
RATE = 1e-6  # so small that a hundred steps on noise do no harm
TUNED = "channels-last, fused SGD"

# How tensors are held, by the name of a precision (system.set_precision says how they are multiplied).
TYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
TRITON_NORMS = "fastest, triton norms"


@cache
def model_config(model: str) -> ModelConfig:
    """conf/model/<model>.yaml, with 1000 classes."""
    return compose_group("model", model, ModelConfig, {"num_classes": CLASSES})


def backends_named(name: str, device_type: str) -> dict[str, str]:
    """The backend of each operation: a backend's own name, or TRITON_NORMS."""
    choices: dict[str, Any] = {"default": name}
    if name == TRITON_NORMS:
        choices = {"default": "fastest", "relu_lrn_pool": "triton", "local_response_norm": "triton"}
    return Backends(**choices).resolve(device_type)


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

    @cached_property
    def first_graph(self) -> torch.cuda.CUDAGraph:
        """It keeps the pool of all graphs alive, also where a capture fails."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.labels.clone()
        return graph


def task(model: str, batch: int, dtype: str, device: str) -> Task:
    config = model_config(model)
    generator = torch.Generator().manual_seed(0)
    images = 50 * torch.randn(batch, 3, config.image_px, config.image_px, generator=generator)
    labels = torch.randint(config.classes, (batch,), generator=generator)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return Task(config, images, labels.to(device), TYPES[dtype])


def multiply_adds(config: ModelConfig) -> float:
    """Of one image in a training step: forward, and two products as large backward; conv1 has no input gradient."""
    macs = {row.name: row.macs for row in layer_table(config)}
    return 3 * sum(macs.values()) - macs["conv1"]


def ours(task: Task, backend: str, own_input: bool = False) -> Contestant:
    """Our network and update: float32, or bfloat16 working copies of float32 master weights.

    own_input: the caller puts a new batch into the task before each step, and its cast is part of the step.
    """
    device = task.images.device
    net = AlexNet(task.config, backends_named(backend, device.type), seed=0)
    net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    copies = None if task.dtype == torch.float32 else WorkingCopies(net, task.dtype)
    optimizer = FusedKrizhevsky(parameter_groups(net, OptimConfig(lr=RATE)), copies, lr=RATE)
    forward, cast, key = copies or net, task.cast, torch.tensor(7, device=device)

    def step() -> Tensor:
        x = task.cast if own_input else cast
        optimizer.zero_grad()
        loss = cross_entropy(forward(x, key), task.labels, backend=net.backends["cross_entropy"])
        loss.backward()
        optimizer.step()
        return loss.detach()

    # torch's own operators under autograd: nothing of the mathematics is ours.
    return Contestant(backend, Kind.baseline if backend == Backend.native else Kind.ours, step)


def stock_network(config: ModelConfig) -> nn.Sequential:
    """The same network of torch.nn modules, as one would write it: norms over all maps, first tie wins."""
    modules: list[nn.Module] = []
    # nn.LocalResponseNorm divides alpha.
    alpha = config.lrn_alpha * (1 if config.lrn_alpha_divided else config.lrn_size)
    inputs, groups = 3, (1, config.towers, 1, config.towers, config.towers)
    for i, outputs in enumerate(config.widths):
        left, right, top, bottom = config.padding[i]
        padding, kernel, stride = left, config.kernel_size[i], config.stride[i]
        if (left, top) != (right, bottom):
            modules.append(nn.ZeroPad2d((left, right, top, bottom)))
            padding = 0
        modules.append(nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups[i]))
        inputs = outputs
        block: list[nn.Module] = []
        if i < 2:
            block.append(nn.LocalResponseNorm(config.lrn_size, alpha, config.lrn_beta, config.lrn_k))
        if i == 1 and config.same_map_norm:
            # torch has no such module: its mean pooling, squared and divided by.
            block.append(SameMapNorm(5, 1e-3, 0.75, 1.0, backend=Backend.native))
        if i in (0, 1, 4):
            block.append(nn.MaxPool2d(3, 2, ceil_mode=True))
        relu_first = i >= 2 or (config.order1, config.order2)[i] == Order.relu_lrn_pool
        modules += [nn.ReLU(), *block] if relu_first else [*block, nn.ReLU()]
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
    modules = list(net)
    for i, m in enumerate(modules):
        if isinstance(m, nn.LocalResponseNorm) and device_type == "cpu":
            modules[i] = Float32Norm(m.size, m.alpha, m.beta, m.k)
    return nn.Sequential(*modules).bfloat16()


def stock_compiled(function: Any, mode: str | None = None) -> Any:
    """A baseline through torch.compile at its best: one graph, shapes constant, whatever was compiled before it."""
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def stock_step(
    net: nn.Module,
    task: Task,
    tuned: bool,
    autocast: bool = False,
    compiled: bool = False,
    own_input: bool = False,
    mode: str | None = None,
) -> Callable[[], Tensor]:
    """A step of stock modules: torch's loss and SGD, no `.item()`. Tuned: channels-last and fused SGD."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    device = task.images.device
    net.to(device, memory_format=layout)  # type: ignore[call-overload]

    def given() -> Tensor:
        return (task.images if autocast else task.cast).contiguous(memory_format=layout)

    optimizer = torch.optim.SGD(net.parameters(), RATE, 0.9, weight_decay=5e-4, fused=tuned or None)
    forward, fixed = stock_compiled(net, mode) if compiled else net, given()

    def step() -> Tensor:
        x = given() if own_input else fixed
        optimizer.zero_grad()
        with torch.autocast(device.type, task.dtype, enabled=autocast):
            loss = F.cross_entropy(forward(x).float(), task.labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


# Every form of the stock network worth timing: the best differs by machine, and is usually one of the first two.
STOCK = {
    torch.float32: (
        f"stock eager, {TUNED}",
        f"stock compiled, {TUNED}",
        "stock eager",
        "stock compiled",
    ),
    torch.bfloat16: (
        f"stock eager, bf16 weights, {TUNED}",
        f"stock compiled, bf16 weights, {TUNED}",
        "stock eager, autocast",
        f"stock eager, autocast, {TUNED}",
        "stock compiled, autocast",
        f"stock compiled, autocast, {TUNED}",
    ),
}
# torch.compile's own forms for a GPU, both replayed as CUDA graphs, forward and backward apart.
MODES = ("reduce-overhead", "max-autotune")


def stock_named(name: str, task: Task) -> Contestant:
    """The stock network as its name says: one of STOCK, or a compiled one with ", <mode>" behind it."""
    net = stock_network(task.config)
    if "bf16 weights" in name:
        net = bfloat16_weights(net, task.images.device.type)
    how = {"tuned": TUNED in name, "autocast": "autocast" in name, "compiled": "compiled" in name}
    mode = next((mode for mode in MODES if name.endswith(mode)), None)
    return Contestant(name, Kind.baseline, stock_step(net, task, mode=mode, **how))


def torchvision_named(name: str, task: Task) -> Contestant:
    """torchvision's alexnet (one tower, no response norm), tuned; a yardstick of another network.

    It gets images of 224 pixels, as many as the others get: smaller ones do not last to its third pool.
    """
    from torchvision.models import alexnet

    net = alexnet(num_classes=task.config.classes).to(task.dtype)
    task = replace(task, images=torch.randn(len(task.images), 3, 224, 224, device=task.images.device))
    return Contestant(name, Kind.yardstick, stock_step(net, task, tuned=True, compiled="compiled" in name))


CAPTURED = ", captured"
LIBRARY_CHOOSES = ", cudnn.benchmark"


def contestant_named(name: str, given: Task) -> Contestant:
    """The contestant of that name; with CAPTURED behind it, its step as one CUDA graph."""
    plain = name.removesuffix(CAPTURED)
    if plain.startswith("torchvision"):
        made = torchvision_named(plain, given)
    else:
        made = stock_named(plain, given) if plain.startswith("stock") else ours(given, plain)
    return Contestant(name, made.kind, captured(made.run, given) if name != plain else made.run)


def captured(step: Callable[[], Any], given: Task) -> Callable[[], object]:
    """The step as one CUDA graph, made at the first call. Its inputs must stay where they are in memory.

    All graphs of a task share one pool of memory: one step at a time runs, and nobody reads its results.
    """

    @cache
    def recorded() -> Callable[[], object]:
        graphs = CudaGraphs(given.images.device, given.first_graph.pool())
        for _ in range(3):  # compiles, makes the optimiser's state, lets libraries allocate
            graphs.warm_up(step)
        return graphs.record(step)

    return lambda: recorded()()
