"""The bugs of the kill table, operation by operation; `mutants` plants them and says who noticed."""

from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.gradients.bugs_of_rules import DATA, UPDATE
from alexnet.gradients.mutants import Backward, Mutant, attribute, changed, pair
from alexnet.layers.backend import PAIRS
from alexnet.layers.dropout import dropout_mask
from alexnet.layers.local_response_norm import map_window_sum
from alexnet.layers.same_map_norm import square_sum

# The package's own `conv2d` and `max_pool2d` are the functions.
conv = import_module("alexnet.layers.conv2d")
pool = import_module("alexnet.layers.max_pool2d")
block = import_module("alexnet.layers.relu_lrn_pool")

# ---- linear, relu, tanh, dropout ------------------------------------------------------------------------------

LINEAR = [
    changed(
        "linear",
        "dx by W' where W is square",
        0,
        lambda dx, dy, x, w, _: dy @ (w.T if len(w) == len(w.T) else w),
    ),
    changed(
        "linear",
        "dw with images out of step",
        1,
        lambda dw, dy, x, *_: dy.roll(1, 0).flatten(0, -2).T @ x.flatten(0, -2),
    ),
    changed("linear", "dw a mean over the batch, as the loss is", 1, lambda dw, dy, *_: dw / len(dy)),
    changed(
        "linear",
        "db of the last axis but one only",
        2,
        lambda db, dy, *_: dy.reshape(-1, *dy.shape[-2:])[0].sum(0),
    ),
    changed("linear", "db a mean over the batch", 2, lambda db, dy, *_: db / len(dy)),
]

RELU = [
    pair("relu", "y >= 0 for y > 0: never closed", backward=lambda dy, y: dy * (y >= 0)),
    pair("relu", "gradient passes at exactly 0", lambda x: (x.clamp(min=0), x), lambda dy, x: dy * (x >= 0)),
    pair("relu", "only positive gradients pass", backward=lambda dy, y: dy.clamp(min=0) * (y > 0)),
    pair("relu", "a leak in the backward only", backward=lambda dy, y: dy * torch.where(y > 0, 1.0, 0.01)),
]

TANH = [
    pair("tanh", "1 - y for 1 - y^2", backward=lambda dy, y: dy * (1 - y)),
    pair("tanh", "tanh taken again of y", backward=lambda dy, y: dy * (1 - y.tanh() ** 2)),
]


def _drop_forward(
    keep: Callable[..., Tensor], scale: Callable[..., float] = lambda scale, p: scale
) -> Backward:
    """Dropout with another mask, and the scale a function of (scale, p)."""

    def forward(x: Tensor, key: Tensor, p: float, first_row: int, c: float) -> tuple[Tensor, Tensor]:
        kept = keep(x.shape, p, key, first_row)
        return x * kept * scale(c, p), kept

    return forward


DROPOUT = [
    pair("dropout", "scale forgotten in the backward", backward=lambda dy, keep, *_: dy * keep),
    pair(
        "dropout",
        "another mask in the backward",
        backward=lambda dy, keep, p, r, c: dy * keep.roll(1, -1) * c,
    ),
    pair("dropout", "no mask in the backward", backward=lambda dy, keep, p, r, c: dy * c),
    pair("dropout", "p taken as the share kept", _drop_forward(lambda *a: ~dropout_mask(*a))),
    pair(
        "dropout",
        "every slice has the first rows' mask",
        _drop_forward(lambda s, p, k, r: dropout_mask(s, p, k, 0)),
    ),
    pair(
        "dropout",
        "scaled by p where 1/(1-p) was meant",
        _drop_forward(dropout_mask, lambda c, p: c if c == 1 else 1 / max(p, 0.1)),
    ),
]

# ---- pooling --------------------------------------------------------------------------------------------------


def _pool_backward(
    add: bool = True, wrong_side: bool = False, shared: bool = False, turned: bool = False
) -> Backward:
    """The pool's backward with one mistake."""

    def backward(
        dy: Tensor, place: Any, x: Any, y: Any, size: Any, kernel: Any, stride: Any, *rest: Any
    ) -> Tensor:
        windows = list(pool._windows(dy.shape[-2:], kernel, stride))
        left, right, top, bottom = sides = pool._sides(size, dy.shape[-2:], kernel, stride, rest[0])
        place = place if place is None or not turned else place % kernel[1] * kernel[0] + place // kernel[1]
        won = list(pool._winners(place, x, y, windows, sides))
        dy = dy / torch.stack(won).sum(0).clamp(min=1) if shared else dy
        dx = dy.new_zeros(*dy.shape[:-2], top + size[0] + bottom, left + size[1] + right)
        for window, mask in zip(windows, won, strict=True):
            dx[window] = dx[window] + dy * mask if add else torch.where(mask, dy, dx[window])
        top, left = (bottom, right) if wrong_side else (top, left)
        return dx[..., top : top + size[0], left : left + size[1]]

    return backward


