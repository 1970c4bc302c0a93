"""Suite `layers`: the response norm, the block, and each convolution, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.bench.check import clear_windows, compare
from alexnet.bench.config import Benchmark
from alexnet.bench.networks import TYPES, model_config, stock_compiled
from alexnet.bench.timing import Bound, Contestant, Kind, Machine, Row, interleave
from alexnet.layers import LocalResponseNorm, ReluLrnPool, conv2d
from alexnet.layers.backend import pair_for
from alexnet.model import layer_table

NORM = 5, 5e-4, 0.75, 2.0  # the paper's, alpha times the window
# (C, side, towers) where the paper's norms stand, and the parts of a tensor that the fused work must move: LRN
# reads x, writes y, then reads dy and x and writes dx; the block writes and reads a quarter of it between.
SHAPES = ((96, 55), (256, 27))
NORM_MOVES, BLOCK_MOVES = 5.0, 3.5

# conv1 .. conv5 of `paper`: C, O, input side, kernel, stride, (left, right, top, bottom), groups.
CONVOLUTIONS = {
    "conv1": (3, 96, 224, 11, 4, (0, 3, 0, 3), 1),
    "conv2": (96, 256, 27, 5, 1, (2, 2, 2, 2), 2),
    "conv3": (256, 384, 13, 3, 1, (1, 1, 1, 1), 1),
    "conv4": (384, 384, 13, 3, 1, (1, 1, 1, 1), 2),
    "conv5": (384, 256, 13, 3, 1, (1, 1, 1, 1), 2),
}
# What is timed of each, and which gradients (of x, w, b) it needs; none is the forward.
GRADIENTS: dict[str, tuple[bool, ...]] = {
    "forward": (),
    "weight gradient": (False, True, False),
    "input gradient": (True, False, False),
}


def rows(config: Benchmark, machine: Machine) -> Iterator[Row]:
    for dtype in config.dtypes:
        for channels, side in SHAPES[:1] if config.quick else SHAPES:
            yield from norm_rows(config, machine, dtype, channels, side, config.batch_of())
        for name in CONVOLUTIONS if dtype != "float32" or not config.quick else ():
            yield from _convolution_rows(config, machine, dtype, name)


def noise(config: Benchmark, dtype: str, *shape: int) -> Tensor:
    """Standard normals, channels-last."""
    x = torch.randn(*shape, device=config.device).to(TYPES[dtype])
    return x.contiguous(memory_format=torch.channels_last)


def both_ways(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """The function and its gradient, for a fixed cotangent."""
    leaf = x.detach().requires_grad_()
    dy: list[Tensor] = []

    def run() -> object:
        y = function(leaf)
        if not dy:
            dy.append(torch.randn_like(y))
        return torch.autograd.grad(y, leaf, dy[0])

    return run


def norm_rows(
    config: Benchmark, machine: Machine, dtype: str, channels: int, side: int, batch: int
) -> Iterator[Row]:
    """Response norm and block, both ways. On CUDA the Triton pairs run beside the compiled ones."""
    x = 10 * noise(config, dtype, batch, channels, side, side)
    shape = f"({len(x)},{channels},{side},{side})"
    on_cpu = config.device == "cpu"
    # torch's norm has no bfloat16 kernel on a CPU.
    wide = dtype == "bfloat16" and on_cpu
    backends = ("compiled",) if on_cpu else ("compiled", "triton")
    layouts = {"": x} if config.quick else {"": x, ", NCHW": x.contiguous()}

    def norm(x: Tensor) -> Tensor:
        return F.local_response_norm(x, *NORM)

    def block(x: Tensor) -> Tensor:
        a = F.relu(x)
        b = norm(a.float()).to(a.dtype) if wide else norm(a)
        return F.max_pool2d(b, 3, 2, ceil_mode=True)

    for name, layer, theirs, moves in (
        ("response norm", LocalResponseNorm, norm, NORM_MOVES),
        ("ReLU + norm + pool", ReluLrnPool, block, BLOCK_MOVES),
    ):
        row = f"{name} {shape}"
        if config.only not in row:
            continue
        ours = {backend: layer(*NORM, backend=backend) for backend in backends}
        contestants = [Contestant(f"{b} pair", Kind.ours, both_ways(mine, x)) for b, mine in ours.items()]
        how = " (norm in float32)" if wide and theirs is block else ""
        for layout, given in layouts.items():
            eager, compiled = both_ways(theirs, given), both_ways(stock_compiled(theirs), given)
            contestants.append(Contestant(f"stock eager{how}{layout}", Kind.baseline, eager))
            contestants.append(Contestant(f"stock compiled{how}{layout}", Kind.baseline, compiled))
        contestants.append(Contestant("copy", Kind.yardstick, x.clone))
        check = partial(_check_norms, row, ours, layer(*NORM, backend="native"), 3 * x[:2], dtype)
        bound, rounds = Bound(machine, "copy", moves * x.nbytes), config.interleaved_rounds
        yield from interleave(
            "layers", row, dtype, contestants, rounds, bound=bound, check=check if config.check else None
        )


def _check_norms(row: str, ours: dict[str, Any], native: Any, x: Tensor, dtype: str) -> None:
    """x so large that the norm's second term matters."""
    for backend, mine in ours.items():
        clear = clear_windows(mine, x.float()) if isinstance(mine, ReluLrnPool) else None
        compare(f"{row}, {backend}", mine, native, [x], dtype, clear)


