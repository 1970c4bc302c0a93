"""Every operation with its cases, its rounding bounds and its identities. What these are, `cases` says."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet import layers
from alexnet.gradcheck.cases import (
    FUNCTION,
    Case,
    Draw,
    Evaluation,
    Identity,
    Operation,
    Options,
    Rounding,
    Tensors,
    case,
    few_integers,
    normals,
    off_zero,
    separated,
)
from alexnet.layers.max_pool2d import two

# ---- linear ---------------------------------------------------------------------------------------------------


def _weighted(
    name: str, kind: str, x: tuple[int, ...], w: tuple[int, ...], bias: bool = True, **options: Any
) -> Case:
    return case(name, kind, normals(*x), normals(*w), *[normals(w[0])] * bias, **options)


def _products(function: Callable[..., Tensor], *stores: int) -> Callable[[Evaluation], list[Rounding]]:
    """Rounding of y, dx, dw, db where a function of x, w, b only adds and multiplies: the magnitudes are the same with
    absolute values, the roundings the lengths of the sums."""

    def rounding(at: Evaluation) -> list[Rounding]:
        outputs, channels, *kernel = at.inputs[1].shape
        taps, positions = math.prod(kernel), at.dy.numel() // outputs
        into_pixel = outputs // at.options.get("groups", 1) * taps
        lengths = (channels * taps + 1, into_pixel, positions, positions)
        positive = Evaluation.of(function, at.options, [x.abs() for x in at.inputs], at.dy.abs(), "native")
        magnitudes = (positive.y, *positive.gradients)
        return [Rounding(*each) for each in zip(magnitudes, lengths, stores, strict=False)]

    return rounding


def adjoint(at: Evaluation) -> list[Identity]:
    """y is linear in x and in w: <dy, y> = <dx, x> + <db, b> = <dw, w> + <db, b>."""
    products = [(g * x).sum() for g, x in zip(at.gradients, at.inputs, strict=False)]
    of_bias = products[2] if len(products) > 2 else 0.0
    names = ("<A x, dy> = <x, A' dy>", "<A w, dy> = <w, A' dy>")
    right, scale = (at.dy * at.y).sum(), (at.dy * at.y).abs().sum()
    return [Identity(n, p + of_bias, right, scale) for n, p in zip(names, products[:2], strict=False)]


LINEAR = Operation("linear", curved=False, rounding=_products(layers.linear, 2, 1, 1, 1), identities=adjoint,
                   cases=[
    _weighted("batch of 6", "ordinary", (6, 5), (4, 5)),
    _weighted("as many outputs as inputs", "ordinary", (3, 5), (5, 5)),
    _weighted("one image", "awkward", (1, 5), (4, 5)),
    _weighted("no bias", "awkward", (6, 5), (4, 5), bias=False),
    _weighted("two leading dimensions", "awkward", (3, 2, 5), (4, 5)),
    _weighted("not contiguous", "awkward", (6, 5), (4, 5), layout="gapped"),
    _weighted("fc7", "large", (2, 4096), (4096, 4096)),
    _weighted("fc8", "paper", (4, 4096), (1000, 4096)),
])  # fmt: skip


# ---- relu, tanh, dropout --------------------------------------------------------------------------------------


def homogeneous(at: Evaluation, times: Tensor | int = 1) -> list[Identity]:
    """y(t x) = t y(x) for t > 0. Differentiate in t at 1 (Euler): <dx, x> = <dy, y>."""
    sent = at.dy * at.y * times
    return [Identity("Euler: <dx, x> = <dy, y>", (at.dx * at.x).sum(), sent.sum(), sent.abs().sum())]


# Copies and zeros: nothing is rounded.
RELU = Operation("relu", curved=False, rounding=lambda at: 2 * [Rounding(torch.zeros_like(at.x), 0, 0)],
                 identities=homogeneous, pattern=lambda options, inputs: [inputs[0] > 0], cases=[
    case("maps", "ordinary", off_zero(2, 3, 5, 4)),
    case("exact zeros", "awkward", few_integers(3, 7), smooth=False),
    case("all closed", "awkward", lambda g: -off_zero(2, 3, 4)(g).abs()),
    case("not contiguous", "awkward", off_zero(2, 3, 5, 4), layout="gapped"),
    case("channels last", "awkward", off_zero(2, 3, 5, 4), layout="channels_last"),
    case("conv1", "paper", off_zero(1, 96, 55, 55)),
])  # fmt: skip


def _tanh_rounding(at: Evaluation) -> list[Rounding]:
    """dx = dy (1 - y y) with y off by FUNCTION roundings, twice; y itself stored once and read twice."""
    dx = at.dy.abs() * (1 + at.y * at.y)
    return [Rounding(at.y.abs(), FUNCTION, 1), Rounding(dx, 2 * FUNCTION + 3, 3)]


def _tanh_identities(at: Evaluation) -> list[Identity]:
    """1 - tanh^2 = 1 / cosh^2."""
    square = at.x.cosh() ** 2
    return [Identity("dx cosh(x)^2 = dy", at.dx * square, at.dy, at.dy.abs().max() * square)]


TANH = Operation("tanh", curved=True, rounding=_tanh_rounding, identities=_tanh_identities, cases=[
    case("maps", "ordinary", normals(2, 3, 5, 4)),
    case("saturated", "awkward", normals(2, 30, times=4.0)),
    case("not contiguous", "awkward", normals(2, 3, 5, 4), layout="gapped"),
    case("channels last", "awkward", normals(2, 3, 5, 4), layout="channels_last"),
    case("conv1", "paper", normals(1, 96, 55, 55)),
])  # fmt: skip


_dropout_case = partial(case, p=0.5, key=7)

# One product with the scale, which may itself be rounded.
DROPOUT = Operation("dropout", curved=False,
                    rounding=lambda at: [Rounding(at.y.abs(), 2, 1), Rounding(at.dx.abs(), 2, 1)],
                    identities=adjoint, cases=[
    _dropout_case("inverted", "ordinary", normals(6, 8)),
    _dropout_case("mask only, as in 2012", "ordinary", normals(6, 8), mode="mask_only"),
    _dropout_case("30 % dropped", "ordinary", normals(6, 8), p=0.3),
    _dropout_case("one image", "awkward", normals(1, 40)),
    _dropout_case("second half of a batch", "awkward", normals(4, 8), first_row=4),
    _dropout_case("nothing dropped", "awkward", normals(3, 8), p=0.0),
    _dropout_case("whole maps", "awkward", normals(2, 3, 4, 5)),
    _dropout_case("not contiguous", "awkward", normals(6, 8), layout="gapped"),
    _dropout_case("fc6", "paper", normals(32, 4096), mode="mask_only"),
])  # fmt: skip


# ---- pooling --------------------------------------------------------------------------------------------------


def _geometry(options: Options) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    kernel = two(options.get("kernel_size", 3))
    return kernel, two(options.get("stride", 2)), two(options.get("padding", 0))


def _windows_per_pixel(options: Options) -> int:
    kernel, stride, _ = _geometry(options)
    return -(-kernel[0] // stride[0]) * -(-kernel[1] // stride[1])


def _pool_rounding(at: Evaluation) -> list[Rounding]:
    """A maximum is a copy; a pixel sums the dy of the windows it won."""
    dx = Evaluation.of(layers.max_pool2d, at.options, at.inputs, at.dy.abs(), "native").dx
    return [Rounding(torch.zeros_like(at.y), 0, 0), Rounding(dx, _windows_per_pixel(at.options), 1)]


def _pool_identities(at: Evaluation) -> list[Identity]:
    """Euler, every window counted once under "first", once for each of its winners under "all"; and what arrives is
    what was sent, counted alike."""
    times: Tensor | int = 1
    if at.options.get("ties") == "all":  # how many pixels of each window equal its maximum
        kernel, stride, (rows, columns) = _geometry(at.options)
        far = max(*kernel, *stride)
        padded = F.pad(at.x, (columns, columns + far, rows, rows + far), value=float("-inf"))
        windows = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        times = (windows[:, :, : at.y.shape[2], : at.y.shape[3]] == at.y[..., None, None]).sum((-2, -1))
    sent = at.dy * times
    return [*homogeneous(at, times), Identity("all of dy arrives", at.dx.sum(), sent.sum(), sent.abs().sum())]


_pool_case = partial(case, kernel_size=3, stride=2)
_MAPS = separated(2, 16, 7, 9)


def _pool_pattern(options: Options, inputs: Tensors) -> Tensors:
    kernel, stride, padding = _geometry(options)
    ceil = options.get("ceil_mode", False)
    return [F.max_pool2d(inputs[0], kernel, stride, padding, ceil_mode=ceil, return_indices=True)[1]]


MAX_POOL2D = Operation("max_pool2d", curved=False, rounding=_pool_rounding, identities=_pool_identities,
                       pattern=_pool_pattern, cases=[
    _pool_case("overlapping windows", "ordinary", _MAPS),
    _pool_case("windows side by side", "ordinary", separated(2, 16, 6, 8, window=2), kernel_size=2),
    _pool_case("windows cut at the border", "awkward", separated(2, 16, 8, 6), ceil_mode=True),
    _pool_case("ragged, rounded down", "awkward", separated(2, 16, 8, 6)),
    _pool_case("padding, all negative", "awkward", separated(2, 16, 6, 7, sign=-1.0), padding=1),
    _pool_case("stride 1", "awkward", separated(2, 16, 5, 6), stride=1),
    _pool_case("stride larger than window", "awkward", separated(2, 16, 9, 8), kernel_size=2, stride=3),
    _pool_case("unequal sides", "awkward", separated(2, 2, 8, 9), kernel_size=(3, 2), stride=(1, 2),
               padding=(1, 0)),
    _pool_case("ties, first wins", "awkward", few_integers(2, 16, 7, 9), smooth=False),
    _pool_case("ties, all win", "awkward", few_integers(2, 16, 7, 9), ties="all", smooth=False),
    _pool_case("constant, all win", "awkward", lambda g: torch.ones(2, 16, 7, 9).double(), ties="all",
               smooth=False),
    _pool_case("no ties, all win", "awkward", _MAPS, ties="all"),
    _pool_case("one image", "awkward", separated(1, 1, 7, 9)),
    _pool_case("not contiguous", "awkward", _MAPS, layout="gapped"),
    _pool_case("channels last", "awkward", _MAPS, layout="channels_last", ceil_mode=True),
    _pool_case("pool1", "paper", separated(1, 96, 55, 55), ceil_mode=True, ties="all"),
    _pool_case("pool5", "paper", separated(2, 256, 13, 13), ceil_mode=True),
])  # fmt: skip


# ---- response norms -------------------------------------------------------------------------------------------


def _norm_magnitude(function: Callable[..., Tensor], options: Options, x: Tensor, dy: Tensor) -> Tensor:
    """|gain| + |competition|. On absolute values the gradient is gain - competition, and the gain is dy y/x."""
    positive = Evaluation.of(function, options, [x.abs().clamp(min=1e-30)], dy.abs(), "native")
    return 2 * dy.abs() * positive.y / positive.x - positive.dx


def _norm_roundings(terms: int) -> int:
    """s sums `terms` squares; s and its power enter dx twice; `terms` more in the competition's sum."""
    return 2 * terms + 2 * FUNCTION + 12