def _pool_with_ties(ties: str) -> Backward:
    return lambda x, kernel, stride, padding, ceil, _: pool.max_pool2d_forward(
        x, kernel, stride, padding, ceil, ties
    )


def _last_wins(x: Tensor, *geometry: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`>=` for `>`: of equal maxima the last one in the window stands."""
    y, place, *kept = pool.max_pool2d_forward(x, *geometry)
    if place is not None:
        kernel, stride, padding, *_ = geometry
        sides = pool._sides(x.shape[-2:], y.shape[-2:], kernel, stride, padding)
        padded = F.pad(x, sides, value=float("-inf"))
        for k, window in enumerate(pool._windows(y.shape[-2:], kernel, stride)):
            place = place.masked_fill(padded[window] == y, k)
    return y, place, *kept


def _zero_padding(x: Tensor, sides: Any, value: float = 0.0) -> Tensor:
    return F.pad(x, sides)


MAX_POOL = [
    pair("max_pool2d", "= for += where windows overlap", backward=_pool_backward(add=False)),
    pair("max_pool2d", "padding cut off on the wrong side", backward=_pool_backward(wrong_side=True)),
    pair("max_pool2d", "gradient shared among tied maxima", backward=_pool_backward(shared=True)),
    pair("max_pool2d", "winner's row and column exchanged", backward=_pool_backward(turned=True)),
    pair("max_pool2d", "the last of the tied maxima wins", _last_wins),
    pair("max_pool2d", "every tied maximum paid under 'first'", _pool_with_ties("all")),
    pair("max_pool2d", "one tied maximum paid under 'all'", _pool_with_ties("first")),
    attribute(
        "max_pool2d",
        "padding of 0 for minus infinity",
        pool,
        "F",
        SimpleNamespace(pad=_zero_padding, max_pool2d=F.max_pool2d),
    ),
    pair(
        "max_pool2d",
        "last row of windows gets no gradient",
        backward=lambda dy, *a: pool.max_pool2d_backward(
            torch.cat([dy[..., :-1, :], 0 * dy[..., -1:, :]], -2), *a
        ),
    ),
]

# ---- response norms -------------------------------------------------------------------------------------------


def _norm_backward(
    gain: float = 1.0,
    factor: float = 2.0,
    power: float = 1.0,
    reflected: bool = True,
    within_towers: bool = True,
    own: str = "x",
    divided: bool = True,
) -> Backward:
    """The norm's backward with one mistake."""

    def backward(
        dy: Tensor, x: Tensor, s: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
    ) -> Tensor:
        t = dy * s**-beta
        window = ((size - 1) // 2, size // 2) if reflected else (size // 2, (size - 1) // 2)
        competition = map_window_sum(t * x / s**power, *window, groups if within_towers else 1)
        scale = factor * alpha * beta / (size if divided else 1)
        before = {"x": x, "y": x * s**-beta, "one": torch.ones_like(x)}[own]
        return gain * t - scale * before * competition

    return backward


def _norm_pair(name: str, change: Callable[..., tuple[Any, ...]]) -> Mutant:
    """Forward and backward both with changed constants: consistent with each other, and wrong."""
    right = PAIRS["local_response_norm", "reference"]
    return pair(
        "local_response_norm",
        name,
        lambda x, *constants: right.forward(x, *change(*constants)),
        lambda dy, x, s, *constants: right.backward(dy, x, s, *change(*constants)),
    )


_LRN = "local_response_norm"
RESPONSE_NORM = [
    pair(_LRN, "second term dropped", backward=_norm_backward(factor=0.0)),
    pair(_LRN, "first term dropped", backward=_norm_backward(gain=0.0)),
    pair(_LRN, "factor 2 of the square forgotten", backward=_norm_backward(factor=1.0)),
    pair(_LRN, "second term added, not subtracted", backward=_norm_backward(factor=-2.0)),
    pair(_LRN, "s^-b where s^(-b-1) belongs", backward=_norm_backward(power=0.0)),
    pair(_LRN, "alpha not divided in the backward", backward=_norm_backward(divided=False)),
    pair(_LRN, "tower boundary ignored in the backward", backward=_norm_backward(within_towers=False)),
    pair(_LRN, "even window not reflected", backward=_norm_backward(reflected=False)),
    pair(_LRN, "y for x before the sum", backward=_norm_backward(own="y")),
    pair(_LRN, "x before the sum forgotten", backward=_norm_backward(own="one")),
    _norm_pair("alpha not divided, forward and backward", lambda n, alpha, *rest: (n, n * alpha, *rest)),
    _norm_pair("towers ignored, forward and backward", lambda n, alpha, beta, k, _: (n, alpha, beta, k, 1)),
    _norm_pair("k = 1 whatever is asked", lambda n, alpha, beta, k, groups: (n, alpha, beta, 1.0, groups)),
]


def _square_backward(area: bool = True, factor: float = 2.0, rows_only: bool = False) -> Backward:
    def backward(dy: Tensor, x: Tensor, s: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        t = dy * s**-beta
        summed = t * x / s
        competition = _row_sum(summed, size) if rows_only else square_sum(summed, size)
        return t - factor * alpha * beta / (size**2 if area else size) * x * competition

    return backward


def _row_sum(x: Tensor, size: int) -> Tensor:
    """The sum along rows only."""
    return F.pad(x, (size // 2, size // 2)).unfold(-1, size, 1).sum(-1)


def _mean_of_what_is_there(
    x: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """At the border, divided by the pixels inside the map instead of by size^2."""
    mean = F.avg_pool2d(x * x, size, 1, size // 2, count_include_pad=False)
    s = k + alpha * mean
    return x * s**-beta, x, s


SAME_MAP = [
    pair("same_map_norm", "divided by the width, not the area", backward=_square_backward(area=False)),
    pair("same_map_norm", "second term dropped", backward=_square_backward(factor=0.0)),
    pair("same_map_norm", "sum over a row for the square", backward=_square_backward(rows_only=True)),
    pair("same_map_norm", "border divided by what is there", _mean_of_what_is_there),
]

# ---- convolution ----------------------------------------------------------------------------------------------


def _fold(add: bool = True, stride: bool = True, wrong_side: bool = False, last_row: bool = True) -> Backward:
    """`fold` with one mistake."""

    def fold(columns: Tensor, shape: Any, kernel: Any, u: Any, padding: Any) -> Tensor:
        (N, C, H, W), (R, S), G = shape, kernel, len(columns)
        left, right, top, bottom = padding
        padded = columns.new_zeros(N, H + top + bottom, W + left + right, G, C // G)
        P, Q = (padded.shape[1] - R) // u[0] + 1, (padded.shape[2] - S) // u[1] + 1
        taps = columns.reshape(G, N, P, Q, R, S, C // G).permute(4, 5, 1, 2, 3, 0, 6)
        v = u if stride else (1, 1)
        for r in range(R if last_row else max(R - 1, 1)):
            for s in range(S):
                plane = padded[:, r : r + v[0] * P : v[0], s : s + v[1] * Q : v[1]]
                plane.copy_(plane + taps[r, s] if add else taps[r, s])
        left, top = (right, bottom) if wrong_side else (left, top)
        return padded[:, top : top + H, left : left + W].flatten(3).permute(0, 3, 1, 2)

    return fold


def _conv_part(name: str, **parts: Any) -> Mutant:
    """The right backward with one of its parts replaced."""
    right = PAIRS["conv2d", "reference"].backward

    def backward(*arguments: Any) -> Any:
        with mock.patch.multiple(conv, **parts):
            return right(*arguments)

    return pair("conv2d", name, backward=backward)


_rows, _unfold, _back = conv._weight_rows, conv.unfold, conv._weight_from_rows
CONVOLUTION = [
    _conv_part("= for += where windows overlap", fold=_fold(add=False)),
    _conv_part("stride forgotten in fold", fold=_fold(stride=False)),
    _conv_part("padding cut off on the wrong side", fold=_fold(wrong_side=True)),
    _conv_part("last row of the kernel not folded", fold=_fold(last_row=False)),
    _conv_part("the other tower's weights in dx", _weight_rows=lambda w, groups: _rows(w, groups).roll(1, 0)),
    _conv_part("the other tower's columns in dw", unfold=lambda *a: _unfold(*a).roll(1, 0)),
    _conv_part(
        "kernel turned where it must not be", _weight_rows=lambda w, groups: _rows(w.flip(2, 3), groups)
    ),
    _conv_part(
        "left and right padding exchanged in dw",
        unfold=lambda x, kernel, stride, sides, groups: _unfold(
            x, kernel, stride, (sides[1], sides[0], *sides[2:]), groups
        ),
    ),
    _conv_part("taps of dw in the order (c, r, s)", _weight_from_rows=lambda rows, w: rows.reshape(w.shape)),
    _conv_part("dw of the last piece of the batch only", _chunks=lambda x, *_: [slice(len(x) - 1, len(x))]),
    changed(
        "conv2d",
        "dw with images out of step",
        1,
        lambda dw, dy, *a: conv.conv2d_backward(dy.roll(1, 0), *a)[1],
    ),
    changed("conv2d", "dw a mean over the batch, as the loss is", 1, lambda dw, dy, *_: dw / len(dy)),
    changed("conv2d", "db summed over one axis too few", 2, lambda db, dy, *_: dy.sum((0, 2))[:, 0]),
]

# ---- cross-entropy --------------------------------------------------------------------------------------------


def _loss_backward(
    mean: str = "images", smoothed: bool = True, target_counts: float = 1.0, sign: float = 1.0, axis: int = 1
) -> Backward:
    """The loss's backward with one mistake."""

    def backward(
        dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, smoothing: float, reduction: str
    ) -> Tensor:
        smoothing = smoothing if smoothed else 0.0
        q = (1 - smoothing) * F.one_hot(target, x.shape[1]) + smoothing / x.shape[1]
        count = (
            {"images": x.shape[0], "classes": x.shape[1], "nothing": 1}[mean] if reduction == "mean" else 1
        )
        p = (x - lse).exp() if axis == 1 else x.softmax(0)
        return sign * dloss.reshape(-1, 1) / count * (p - target_counts * q)

    return backward


CROSS_ENTROPY = [
    pair("cross_entropy", "mean over the batch missing", backward=_loss_backward(mean="nothing")),
    pair("cross_entropy", "mean over classes instead of images", backward=_loss_backward(mean="classes")),
    pair("cross_entropy", "smoothing forgotten in the backward", backward=_loss_backward(smoothed=False)),
    pair("cross_entropy", "target forgotten: p for p - q", backward=_loss_backward(target_counts=0.0)),
    pair("cross_entropy", "uphill: q - p, as in the 2012 code", backward=_loss_backward(sign=-1.0)),
    pair("cross_entropy", "softmax over the images", backward=_loss_backward(axis=0)),
]

# ---- ReLU, norm and pool in one -------------------------------------------------------------------------------


def _open_everywhere(dy: Tensor, y: Tensor) -> Tensor:
    return dy


def _block_part(name: str, attribute_name: str, wrong: Backward) -> Mutant:
    return attribute("relu_lrn_pool", name, block, attribute_name, wrong)


def _without_mask(order: str) -> Backward:
    def backward(*arguments: Any) -> Tensor:
        wrong = _open_everywhere if order in arguments else block.relu_backward
        with mock.patch.object(block, "relu_backward", wrong):
            return _block_right.backward(*arguments)

    return backward


_block_right = PAIRS["relu_lrn_pool", "reference"]
BLOCK = [
    pair(
        "relu_lrn_pool", "the ReLU's mask forgotten, paper's order", backward=_without_mask("relu_lrn_pool")
    ),
    pair("relu_lrn_pool", "the ReLU's mask forgotten, 2012 order", backward=_without_mask("lrn_pool_relu")),
    _block_part("norm's second term dropped", "local_response_norm_backward", _norm_backward(factor=0.0)),
    _block_part(
        "towers ignored in the backward", "local_response_norm_backward", _norm_backward(within_towers=False)
    ),
    _block_part("= for += in its pool", "max_pool2d_backward", _pool_backward(add=False)),
    pair(
        "relu_lrn_pool",
        "closed units get nothing in the 2012 order",
        backward=lambda dy, a, x, *rest: _block_right.backward(dy, a, x, *rest) * (x > 0),
    ),
    pair(
        "relu_lrn_pool",
        "the 2012 order computed as the paper's",
        lambda x, *a: _block_right.forward(x, *a[:7], "relu_lrn_pool", *a[8:]),
        lambda dy, *a: _block_right.backward(dy, *a[:13], "relu_lrn_pool", *a[14:]),
    ),
]

MUTANTS = (
    *LINEAR,
    *RELU,
    *TANH,
    *DROPOUT,
    *MAX_POOL,
    *RESPONSE_NORM,
    *SAME_MAP,
    *CONVOLUTION,
    *CROSS_ENTROPY,
    *BLOCK,
    *UPDATE,
    *DATA,
)