def _convolution_rows(config: Benchmark, machine: Machine, dtype: str, name: str) -> Iterator[Row]:
    C, O, side, kernel, stride, sides, groups = CONVOLUTIONS[name]  # noqa: E741
    # Nobody needs the gradient of the image.
    parts = [part for part in GRADIENTS if part != "input gradient" or name != "conv1"]
    parts = [part for part in parts if config.only in f"{name} {part}"]
    if not parts:
        return
    x = noise(config, dtype, config.batch_of(), C, side, side)
    w = noise(config, dtype, O, C // groups, kernel, kernel)
    b, geometry = torch.zeros(O).to(w), ((stride, stride), sides, groups)

    def convolution(x: Tensor, w: Tensor, backend: str) -> Tensor:
        return conv2d(x, w, None, stride, sides, groups=groups, backend=backend)

    ways = partial(convolution, backend="compiled"), partial(convolution, backend="native")
    check = partial(compare, name, *ways, [x[:2], w], dtype) if config.check else None
    ours = pair_for("conv2d", "compiled")
    assert ours is not None
    y, *saved = ours.forward(x, w, b, *geometry)
    dy = torch.randn_like(y)
    # The library pads alike on both sides; what is more is part of its work.
    padding = [sides[2], sides[0]] if sides[0] == sides[1] else [0, 0]

    def padded() -> Tensor:
        return x if sides[0] == sides[1] else F.pad(x, sides)

    def mine(needs: tuple[bool, ...]) -> object:
        return ours.backward(dy, *saved, *geometry, needs) if needs else ours.forward(x, w, b, *geometry)

    def theirs(needs: tuple[bool, ...]) -> object:
        if not needs:
            return F.conv2d(padded(), w, b, stride, padding, 1, groups)
        operands = dy, padded(), w, [O], [stride] * 2, padding, [1, 1], False, [0, 0], groups
        return torch.ops.aten.convolution_backward(*operands, list(needs))

    macs = {layer.name: layer.macs for layer in layer_table(model_config("paper"))}[name] * len(x)
    bound, rounds = Bound(machine, dtype, 2 * macs), config.interleaved_rounds
    for part in parts:
        contestants = [
            Contestant("ours", Kind.ours, partial(mine, GRADIENTS[part])),
            Contestant("library", Kind.baseline, partial(theirs, GRADIENTS[part])),
        ]
        row = f"{name} {part}"
        yield from interleave("layers", row, dtype, contestants, rounds, bound=bound, check=check)