def _norm_rounding(function: Callable[..., Tensor], power: int) -> Callable[[Evaluation], list[Rounding]]:
    def rounding(at: Evaluation) -> list[Rounding]:
        roundings = _norm_roundings(at.options["size"] ** power)
        dx = _norm_magnitude(function, at.options, at.x, at.dy)
        return [Rounding(at.y.abs(), roundings, 1), Rounding(dx, roundings, 1)]

    return rounding


def _denominator(x: Tensor, y: Tensor, beta: float) -> Tensor:
    """s of y = x s^-beta; 1 where y is 0."""
    return torch.where(y == 0, 1.0, x / torch.where(y == 0, 1.0, y)) ** (1 / beta)


def _norm_identities(
    at: Evaluation, s: Tensor | None = None, name: str = "sum x dx = (1-2b) sum dy y + 2bk sum dy y/s"
) -> list[Identity]:
    """Multiply the gradient by x and sum over a window: the double sum is s - k again."""
    beta, k = at.options.get("beta", 0.75), at.options.get("k", 1.0)
    s = _denominator(at.x, at.y, beta) if s is None else s
    right = (at.dy * at.y * (1 - 2 * beta + 2 * beta * k / s)).sum()
    return [Identity(name, (at.x * at.dx).sum(), right, (at.dy * at.y).abs().sum())]


