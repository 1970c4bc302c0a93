"""The network: five convolutions, three pools, three fully connected layers (section 3; layers-145.cfg).

    input      3 x 224 x 224    raw pixels minus their mean
    conv1     96 x  55 x  55    11x11 stride 4; block1: response norm and 3x3 stride-2 pooling
              96 x  27 x  27
    conv2    256 x  27 x  27    5x5, two towers; block2: response norm and pooling
             256 x  13 x  13
    conv3    384 x  13 x  13    3x3, both towers
    conv4    384 x  13 x  13    3x3, two towers
    conv5    256 x  13 x  13    3x3, two towers; pool5
             256 x   6 x   6
    fc6, fc7       4096 each    dropout after both
    fc8            classes

`paper` is the text of 2012, `code145` the configuration that really won (layers-145.cfg, layer-params-145.cfg);
every difference between them is one field of ModelConfig. A tower is one of the two GPUs of 2012: a group of
channels that conv2, conv4, conv5 and the response norm never look beyond.

224 is no slip: the 2012 code takes ceil((224 - 11) / 4) + 1 = 55 positions and reads zero outside the image
(layer.py:1004), which is a zero padding of 3 on the right and at the bottom before a valid convolution.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alexnet.cli import compose_group
from alexnet.errors import UserError
from alexnet.layers import (
    Backends,
    Conv2d,
    Dropout,
    Linear,
    LocalResponseNorm,
    MaxPool2d,
    ReLU,
    ReluLrnPool,
    SameMapNorm,
    Tanh,
)
from alexnet.layers.backend import OPERATIONS, convolution_backend
from alexnet.layers.from_file import is_file

CONVOLUTIONS = ("conv1", "conv2", "conv3", "conv4", "conv5")
LAYERS = (*CONVOLUTIONS, "fc6", "fc7", "fc8")
# Inputs of one unit in the network of 2012, per layer: the fan-in that `init=fan_in` scales from.
PAPER_FAN_IN = (363, 1200, 2304, 1728, 1728, 9216, 4096, 4096)


class Activation(StrEnum):
    relu = "relu"
    tanh = "tanh"


class Order(StrEnum):
    """Order inside blocks 1 and 2. `relu` stands for the chosen activation."""

    relu_lrn_pool = "relu_lrn_pool"  # the paper, section 3.3 and 3.5
    lrn_pool_relu = "lrn_pool_relu"  # the 2012 code, block 1


class Init(StrEnum):
    normal = "normal"  # N(0, init_std) as written, whatever the fan-in
    fan_in = "fan_in"  # init_std times sqrt(fan-in of 2012 / ours): keeps the gain when the net is scaled
    he = "he"  # N(0, 2 / fan-in)
    torch = "torch"  # U(+-1/sqrt(fan-in)) for weights and biases: what nn.Conv2d and nn.Linear do


class Ties(StrEnum):
    first = "first"  # torch, Caffe: the first maximum of a window gets the gradient
    all = "all"  # 2012: every tied maximum gets all of it


class DropoutMode(StrEnum):
    mask_only = "mask_only"  # 2012: mask in training, times 1 - p in evaluation
    inverted = "inverted"  # torch: mask and 1 / (1 - p) in training, nothing in evaluation


@dataclass
class ModelConfig:
    """Every switch of the architecture. The defaults are the paper's; where it is silent, the 2012 code's."""

    # Classes; None: as many as the data set has, and the 1000 of ILSVRC where there is no data set.
    num_classes: int | None = None
    # Side of the square the network sees, in pixels (the crop).
    image_px: int = 224
    # Output channels of conv1 .. conv5 (section 3.5) and units of fc6, fc7.
    channels: list[int] = field(default_factory=lambda: [96, 256, 384, 384, 256])
    hidden: list[int] = field(default_factory=lambda: [4096, 4096])
    # Multiplies `channels` (not `hidden`).
    width: float = 1.0
    kernel_size: list[int] = field(default_factory=lambda: [11, 5, 3, 3, 3])
    stride: list[int] = field(default_factory=lambda: [4, 1, 1, 1, 1])
    # (left, right, top, bottom) zeros for conv1 .. conv5; conv1's 3 right and bottom are the ceil rule of 2012.
    padding: list[list[int]] = field(
        default_factory=lambda: [[0, 3, 0, 3], [2, 2, 2, 2], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    )
    # Towers of conv2, conv4 and conv5 (section 3.2: two GPUs); 1 is one dense column.
    towers: int = 2
    # False: the response norm sees all channels, as in Caffe. True: those of its own tower (layers-145.cfg:35-45).
    lrn_within_tower: bool = True
    # Depth (section 7: removing any middle layer costs about 2 %).
    conv3: bool = True
    conv4: bool = True
    conv5: bool = True
    activation: Activation = Activation.relu
    order1: Order = Order.relu_lrn_pool
    order2: Order = Order.relu_lrn_pool
    # Response norm after conv1 and conv2 (section 3.3), and the 5x5 same-map norm of the code after conv2's
    # (layers-145.cfg:107-117), which the paper does not mention.
    norm1: bool = True
    norm2: bool = True
    same_map_norm: bool = False
    lrn_size: int = 5
    lrn_k: float = 2.0
    lrn_alpha: float = 1e-4
    lrn_beta: float = 0.75
    # The code divides alpha by the window's size (layer.py:1183), and so does torch; the paper's formula does not.
    lrn_alpha_divided: bool = False
    # Pooling (section 3.4: overlapping, size 3 stride 2), rounded up in 2012.
    pool_size: int = 3
    pool_stride: int = 2
    pool_ceil: bool = True
    pool_ties: Ties = Ties.all
    # Initialisation (section 5), conv1 .. conv5, fc6 .. fc8.
    init: Init = Init.normal
    init_std: list[float] = field(default_factory=lambda: [0.01] * 8)
    init_bias: list[float] = field(default_factory=lambda: [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    # Dropout (section 4.2) after fc6 and fc7, or (torchvision) before them.
    dropout: float = 0.5
    dropout_mode: DropoutMode = DropoutMode.mask_only
    dropout_before: bool = False

    def __post_init__(self) -> None:
        _check_lengths(self)
        _check_ranges(self)

    @property
    def classes(self) -> int:
        return 1000 if self.num_classes is None else self.num_classes

    @property
    def widths(self) -> list[int]:
        """Output channels of conv1 .. conv5 after `width`, each a multiple of the towers."""
        return [max(1, round(c * self.width / self.towers)) * self.towers for c in self.channels]

    @property
    def kept(self) -> list[bool]:
        """Which of conv1 .. conv5 exist."""
        return [True, True, self.conv3, self.conv4, self.conv5]


def _check_lengths(config: ModelConfig) -> None:
    lengths = {
        "channels": 5,
        "kernel_size": 5,
        "stride": 5,
        "padding": 5,
        "hidden": 2,
        "init_std": 8,
        "init_bias": 8,
    }
    for name, length in lengths.items():
        value = getattr(config, name)
        if len(value) != length:
            raise UserError(f"model.{name}={value} must have {length} entries, not {len(value)}")
    for entry in config.padding:
        if len(entry) != 4:
            raise UserError(f"model.padding: {entry} must be four numbers, (left, right, top, bottom)")


def _check_ranges(config: ModelConfig) -> None:
    if config.classes < 2:
        raise UserError(f"model.num_classes={config.num_classes} must be at least 2")
    if config.towers < 1:
        raise UserError(f"model.towers={config.towers} must be a positive integer: 2 (two GPUs of 2012) or 1")
    for name in ("channels", "kernel_size", "stride", "hidden"):
        if min(getattr(config, name)) < 1:
            raise UserError(f"model.{name}={getattr(config, name)}: every entry must be a positive integer")
    for left, right, top, bottom in config.padding:
        if min(left, right, top, bottom) < 0 or left + right != top + bottom:
            raise UserError(
                f"model.padding: [{left}, {right}, {top}, {bottom}] (left, right, top, bottom) must not be negative, "
                "and left + right must equal top + bottom, so that maps stay square"
            )
    if min(config.init_std) < 0:
        raise UserError(f"model.init_std={config.init_std}: no standard deviation may be negative")
    if config.lrn_size < 1 or config.lrn_k <= 0 or config.lrn_alpha < 0:
        raise UserError(
            f"model.lrn_size={config.lrn_size} must be a positive integer, model.lrn_k={config.lrn_k} positive and "
            f"model.lrn_alpha={config.lrn_alpha} not negative"
        )
    if min(config.pool_size, config.pool_stride) < 1:
        raise UserError(
            f"model.pool_size={config.pool_size} and model.pool_stride={config.pool_stride} must be positive integers"
        )
    if config.width <= 0:
        raise UserError(f"model.width={config.width} must be positive")
    if not 0 <= config.dropout < 1:
        raise UserError(f"model.dropout={config.dropout} must be in [0, 1)")


class Row(NamedTuple):
    """One layer of the network, by arithmetic."""

    name: str
    channels: int
    px: int  # side of its output
    parameters: int
    macs: int  # multiply-adds for one image, biases not counted


def layer_table(config: ModelConfig) -> list[Row]:
    """Shapes, parameters and multiply-adds of every layer, pools included.

    Raises UserError when the image is too small for the kernels and pools.
    """
    rows: list[Row] = []
    channels, px = 3, config.image_px
    for i, name in enumerate(CONVOLUTIONS):
        if config.kept[i]:
            px = _convolved(px, config, i)
            weights = config.widths[i] * channels // _groups(config, i) * config.kernel_size[i] ** 2
            channels = config.widths[i]
            rows.append(Row(name, channels, px, weights + channels, weights * max(px, 0) ** 2))
        if name in ("conv1", "conv2", "conv5"):
            px = _pooled(px, config)
            rows.append(Row(f"pool{name[-1]}", channels, px, 0, 0))
        if px < 1:
            raise UserError(_too_small(config, rows[-1].name))
    inputs = channels * px * px
    for name, outputs in zip(LAYERS[5:], (*config.hidden, config.classes), strict=True):
        rows.append(Row(name, outputs, 1, inputs * outputs + outputs, inputs * outputs))
        inputs = outputs
    return rows


def check_memory(rows: Iterable[Row]) -> None:
    """Raises UserError where weights, gradients and velocities in float32 exceed the memory of this machine."""
    parameters = sum(row.parameters for row in rows)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 3 * 4 * parameters > memory:
        raise UserError(
            f"{parameters:,} parameters take {12e-9 * parameters:,.0f} GB with gradients and velocities, and this "
            f"machine has {1e-9 * memory:,.0f} GB: lower model.width, model.channels or model.hidden"
        )


def _convolved(px: int, config: ModelConfig, i: int) -> int:
    left, right, *_ = config.padding[i]
    return (px + left + right - config.kernel_size[i]) // config.stride[i] + 1


def _pooled(px: int, config: ModelConfig) -> int:
    """torch's rule, which is the 2012 rule wherever windows overlap: the last window starts inside."""
    size, stride = config.pool_size, config.pool_stride
    out = math.ceil((px - size) / stride) + 1 if config.pool_ceil else (px - size) // stride + 1
    return out - 1 if (out - 1) * stride >= px else out


