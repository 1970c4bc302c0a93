"""Suite `layers`: the response norm, the block, and each convolution, forward and backward."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.bench import Benchmark
from alexnet.bench.networks import differences, model_config, stock_compiled
from alexnet.bench.timing import Contestant, Kind, Machine, Row, interleave
from alexnet.layers import conv2d, local_response_norm, relu_lrn_pool
from alexnet.layers.backend import pair_for

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
            yield from _norm_rows(config, machine, dtype, channels, side)
        for name in CONVOLUTIONS if dtype != "float32" or not config.quick else ():
            yield from _convolution_rows(config, machine, dtype, name)


def noise(config: Benchmark, dtype: str, *shape: int) -> Tensor:
    """Standard normals, channels-last."""
    x = torch.randn(*shape, device=config.device).to(getattr(torch, dtype))
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


def check_layer(row: str, function: Callable[..., Tensor], *operands: Tensor) -> None:
    """AssertionError unless `function(*operands, backend="compiled")` and its gradients are torch's own in float32.

    A hundredth of the norm is let pass, which a few pooling winners take that rounding decides anew, and in bfloat16
    a quarter more than the reference is off.
    """

    def outcome(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in operands]
        y = function(*leaves, backend=backend)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    dtype, exact = operands[0].dtype, outcome("native", torch.float32)
    allowed = [1.25 * d + 0.01 for d in differences(exact, outcome("reference", dtype))]
    off = differences(exact, outcome("compiled", dtype))
    wrong = [f"{d:.1e}" for d, limit in zip(off, allowed, strict=True) if not d <= limit]
    assert not wrong, f"{row}, {dtype}: output or gradients differ by {', '.join(wrong)}; nothing is timed"


def _norm_rows(config: Benchmark, machine: Machine, dtype: str, channels: int, side: int) -> Iterator[Row]:
    x = 10 * noise(config, dtype, config.batch_of(), channels, side, side)
    shape = f"({len(x)},{channels},{side},{side})"
    copy = Contestant("copy", Kind.yardstick, x.clone)
    # torch's norm has no bfloat16 kernel on a CPU.
    wide = dtype != "float32" and config.device == "cpu"
    layouts = {"": x} if config.quick else {"": x, ", NCHW": x.contiguous()}

    def norm(x: Tensor) -> Tensor:
        return F.local_response_norm(x, *NORM)

    def block(x: Tensor) -> Tensor:
        a = F.relu(x)
        b = norm(a.float()).to(a.dtype) if wide else norm(a)
        return F.max_pool2d(b, 3, 2, ceil_mode=True)

    def our_norm(x: Tensor, backend: str = "compiled") -> Tensor:
        return local_response_norm(x, *NORM, backend=backend)

    def our_block(x: Tensor, backend: str = "compiled") -> Tensor:
        return relu_lrn_pool(x, *NORM, backend=backend)

    for name, mine, theirs, moves in (
        ("response norm", our_norm, norm, NORM_MOVES),
        ("ReLU + norm + pool", our_block, block, BLOCK_MOVES),
    ):
        row = f"{name} {shape}"
        if config.only not in row:
            continue
        how = " (norm in float32)" if wide and theirs is block else ""
        contestants = [Contestant("compiled pair", Kind.ours, both_ways(mine, x))]
        for layout, given in layouts.items():
            eager, compiled = both_ways(theirs, given), both_ways(stock_compiled(theirs), given)
            contestants.append(Contestant(f"stock eager{how}{layout}", Kind.baseline, eager))
            contestants.append(Contestant(f"stock compiled{how}{layout}", Kind.baseline, compiled))
        bound = machine.move_ms(moves * x.nbytes)
        rounds = config.interleaved_rounds
        # So large that the norm's second term matters.
        check = partial(check_layer, row, mine, 30 * x[:2])
        yield from interleave("layers", row, dtype, [*contestants, copy], rounds, bound_ms=bound, check=check)


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

    check = partial(check_layer, name, convolution, x[:2], w)
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
    macs = {layer.name: layer.macs for layer in _paper_layers()}[name] * len(x)
    bound, rounds = machine.multiply_ms(macs, dtype), config.interleaved_rounds
    for part in parts_of:
        if config.only in f"{name} {part}":
            mine, theirs = parts[part]
            contestants = [
                Contestant("ours", Kind.ours, mine),
                Contestant("library", Kind.baseline, theirs),
            ]
            row = f"{name} {part}"
            yield from interleave("layers", row, dtype, contestants, rounds, bound_ms=bound, check=check)


def _paper_layers() -> list:
    from alexnet.model import layer_table

    return layer_table(model_config("paper"))