def _norm_case(
    name: str,
    kind: str,
    *shape: int,
    size: int,
    power: int = 1,
    alpha_per_term: float = 0.3,
    draw: Callable[..., Draw] = normals,
    **options: Any,
) -> Case:
    """Competition is as strong as gain, unless the paper's constants are given."""
    defaults = {"size": size, "alpha": alpha_per_term * size**power, "beta": 0.75, "k": 2.0}
    return case(name, kind, draw(*shape), **{**defaults, **options})


def _after_relu(*shape: int) -> Draw:
    """Half of the responses are exact zeros, as in the paper's order."""
    return lambda g: normals(*shape)(g).clamp(min=0)


LOCAL_RESPONSE_NORM = Operation("local_response_norm", curved=True,
                                rounding=_norm_rounding(layers.local_response_norm, 1),
                                identities=_norm_identities, cases=[
    _norm_case("window of 5", "ordinary", 2, 16, 3, 4, size=5),
    _norm_case("two towers", "ordinary", 2, 16, 3, 4, size=5, groups=2),
    _norm_case("even window, two towers", "awkward", 2, 16, 3, 4, size=4, groups=2),
    _norm_case("window of 2", "awkward", 2, 16, 3, 4, size=2),
    _norm_case("window of 1", "awkward", 2, 5, 3, 4, size=1),
    _norm_case("window wider than the maps", "awkward", 2, 4, 3, 4, size=9, groups=2),
    _norm_case("beta 0.6, k 1", "awkward", 2, 16, 3, 4, size=5, beta=0.6, k=1.0),
    _norm_case("no pixels: (N, C)", "awkward", 3, 12, size=5),
    _norm_case("one image, one pixel", "awkward", 1, 12, 1, 1, size=5),
    _norm_case("after a ReLU", "awkward", 2, 16, 3, 4, size=5, draw=_after_relu),
    _norm_case("not contiguous", "awkward", 2, 16, 3, 4, size=4, groups=2, layout="gapped"),
    _norm_case("channels last", "awkward", 2, 16, 3, 4, size=5, groups=2, layout="channels_last"),
    # Section 3.3's constants on responses of 2012's size.
    _norm_case("conv1, paper's constants", "paper", 1, 96, 55, 55, size=5, alpha=5e-4, groups=2,
               draw=partial(normals, times=60.0)),
])  # fmt: skip