def _groups(config: ModelConfig, i: int) -> int:
    # conv1 sees the image and conv3 sees both towers (section 3.5, layers-145.cfg:135).
    return config.towers if CONVOLUTIONS[i] in ("conv2", "conv4", "conv5") else 1


def _too_small(config: ModelConfig, where: str) -> str:
    return (
        f"model.image_px={config.image_px} is too small: nothing is left after {where}. "
        "Use model=tiny or model=mini (56 pixels), or larger images"
    )


class AlexNet(nn.Module):
    """The network of one ModelConfig. (N, 3, image_px, image_px) -> logits (N, num_classes).

    `backends` is {operation: backend} as `Backends.resolve` returns it; parameters and their names do not depend
    on it. `seed` fixes the initial weights (each drawn from (seed, its name)); without one, torch's generator does.

    Raises UserError for an image too small for the kernels.
    """

    def __init__(
        self,
        config: ModelConfig | None = None,
        backends: Mapping[str, str] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        config = config or ModelConfig()
        backends = backends if backends is not None else Backends().resolve("cpu")
        rows = layer_table(config)
        if torch.get_default_device().type == "cpu":
            check_memory(rows)
        table = {row.name: row for row in rows}
        self.config = config
        self.backends = dict(backends)
        self.conv1 = _convolution(config, 0, 3, backends)
        self.block1 = _block(config, 1, backends)
        self.conv2 = _convolution(config, 1, config.widths[0], backends)
        self.block2 = _block(config, 2, backends)
        channels = config.widths[1]
        for i in (2, 3, 4):
            if config.kept[i]:
                setattr(self, CONVOLUTIONS[i], _convolution(config, i, channels, backends))
                channels = config.widths[i]
        self.activation = _activation(config, backends)
        self.pool5 = _pool(config, backends)
        self.fc6 = Linear(channels * table["pool5"].px ** 2, config.hidden[0], backend=backends["linear"])
        self.fc7 = Linear(config.hidden[0], config.hidden[1], backend=backends["linear"])
        self.fc8 = Linear(config.hidden[1], config.classes, backend=backends["linear"])
        self.dropout = Dropout(config.dropout, mode=config.dropout_mode, backend=backends["dropout"])
        initialise(self, config, seed)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        backends: Mapping[str, str] | None = None,
        seed: int | None = None,
        **changes: Any,
    ) -> "AlexNet":
        """The network of conf/model/<preset>.yaml; `changes` are fields of ModelConfig, e.g. num_classes=200.

        Raises UserError for a preset or a field that does not exist, or a value of another type.
        """
        return cls(compose_group("model", preset, ModelConfig, changes), backends, seed)

    @property
    def operations(self) -> set[str]:
        """What its layers compute; the file of a layer is named after its operation."""
        return {type(layer).__module__.rpartition(".")[2] for layer in self.modules()} & set(OPERATIONS)

    def forward(self, x: Tensor, dropout_key: Tensor | int | None = None, first_row: int = 0) -> Tensor:
        """`dropout_key` names this step's masks, `first_row` this batch's place in the global batch."""
        return self.fc8(self.last_hidden(self.features(x), dropout_key, first_row))

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, image_px, image_px) -> pool5 (N, C, 6, 6) for the paper's sizes. UserError for other images."""
        px = self.config.image_px
        if tuple(x.shape[1:]) != (3, px, px):
            raise UserError(
                f"images {tuple(x.shape)} do not fit model.image_px={px}: give (N, 3, {px}, {px}), or build the "
                "network with their size"
            )
        x = self.block1(self.conv1(x))
        x = self.block2(self.conv2(x))
        for name in ("conv3", "conv4", "conv5"):
            if hasattr(self, name):
                x = self.activation(getattr(self, name)(x))
        return self.pool5(x)

    def last_hidden(
        self, features: Tensor, dropout_key: Tensor | int | None = None, first_row: int = 0
    ) -> Tensor:
        """pool5 -> the last hidden layer (N, hidden[1]), what section 6.1 compares images by."""

        def drop(x: Tensor, layer: int) -> Tensor:
            key = None if dropout_key is None else dropout_key + layer
            return self.dropout(x, key=key, first_row=first_row)

        x = features.flatten(1)
        if self.config.dropout_before:
            x = self.activation(self.fc6(drop(x, 6)))
            return self.activation(self.fc7(drop(x, 7)))
        x = drop(self.activation(self.fc6(x)), 6)
        return drop(self.activation(self.fc7(x)), 7)


