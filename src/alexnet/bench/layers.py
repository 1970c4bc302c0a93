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
    parts_of = ["forward", "weight gradient", *(["input gradient"] if name != "conv1" else [])]
    if not any(config.only in f"{name} {part}" for part in parts_of):
        return
    x = noise(config, dtype, config.batch_of(), C, side, side)
    w, b = (
        noise(config, dtype, O, C // groups, kernel, kernel),
        torch.zeros(O, dtype=x.dtype, device=x.device),
    )
    geometry = (stride, stride), sides, groups

    def convolution(x: Tensor, w: Tensor, backend: str) -> Tensor:
        return conv2d(x, w, None, stride, sides, groups=groups, backend=backend)

    ways = partial(convolution, backend="compiled"), partial(convolution, backend="native")
    check = partial(compare, name, *ways, [x[:2], w], dtype) if config.check else None
    ours, library = pair_for("conv2d", "compiled"), pair_for("conv2d", "library")
    assert ours is not None
    assert library is not None
    y, *saved = ours.forward(x, w, b, *geometry)
    dy = torch.randn_like(y)
    asymmetric = sides[0] != sides[1]

    def native() -> Tensor:
        padded = F.pad(x, sides) if asymmetric else x
        return F.conv2d(padded, w, b, stride, 0 if asymmetric else sides[0], 1, groups)

    def kernel_of_the_library(*needs: bool) -> object:
        padded = F.pad(x, sides) if asymmetric else x
        padding = [0, 0] if asymmetric else [sides[2], sides[0]]
        operands = dy, padded, w, [O], [stride] * 2, padding, [1, 1], False, [0, 0], groups, list(needs)
        return torch.ops.aten.convolution_backward(*operands)

    def gradient(*needs: bool) -> object:
        return ours.backward(dy, *saved, *geometry, needs)

    parts: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "forward": (lambda: ours.forward(x, w, b, *geometry), native),
        "weight gradient": (
            lambda: gradient(False, True, False),
            lambda: kernel_of_the_library(False, True, False),
        ),
        "input gradient": (
            lambda: gradient(True, False, False),
            lambda: kernel_of_the_library(True, False, False),
        ),
    }
    macs = {layer.name: layer.macs for layer in layer_table(model_config("paper"))}[name] * len(x)
    bound, rounds = Bound(machine, dtype, 2 * macs), config.interleaved_rounds
    for part in parts_of:
        if config.only in f"{name} {part}":
            mine, theirs = parts[part]
            contestants = [
                Contestant("ours", Kind.ours, mine),
                Contestant("library", Kind.baseline, theirs),
            ]
            row = f"{name} {part}"
            yield from interleave("layers", row, dtype, contestants, rounds, bound=bound, check=check)