SAME_MAP_NORM = Operation("same_map_norm", curved=True, rounding=_norm_rounding(layers.same_map_norm, 2),
                          identities=_norm_identities, cases=[
    _norm_case("square of 5", "ordinary", 2, 16, 8, 7, size=5, power=2),
    _norm_case("square of 3, k 1", "ordinary", 2, 16, 6, 7, size=3, power=2, k=1.0),
    _norm_case("square wider than the map", "awkward", 2, 3, 3, 2, size=7, power=2),
    _norm_case("square of 1", "awkward", 2, 3, 3, 4, size=1, power=2),
    _norm_case("beta 0.6", "awkward", 2, 16, 6, 7, size=3, power=2, beta=0.6),
    _norm_case("one image, one pixel", "awkward", 1, 3, 1, 1, size=5, power=2),
    _norm_case("not contiguous", "awkward", 2, 16, 8, 7, size=5, power=2, layout="gapped"),
    _norm_case("channels last", "awkward", 2, 16, 8, 7, size=5, power=2, layout="channels_last"),
    # layers-145.cfg:107-117 on responses of 2012's size.
    _norm_case("conv2, the code's constants", "paper", 1, 256, 27, 27, size=5, alpha=1e-3, k=1.0,
               draw=partial(normals, times=30.0)),
])  # fmt: skip