def _convolution(config: ModelConfig, i: int, inputs: int, backends: Mapping[str, str]) -> Conv2d:
    return Conv2d(
        inputs,
        config.widths[i],
        config.kernel_size[i],
        stride=config.stride[i],
        padding=_sides(config.padding[i]),
        groups=_groups(config, i),
        backend=convolution_backend(backends, config.kernel_size[i], _groups(config, i)),
    )


def _sides(padding: list[int]) -> tuple[int, int, int, int]:
    left, right, top, bottom = padding
    return left, right, top, bottom


def _activation(config: ModelConfig, backends: Mapping[str, str]) -> nn.Module:
    if config.activation == Activation.tanh:
        return Tanh(backend=backends["tanh"])
    return ReLU(backend=backends["relu"])


def _pool(config: ModelConfig, backends: Mapping[str, str]) -> MaxPool2d:
    return MaxPool2d(
        config.pool_size,
        config.pool_stride,
        ceil_mode=config.pool_ceil,
        ties=config.pool_ties,
        backend=backends["max_pool2d"],
    )


def _block(config: ModelConfig, block: int, backends: Mapping[str, str]) -> nn.Module:
    """What stands between conv1 and conv2, or conv2 and conv3: activation, norms, pooling in their order."""
    order = config.order1 if block == 1 else config.order2
    norm = config.norm1 if block == 1 else config.norm2
    same_map = config.same_map_norm and block == 2
    alpha = config.lrn_alpha if config.lrn_alpha_divided else config.lrn_alpha * config.lrn_size
    lrn = (config.lrn_size, alpha, config.lrn_beta, config.lrn_k)
    groups = config.towers if config.lrn_within_tower else 1
    # A reader's own ReLU, norm or pool needs them one by one: the same numbers, in more passes over memory.
    own = any(is_file(backends[part]) for part in ("relu", "local_response_norm", "max_pool2d"))
    if norm and not same_map and not own and config.activation == Activation.relu:
        return ReluLrnPool(
            *lrn,
            config.pool_size,
            config.pool_stride,
            ceil_mode=config.pool_ceil,
            order=order,
            groups=groups,
            ties=config.pool_ties,
            backend=backends["relu_lrn_pool"],
        )
    norms: list[nn.Module] = []
    if norm:
        norms.append(LocalResponseNorm(*lrn, groups=groups, backend=backends["local_response_norm"]))
    if (
        same_map
    ):  # size 5, scale .001 / 25, k = 1: layers-145.cfg:107-117, layer-params-145.cfg, layer.cu:1569
        norms.append(SameMapNorm(5, 1e-3, 0.75, 1.0, backend=backends["same_map_norm"]))
    activation, pool = _activation(config, backends), _pool(config, backends)
    if order == Order.relu_lrn_pool:
        return nn.Sequential(activation, *norms, pool)
    return nn.Sequential(*norms, pool, activation)


