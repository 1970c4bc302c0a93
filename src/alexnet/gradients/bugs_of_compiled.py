"""The bugs of the fast pairs, for the kill table: mistakes that their own shortcuts invite.

A shortcut replaces an index by a shift, a table, a byte or a gap of zeros, and is wrong where the shift leaves the
row, the table is another's, the byte is full or the gap is missing. The mathematics has bugs of its own (`bugs`);
where a fast pair calls the same formula, one of those stands for all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.gradients.mutants import Mutant
from alexnet.graphs import batched
from alexnet.layers.backend import PAIRS, Pair, pair_for, wide
from alexnet.layers.compiled import local_response_norm as norm
from alexnet.layers.compiled import max_pool2d as pool
from alexnet.layers.compiled import on_cuda, pointwise, relu_lrn_pool, same_map_norm

# The package's own `conv2d` is the function.
conv = import_module("alexnet.layers.compiled.conv2d")

Function = Callable[..., Any]
BF16 = torch.bfloat16


def part(
    where: str,
    name: str,
    owner: Any,
    attribute: str,
    wrong: Any,
    shows: str = "",
    backend: str = "compiled",
    dtype: torch.dtype = torch.float64,
) -> Mutant:
    """A wrong part in place of a module's own; a function is given the right one before its arguments."""
    right = getattr(owner, attribute)

    def instead(*arguments: Any, **named: Any) -> Any:
        return wrong(right, *arguments, **named)

    planted = instead if callable(right) else wrong
    return Mutant(where, name, lambda: mock.patch.object(owner, attribute, planted), backend, dtype, shows)


def backward(
    where: str,
    name: str,
    wrong: Function,
    shows: str = "",
    backend: str = "compiled",
    dtype: Any = torch.float64,
) -> Mutant:
    """A wrong backward in place of a pair's; it is given the right one before its arguments."""

    def plant() -> Any:
        right = pair_for(where, backend)
        assert right is not None
        instead = Pair(right.forward, lambda *arguments: wrong(right.backward, *arguments))
        return mock.patch.dict(PAIRS, {(where, backend): instead})

    return Mutant(where, name, plant, backend, dtype, shows)


def part_on_cuda(where: str, name: str, attribute: str, wrong: Any, shows: str = "") -> Mutant:
    """`part`, in the pair that serves CUDA; it is compiled for the CPU and checked there."""
    mutant = part(where, f"on CUDA: {name}", on_cuda, attribute, wrong, shows)

    @contextmanager
    def plant() -> Iterator[None]:
        with mock.patch.dict(PAIRS, {(where, "compiled"): on_cuda.ON_CUDA[where]}), mutant.plant():
            yield

    return mutant._replace(plant=plant)


# ---- linear, relu, tanh, dropout ------------------------------------------------------------------------------