# ---- convolution ----------------------------------------------------------------------------------------------

_TOWERS: Options = {"stride": (1, 2), "padding": (0, 2, 1, 3), "groups": 2}

# Stored twice: columns of dx before they are folded, pieces of dw before they are summed, y before its bias.
CONV2D = Operation("conv2d", curved=False, rounding=_products(layers.conv2d, 2, 2, 2, 1), identities=adjoint,
                   cases=[
    _weighted("towers, unequal sides", "ordinary", (3, 4, 7, 8), (6, 2, 2, 3), **_TOWERS),
    _weighted("stride and padding", "ordinary", (2, 3, 9, 8), (4, 3, 3, 3), stride=2, padding=1),
    # Taps enough, and zeros few enough, for the shifted products of layers/compiled/conv2d.py.
    _weighted("many taps", "ordinary", (2, 4, 22, 23), (6, 2, 5, 4), padding=(1, 2, 2, 2), groups=2),
    _weighted("zeros right and bottom", "awkward", (2, 3, 16, 16), (4, 3, 11, 11), stride=4, padding=(0, 3, 0, 3)),
    _weighted("one image", "awkward", (1, 2, 5, 6), (4, 2, 3, 3), padding=1),
    _weighted("one window", "awkward", (2, 2, 3, 4), (4, 2, 3, 4)),
    _weighted("kernel of one pixel", "awkward", (2, 3, 4, 5), (6, 3, 1, 1)),
    _weighted("stride larger than kernel", "awkward", (2, 2, 11, 10), (4, 2, 2, 3), stride=(5, 4)),
    _weighted("pixels no window reads", "awkward", (2, 2, 10, 9), (4, 2, 3, 3), stride=4),
    _weighted("windows in the padding", "awkward", (2, 2, 3, 3), (4, 2, 2, 2), padding=4),
    _weighted("a group for every channel", "awkward", (2, 3, 5, 5), (6, 1, 3, 3), padding=1, groups=3),
    _weighted("no bias", "awkward", (2, 3, 5, 5), (4, 3, 3, 3), bias=False),
    _weighted("not contiguous", "awkward", (3, 4, 7, 8), (6, 2, 2, 3), layout="gapped", **_TOWERS),
    _weighted("channels last", "awkward", (3, 4, 7, 8), (6, 2, 2, 3), layout="channels_last", **_TOWERS),
    _weighted("conv1", "paper", (2, 3, 224, 224), (96, 3, 11, 11), stride=4, padding=(0, 3, 0, 3)),
    _weighted("conv2", "paper", (2, 96, 27, 27), (256, 48, 5, 5), padding=2, groups=2),
    _weighted("conv3", "paper", (2, 256, 13, 13), (384, 256, 3, 3), padding=1),
    _weighted("conv4", "paper", (2, 384, 13, 13), (384, 192, 3, 3), padding=1, groups=2),
    _weighted("conv5", "paper", (2, 384, 13, 13), (256, 192, 3, 3), padding=1, groups=2),
])  # fmt: skip


# ---- cross-entropy --------------------------------------------------------------------------------------------