@torch.no_grad()
def initialise(model: AlexNet, config: ModelConfig, seed: int | None = None) -> None:
    """Draws every weight from (seed, its name) and sets the biases, so that two networks which share a layer
    start from the same layer (section 5; layers-145.cfg initW, initB)."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    for i, name in enumerate(LAYERS):
        layer = getattr(model, name, None)
        if layer is None:
            continue
        fan_in = layer.weight[0].numel()
        if config.init == Init.torch:
            bound = fan_in**-0.5
            layer.weight.uniform_(-bound, bound, generator=_generator(seed, f"{name}.weight"))
            layer.bias.uniform_(-bound, bound, generator=_generator(seed, f"{name}.bias"))
        else:
            std = initial_std(config, i, fan_in)
            layer.weight.normal_(0.0, std, generator=_generator(seed, f"{name}.weight"))
            layer.bias.fill_(config.init_bias[i])


def initial_std(config: ModelConfig, i: int, fan_in: int) -> float:
    """The standard deviation of the weights of layer i, conv1 .. fc8, with fan_in inputs a unit."""
    if config.init == Init.he:
        return (2.0 / fan_in) ** 0.5
    if config.init == Init.fan_in:
        return config.init_std[i] * (PAPER_FAN_IN[i] / fan_in) ** 0.5
    return config.init_std[i]


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