def _scale_forgotten(right: Function, dy: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    return right(dy, keep, torch.ones_like(scale))


SMALL = [
    part(
        "linear",
        "dw with images out of step",
        pointwise,
        "three_products",
        lambda right, dy, x, w, needs: right(dy, x.roll(1, 0), w, needs),
    ),
    part(
        "relu",
        "dy read in its own memory order, not y's",
        pointwise,
        "as_it_lies",
        lambda right, x, like=None: right(x),
    ),
    part(
        "relu",
        "y >= 0 for y > 0: never closed",
        pointwise,
        "rectified_gradient",
        lambda right, dy, y: dy * (y >= 0),
    ),
    part("tanh", "1 - y for 1 - y^2", pointwise, "squashed_gradient", lambda right, dy, y: dy * (1 - y)),
    part(
        "dropout",
        "every slice has the first rows' mask",
        pointwise,
        "row_words",
        lambda right, rows, key, first_row: right(rows, key, 0),
        "second half of a batch",
    ),
    part("dropout", "scale forgotten in the backward", pointwise, "_dropout_gradient", _scale_forgotten),
    part(
        "dropout",
        "the next unit's mask in the backward",
        pointwise,
        "_dropout_gradient",
        lambda right, dy, keep, scale: right(dy, *batched(keep.roll(1, 1)), scale),
    ),
    part(
        "dropout",
        "units not mixed: neighbours share bits",
        pointwise,
        "_unit_words",
        lambda right, units, device: torch.arange(units, device=device),
    ),
]

# ---- pooling --------------------------------------------------------------------------------------------------


def _overwritten(
    right: Function,
    shape: torch.Size,
    dy: Tensor,
    winners: list[Tensor],
    remainder: Any,
    start: Any,
    kernel: Any,
    stride: Any,
    ties: str,
) -> Tensor:
    """`=` for `+=`: the last window that a pixel won."""
    total = torch.zeros((), dtype=wide(dy.dtype)).expand(shape)
    (A, B), ahead = shape[1:3], [-(-kernel[a] // stride[a]) - 1 for a in (0, 1)]
    for t, r in enumerate(range(remainder[0], kernel[0], stride[0])):
        for u, s in enumerate(range(remainder[1], kernel[1], stride[1])):
            row, column = start[0] - t + ahead[0], start[1] - u + ahead[1]
            window = (slice(None), slice(row, row + A), slice(column, column + B))
            won = pool._won([w[window] for w in winners], r * kernel[1] + s, ties)
            total = torch.where(won, dy[window].to(total.dtype), total)
    return total


def _last_plane_missing(right: Function, planes: list[Tensor], *rest: Any) -> None:
    right(planes, *rest)
    planes[-1].zero_()  # what the memory held before


def _last_wins(
    right: Function, x: Tensor, first: Any, windows: Any, kernel: Any, stride: Any, padding: Any, ties: str
) -> tuple[Tensor, list[Tensor]]:
    y, winners = right(x, first, windows, kernel, stride, padding, ties)
    if ties == "first":
        for number, x_k in enumerate(pool._candidates(x, windows, kernel, stride, padding)):
            winners = [torch.where(x_k == y, float(number), winners[0])]
    return y, winners


def _other_side(
    right: Function, x: Tensor, left: int, after: int, top: int, below: int, *value: float
) -> Tensor:
    return right(x, after, left, below, top, *value)


def _row_and_column_exchanged(right: Function, winners: list[Tensor], place: int, ties: str) -> Tensor:
    return right(winners, place % 3 * 3 + place // 3, ties)


MAX_POOL = [
    part("max_pool2d", "= for += where windows overlap", pool, "_paid", _overwritten),
    part("max_pool2d", "one remainder's pixels not written", pool, "_gather", _last_plane_missing),
    part(
        "max_pool2d", "places counted from 1", pool, "_won", lambda right, w, k, ties: right(w, k + 1, ties)
    ),
    part("max_pool2d", "winner's row and column exchanged", pool, "_won", _row_and_column_exchanged),
    part(
        "max_pool2d",
        "border of windows on the other side",
        pool,
        "bordered",
        _other_side,
        "windows cut at the border",
    ),
    part("max_pool2d", "the last of the tied maxima wins", pool, "pooled", _last_wins, "ties, first wins"),
    part("max_pool2d", "nine places to a byte", pool, "BITS", 9, "ties, all win"),
    part(
        "max_pool2d",
        "the search begins one place late",
        pool,
        "first_place",
        lambda right, P, Q, *rest: right(P, Q, *rest) + 1,
        "padding, all negative",
    ),
]

# ---- response norms -------------------------------------------------------------------------------------------

_LRN, _BLOCK = "local_response_norm", "relu_lrn_pool"


def _open_rows(right: Function, x: Tensor, size: int, groups: int) -> tuple[Tensor, Tensor, int]:
    keep, reflected, before = right(x, size, groups)
    return torch.ones_like(keep), torch.ones_like(reflected), before


def _not_reflected(right: Function, x: Tensor, size: int, groups: int) -> tuple[Tensor, Tensor, int]:
    keep, _, before = right(x, size, groups)
    return keep, keep, before


def _lonely_ends(right: Function, rows: Tensor, pixels: int, term: Function, *rest: Any) -> list[Tensor]:
    _, *between, _ = right(rows, pixels, term, *rest)
    return [term(rows[:1]), *between, term(rows[-1:])]


def _one_too_early(
    right: Function, rows: Tensor, pixels: int, term: Function, keep: Tensor, before: int
) -> list[Tensor]:
    return right(rows, pixels, term, keep, before + 1)


def _gain_twice(right: Function, s: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    gain, _ = right(s, beta)
    return gain, gain


def _rows_only(right: Function, x: Tensor, size: int) -> Tensor:
    padded = F.pad(x, (0, 0, size // 2, size // 2))
    return torch.stack([padded[:, :, j : j + x.shape[2]] for j in range(size)]).sum(0)


NORMS = [
    part(_LRN, "last map's neighbour in the next pixel", norm, "neighbours", _open_rows),
    part(
        _LRN,
        "tower boundary ignored",
        norm,
        "neighbours",
        lambda right, x, size, groups: right(x, size, 1),
        "two towers",
    ),
    part(_LRN, "even window not reflected", norm, "neighbours", _not_reflected, "even window, two towers"),
    part(_LRN, "first and last pixel left alone", norm, "window_sums", _lonely_ends),
    part(_LRN, "shifts one number too early", norm, "window_sums", _one_too_early),
    part(_LRN, "s^-3/4 where s^-7/4 belongs", norm, "gain_and_slope", _gain_twice),
    part(
        "same_map_norm",
        "square one column to the right",
        same_map_norm,
        "square_sum",
        lambda right, x, size: right(x, size).roll(1, 2),
    ),
    part("same_map_norm", "sum over a row for the square", same_map_norm, "square_sum", _rows_only),
    part("same_map_norm", "s^-3/4 where s^-7/4 belongs", same_map_norm, "gain_and_slope", _gain_twice),
]

BLOCK = [
    part(
        _BLOCK,
        "the ReLU's mask forgotten, paper's order",
        relu_lrn_pool,
        "backward_into",
        lambda right, dx, dy, x, constants, groups, relu: right(
            dx, dy, x.clamp(min=0) if relu else x, constants, groups, False
        ),
    ),
    part(
        _BLOCK,
        "towers ignored in the backward",
        relu_lrn_pool,
        "backward_into",
        lambda right, dx, dy, x, constants, groups, relu: right(dx, dy, x, constants, 1, relu),
        "towers, paper",
    ),
    part(
        _BLOCK,
        "closed windows have a winner, 2012 order",
        relu_lrn_pool,
        "NOBODY",
        {"first": 0, "all": 1},
        "closed windows, code",
    ),
    part(
        _BLOCK,
        "gathered for a window further on",
        relu_lrn_pool,
        "gather",
        lambda right, dy, *rest: right(dy.roll(1, 2), *rest),
    ),
]

# ---- convolution ----------------------------------------------------------------------------------------------


def _a_row_off(right: Function, x: Tensor, image: int, row: int, before: int, after: int) -> Tensor:
    line = right(x, image, row, before, after)
    return line.roll(row, 1) if before + after else line


def _rows_touch(right: Function, x: Tensor, padding: Any) -> tuple[int, int]:
    return x.shape[3], right(x, padding)[1]


def _images_touch(right: Function, x: Tensor, padding: Any) -> tuple[int, int]:
    return right(x, padding)[0], x.shape[2]


def _turned_blocks(right: Function, dw: Tensor, w: Tensor, stride: Any) -> Tensor:
    if stride[0] != stride[1]:
        return right(dw, w, stride)
    blocks = dw.unflatten(1, (*stride, -1)).permute(0, 3, 4, 2, 5, 1)
    return blocks.flatten(4, 5).flatten(2, 3)[:, :, : w.shape[2], : w.shape[3]]


def _first_taps_dropped(right: Function, dw: Tensor, w: Tensor, stride: Any) -> Tensor:
    blocks = dw.unflatten(1, (*stride, -1)).permute(0, 3, 4, 1, 5, 2)
    return blocks.flatten(4, 5).flatten(2, 3)[:, :, -w.shape[2] :, -w.shape[3] :]


def _last_taps_for_first(right: Function, w: Tensor, stride: Any) -> Tensor:
    """The zeros that fill a kernel up put before it."""
    u, v = stride
    return right(F.pad(w, (-w.shape[3] % v, 0, -w.shape[2] % u, 0)), stride)


def _wrong_side(
    right: Function, dy: Tensor, x: Tensor, w: Tensor, stride: Any, padding: Any, groups: int
) -> Tensor:
    return right(dy, x, w, stride, (padding[1], padding[0], padding[3], padding[2]), groups)


def _other_image(right: Function, dy: Tensor, *rest: Any) -> tuple[Any, ...]:
    dx, *_ = right(dy, *rest)
    return dx, *right(dy.roll(1, 0), *rest)[1:]


def _in_lines(name: str, attribute: str, wrong: Function, shows: str, backend: str = "compiled") -> Mutant:
    """What bfloat16 takes on a CPU."""
    return part("conv2d", name, conv, attribute, wrong, shows, backend, BF16)


CONVOLUTION = [
    _in_lines("tap one row off", "lines", _a_row_off, "many taps"),
    _in_lines("no zeros between the rows", "line_steps", _rows_touch, "many taps"),
    _in_lines("no zeros between the images", "line_steps", _images_touch, "many taps"),
    _in_lines(
        "blocks' rows and columns exchanged", "kernel_from_depth", _turned_blocks, "stride and padding"
    ),
    _in_lines(
        "added taps kept, first taps dropped", "kernel_from_depth", _first_taps_dropped, "stride and padding"
    ),
    _in_lines(
        "kernel filled up at the wrong end", "kernel_to_depth", _last_taps_for_first, "stride and padding"
    ),
    part("conv2d", "padding cut off on the wrong side", conv, "input_gradient", _wrong_side),
    part(
        "conv2d",
        "the other tower's columns",
        conv,
        "columns",
        lambda right, *arguments: right(*arguments).roll(1, 0),
        "towers, unequal sides",
    ),
    part(
        "conv2d",
        "columns of the next image",
        conv,
        "columns",
        lambda right, x, *rest: right(x.roll(1, 0), *rest),
    ),
    part("conv2d", "db of the first image", conv, "bias_gradient", lambda right, dy: right(dy[:1])),
]

LIBRARY = [
    _in_lines(
        "added taps kept, first taps dropped",
        "kernel_from_depth",
        _first_taps_dropped,
        "stride and padding",
        "library",
    ),
    part("conv2d", "padding cut off on the wrong side", conv, "input_gradient", _wrong_side, "", "library"),
    backward("conv2d", "dw with images out of step", _other_image, "", "library"),
]

# ---- cross-entropy --------------------------------------------------------------------------------------------

CROSS_ENTROPY = [
    backward(
        "cross_entropy",
        "mean over the batch missing",
        lambda right, dloss, x, lse, target, smoothing, _: right(dloss, x, lse, target, smoothing, "sum"),
    ),
    part(
        "cross_entropy",
        "smoothing forgotten in the backward",
        pointwise,
        "_loss_gradient",
        lambda right, dloss, x, lse, target, _, reduction: right(dloss, x, lse, target, 0.0, reduction),
        "labels smoothed",
    ),
    part(
        "cross_entropy",
        "a batch's losses weighed by the first",
        pointwise,
        "_loss_gradient",
        lambda right, dloss, *rest: right(*batched(dloss[:1].expand_as(dloss).contiguous()), *rest),
        "a loss for each image",
    ),
]

# ---- the pairs of CUDA ------------------------------------------------------------------------------------------


def _turned_back(right: Function, winners: list[Tensor], turn: Any, kernel: Any, *rest: Any) -> Tensor:
    return right(winners, turn[::-1], kernel, *rest)


def _one_map_further(right: Function, a: Tensor, dim: int, shifts: int, length: int) -> Tensor:
    return right(a.roll(1, dim), dim, shifts, length)


def _only_along_rows(right: Function, a: Tensor, size: int) -> Tensor:
    padded = F.pad(a, (0, 0, size // 2, size // 2))
    return on_cuda.shifted_sum(padded, 2, size, a.shape[2])


def _never_reflected(right: Function, a: Tensor, size: int, groups: Any, reflected: bool = False) -> Tensor:
    return right(a, size, groups)


def _one_tower(right: Function, a: Tensor, size: int, groups: Any, reflected: bool = False) -> Tensor:
    return right(a, size, groups and 1, reflected)


def _last_window_only(right: Function, winners: list[Tensor], turn: Any, *rest: Any) -> Tensor:
    return right(winners, turn, *rest) & (turn == (0, 0))


PAIRS_OF_CUDA = [
    part_on_cuda(_LRN, "tower boundary ignored", "window_sum", _one_tower, "two towers"),
    part_on_cuda(
        _LRN, "even window not reflected", "window_sum", _never_reflected, "even window, two towers"
    ),
    part_on_cuda(_LRN, "window one map further on", "shifted_sum", _one_map_further),
    part_on_cuda(_LRN, "s^-3/4 where s^-7/4 belongs", "slope", lambda right, s, beta: on_cuda.gain(s, beta)),
    part_on_cuda("same_map_norm", "sum over a row for the square", "square_sum", _only_along_rows),
    part_on_cuda(
        "same_map_norm",
        "divided by n, not by n^2",
        "area",
        lambda right, size, groups: size,
    ),
    part_on_cuda(
        "same_map_norm",
        "stored q is dy x, without the power",
        "competitors",
        lambda right, dy, x, *rest: dy * x,
    ),
    part_on_cuda("max_pool2d", "only the last of a pixel's windows", "_wins", _last_window_only),
    part_on_cuda(
        "max_pool2d", "windows' rows and columns exchanged", "_wins", _turned_back, "overlapping windows"
    ),
    part_on_cuda("max_pool2d", "winner's row and column exchanged", "_won", _row_and_column_exchanged),
    part_on_cuda(
        _BLOCK,
        "the ReLU's mask forgotten, paper's order",
        "norm_gradient",
        lambda right, dy, x, constants, groups, relu: right(
            dy, x.clamp(min=0) if relu else x, constants, groups, False
        ),
    ),
    part_on_cuda(
        _BLOCK,
        "closed windows have a winner, 2012 order",
        "closed",
        lambda right, m, winners, order, *rest: (
            right(m, winners, order, *rest)[0],
            *right(m, winners, "", *rest)[1:],
        ),
        "closed windows, code",
    ),
    part_on_cuda(
        "dropout",
        "every slice has the first rows' mask",
        "row_words",
        lambda right, rows, key, first_row: right(rows, key, 0),
        "second half of a batch",
    ),
    part_on_cuda(
        "dropout",
        "units not mixed: neighbours share bits",
        "unit_words",
        lambda right, units, device: torch.arange(units, device=device),
    ),
]

MUTANTS_OF_COMPILED = (
    *(*SMALL, *MAX_POOL, *NORMS, *BLOCK, *CONVOLUTION, *LIBRARY, *CROSS_ENTROPY),
    *PAIRS_OF_CUDA,
)