def _cross_entropy_rounding(at: Evaluation) -> list[Rounding]:
    """An error e in the exponent is a factor 1 + e of p, and the exponent log p is rounded in proportion to its
    size: so the largest |log p| counts like a number of roundings, as do K summands and two functions. The size of the
    logits themselves does not count: the largest is subtracted first, which is exact where the others are near it."""
    (x, target), options = at.inputs, at.options
    log_p = (x - x.amax(1, keepdim=True)).log_softmax(1)
    roundings = x.shape[1] + 3 * FUNCTION + 6 * int(log_p.abs().max()) + 8
    smoothing = options.get("label_smoothing", 0.0)
    q = smoothing / x.shape[1] + (1 - smoothing) * F.one_hot(target, x.shape[1])
    weight = at.dy.reshape(-1, 1).abs() / (len(x) if options.get("reduction", "mean") == "mean" else 1)
    size = (log_p.abs().amax(1) + math.log(x.shape[1])).reshape(at.y.shape or (-1,))
    total = {"none": size, "sum": size.sum()}.get(options.get("reduction", "mean"), size.mean())
    # The loss of half types stays in float32, so nothing of it is stored in the half type.
    return [Rounding(total, roundings + len(x), 0), Rounding(weight * (log_p.exp() + q), roundings, 1)]


def _rows_sum_to_zero(at: Evaluation) -> list[Identity]:
    """p and q both sum to 1 over the classes."""
    zeros = torch.zeros_like(at.dx[:, 0])
    return [Identity("each row of dx sums to 0", at.dx.sum(1), zeros, at.dx.abs().sum(1))]


def _logits_case(
    name: str, kind: str, images: int, classes: int, times: float = 1.0, around: float = 0.0, **options: Any
) -> Case:
    logits = normals(images, classes, times=times)
    draws = (lambda g: logits(g) + around, lambda g: torch.randint(classes, (images,), generator=g))
    return case(name, kind, *draws, **options)


CROSS_ENTROPY = Operation("cross_entropy", curved=True, rounding=_cross_entropy_rounding,
                          identities=_rows_sum_to_zero, cases=[
    _logits_case("5 images, 7 classes", "ordinary", 5, 7),
    _logits_case("labels smoothed", "ordinary", 5, 7, label_smoothing=0.1),
    _logits_case("sum over the images", "awkward", 5, 7, reduction="sum"),
    _logits_case("a loss for each image", "awkward", 5, 7, reduction="none", label_smoothing=0.1),
    _logits_case("one image, two classes", "awkward", 1, 2),
    # exp(800) overflows even float64. Far from the truth the curve is straight: nothing to difference.
    _logits_case("logits of 800", "awkward", 4, 7, times=400.0, smooth=False),
    # Their differences are small numbers; 1e8 + log 7 is not a difference.
    _logits_case("logits around 1e8", "awkward", 4, 7, around=1e8, smooth=False),
    _logits_case("not contiguous", "awkward", 5, 7, layout="gapped"),
    _logits_case("ILSVRC batch", "paper", 32, 1000, times=2.0),
])  # fmt: skip


# ---- ReLU, norm and pool in one -------------------------------------------------------------------------------


def _stages(options: Options, x: Tensor) -> tuple[Tensor, Tensor, Options, Options]:
    """What enters the norm, what enters the pool, and their options; by native operations."""
    norm: Options = {key: options[key] for key in ("size", "alpha", "beta", "k", "groups") if key in options}
    pool = {"kernel_size": 3, "stride": 2, "ceil_mode": options.get("ceil_mode", True)}
    a = x.clamp(min=0) if options["order"] == "relu_lrn_pool" else x
    b = layers.local_response_norm(a, **norm, backend="native")
    return a, b, norm, pool | {"ties": options.get("ties", "first")}


def _block_rounding(at: Evaluation) -> list[Rounding]:
    """The pool's and the norm's, one after the other; what lies between them may be stored twice more."""
    a, b, norm, pool = _stages(at.options, at.x)
    paper = at.options["order"] == "relu_lrn_pool"
    dm = at.dy.abs() * (1 if paper else at.y > 0)
    db = Evaluation.of(layers.max_pool2d, pool, [b], dm, "native").dx
    dx = _norm_magnitude(layers.local_response_norm, norm, a, db) * (at.x > 0 if paper else 1)
    roundings = _norm_roundings(at.options["size"])
    return [Rounding(at.y.abs(), roundings, 2), Rounding(dx, roundings + _windows_per_pixel(pool), 3)]


def _block_identities(at: Evaluation) -> list[Identity]:
    """The norm's identity, where only the winners of the windows receive a gradient."""
    a, b, _, pool = _stages(at.options, at.x)
    (winner,) = _pool_pattern(pool, [b])
    s = _denominator(a, b, at.options["beta"])
    s_won = s.flatten(2).gather(2, winner.flatten(2)).reshape(at.y.shape)
    return _norm_identities(at, s_won, "sum x dx = sum over winners, as the norm")


def _block_pattern(options: Options, inputs: Tensors) -> Tensors:
    _, b, _, pool = _stages(options, inputs[0])
    y = F.max_pool2d(b, 3, 2, ceil_mode=pool["ceil_mode"])
    return [inputs[0] > 0, y > 0, *_pool_pattern(pool, [b])]


def _two_maps_closed(*shape: int) -> Draw:
    """All windows of the first two maps are closed: zeros tie in each, and the ReLU must stop their gradient."""

    def draw(g: torch.Generator) -> Tensor:
        x = separated(*shape)(g)
        x[:, :2] = -x[:, :2].abs()
        return x

    return draw


_PAPER, _CODE = "relu_lrn_pool", "lrn_pool_relu"
# 0.03 per term: the strongest units are damped by a third, and none loses its window to a weaker one.
_block_case = partial(_norm_case, size=5, alpha_per_term=0.03, draw=separated)

RELU_LRN_POOL = Operation("relu_lrn_pool", curved=True, rounding=_block_rounding,
                          identities=_block_identities, pattern=_block_pattern, cases=[
    _block_case("the paper's order", "ordinary", 2, 16, 7, 7, order=_PAPER),
    _block_case("the 2012 code's order", "ordinary", 2, 16, 7, 7, order=_CODE),
    _block_case("towers, paper", "ordinary", 2, 16, 7, 7, order=_PAPER, groups=2),
    _block_case("towers, code, all ties win", "awkward", 2, 16, 6, 8, order=_CODE, groups=2, ties="all"),
    _block_case("even window, paper", "awkward", 2, 16, 7, 7, order=_PAPER, size=4),
    _block_case("rounded down, code", "awkward", 2, 16, 6, 8, order=_CODE, ceil_mode=False),
    _block_case("closed windows, paper", "awkward", 2, 16, 7, 7, order=_PAPER, draw=_two_maps_closed),
    _block_case("closed windows, code", "awkward", 2, 16, 7, 7, order=_CODE, draw=_two_maps_closed),
    _block_case("one image", "awkward", 1, 4, 5, 5, order=_PAPER),
    _block_case("not contiguous", "awkward", 2, 16, 7, 7, order=_CODE, layout="gapped"),
    _block_case("channels last", "awkward", 2, 16, 7, 7, order=_PAPER, layout="channels_last"),
    _block_case("block 1, paper", "paper", 1, 96, 55, 55, order=_PAPER, groups=2, ties="all"),
    _block_case("block 1, code", "paper", 1, 96, 55, 55, order=_CODE, groups=2, ties="all"),
])  # fmt: skip

ALL = (
    LINEAR, RELU, TANH, DROPOUT, MAX_POOL2D, LOCAL_RESPONSE_NORM, SAME_MAP_NORM, CONV2D, CROSS_ENTROPY,
    RELU_LRN_POOL,
)  # fmt: skip


def by_name(name: str) -> Operation:
    return next(operation for operation in ALL if operation.name == name)
