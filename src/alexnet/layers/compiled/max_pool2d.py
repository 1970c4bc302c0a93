"""Max pooling in one pass forward and one kernel per pixel parity backward; derivation in layers/max_pool2d.py.

Forward: a running maximum over the places of a window, each a strided view, and the winner's place as a running
number, both in registers. Winners are kept as bytes: the place for ties="first"; for ties="all" one bit for every
place that holds the maximum, seven to a byte.

Backward, a gather: pixel i (padding counted in) belongs to the windows p with 0 <= i - u p < R. With i = u a + rho
these are p = a - t at the place rho + u t, t = 0, 1, ...: the same few terms for all pixels of one remainder rho.
So there is one kernel for every pair of remainders (four when the stride is 2), each with as many terms as it
needs, and each pixel is written once, into a strided view of dx.

Comparisons are made on floats, because the compiler leaves comparisons of bytes scalar (ten times slower).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import bordered, channels_last, constant
from alexnet.layers.max_pool2d import Pool, Size, Two, first_inside, output_size
from alexnet.layers.pair import wide

BITS = 7  # places to an int8


def max_pool2d_forward(x: Tensor, *constants: Any) -> tuple[Tensor, ...]:
    """x (N, C, H, W) or (C, H, W) and the constants of `Pool` -> y; keeps the winners, (N, P, Q, C) bytes."""
    pool = Pool(*constants)
    x_NHWC = channels_last(x if x.dim() == 4 else x[None])
    windows = output_size(x.shape[-2:], *pool[:4])
    first = first_place(*windows, pool, x.device) if any(pool.padding) else None
    y, *winners = _forward(*batched(x_NHWC), first, windows, pool)
    return _as(y, x.dim()), *winners


def max_pool2d_backward(dy: Tensor, *winners_and_constants: Any) -> Tensor:
    """dy (N, C, P, Q), the winners, (H, W) and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, pool = *winners_and_constants[:-5], Pool(*winners_and_constants[-5:])
    dy_NPQC = channels_last(dy if dy.dim() == 4 else dy[None])
    return _as(gather(dy_NPQC, winners, size, pool), dy.dim())


def _as(x_NHWC: Tensor, dimensions: int) -> Tensor:
    x = x_NHWC.permute(0, 3, 1, 2)
    return x if dimensions == 4 else x[0]


@constant
def first_place(P: int, Q: int, pool: Pool, device: torch.device) -> Tensor:
    """(P, Q, 1): where a window's search begins, its first place that is not padding."""
    return first_inside(P, Q, pool.kernel, pool.stride, pool.padding, device)[..., None].float()


def pooled(x: Tensor, first: Tensor | None, windows: Two, pool: Pool) -> tuple[Tensor, list[Tensor]]:
    """x (N, H, W, C) -> the maxima (N, P, Q, C) in the type they are compared in, and the winners as floats."""
    candidates = [c.to(wide(x.dtype)) for c in _candidates(x, windows, pool)]
    y = candidates[0]
    for x_k in candidates[1:]:
        y = torch.maximum(y, x_k)
    if pool.ties == "first":
        place = torch.zeros_like(y)
        for number in reversed(range(len(candidates))):
            x_k = candidates[number]
            place = torch.where((x_k == y) | (x_k != x_k), float(number), place)
        return y, [place if first is None else torch.maximum(place, first)]
    winners = []
    for start in range(0, len(candidates), BITS):
        some = enumerate(candidates[start : start + BITS])
        winners.append(sum(torch.where(x_k == y, float(2**bit), 0.0) for bit, x_k in some))
    return y, winners  # type: ignore[return-value]


def _candidates(x: Tensor, windows: Two, pool: Pool) -> list[Tensor]:
    """For each place of a window, row-major, the pixels that stand there: (N, P, Q, C) views.

    A window that reaches beyond the last row or column reads that row or column again: its maximum stays, the first
    winner stays, and no pixel asks for a place outside. Reading minus infinity instead takes three times as long.
    """
    (rows, columns), (below, beside) = pool.kernel, pool.padding
    if any(pool.padding):
        x = F.pad(x, (0, 0, beside, beside, below, below), value=float("-inf"))

    def along(axis: int, place: int) -> slice | Tensor:
        count, step, size = windows[axis], pool.stride[axis], x.shape[axis + 1]
        if place + (count - 1) * step < size:
            return slice(place, place + (count - 1) * step + 1, step)
        return (place + step * torch.arange(count, device=x.device)).clamp(max=size - 1)

    return [x[:, along(0, r)][:, :, along(1, s)] for r in range(rows) for s in range(columns)]


@compiled
def _forward(x: Tensor, first: Tensor | None, windows: Two, pool: Pool) -> tuple[Tensor, ...]:
    y, winners = pooled(x, first, windows, pool)
    return y.to(x.dtype), *(w.to(torch.int8) for w in winners)


def gather(dy: Tensor, winners: list[Tensor], size: Size, pool: Pool) -> Tensor:
    """dy (N, P, Q, C) -> dx (N, H, W, C)."""
    kernel, stride, padding, _, ties = pool
    N, P, Q, C = dy.shape
    reach = [-(-kernel[a] // stride[a]) - 1 for a in (0, 1)]  # windows before its own that reach a pixel
    ends = [(size[a] - 1 + padding[a]) // stride[a] + 1 for a in (0, 1)]
    sides = (reach[1], ends[1] - Q, reach[0], ends[0] - P)
    dy_bordered, *winners_bordered = batched(
        bordered(dy, *sides), *(bordered(w, *sides, NO_WINNER[ties]) for w in winners)
    )
    # At a stride larger than the window there are pixels in no window: they get zeros, the others are all written.
    gaps = any(stride[a] > kernel[a] for a in (0, 1))
    dx = dy.new_zeros((N, *size, C)) if gaps else dy.new_empty((N, *size, C))
    planes, remainders, starts = [], [], []
    for rho in range(min(stride[0], kernel[0])):
        for sigma in range(min(stride[1], kernel[1])):
            rows, columns = (rho - padding[0]) % stride[0], (sigma - padding[1]) % stride[1]
            if rows < size[0] and columns < size[1]:
                planes.append(apart(dx[:, rows :: stride[0], columns :: stride[1]]))
                remainders.append((rho, sigma))
                starts.append(((rows + padding[0]) // stride[0], (columns + padding[1]) // stride[1]))
    _gather(list(batched(*planes)), dy_bordered, winners_bordered, remainders, starts, pool)
    return dx


def apart(plane: Tensor) -> Tensor:
    """The same memory under a storage of its own: planes share no element, but the compiler sees that they share
    memory and would write the whole of it once for each."""
    return plane if torch.compiler.is_compiling() else torch.from_dlpack(plane)


NO_WINNER = {"first": -1, "all": 0}  # the winners of a window that is not there


@compiled
def _gather(
    planes: list[Tensor],
    dy: Tensor,
    winners: list[Tensor],
    remainders: list[Two],
    starts: list[Two],
    pool: Pool,
) -> None:
    """Writes dx plane by plane, each (N, A, B, C): the pixels of one pair of remainders."""
    for plane, remainder, start in zip(planes, remainders, starts, strict=True):
        plane.copy_(_collected(plane.shape, dy, winners, remainder, start, pool).to(dy.dtype))


def _collected(
    shape: torch.Size, dy: Tensor, winners: list[Tensor], remainder: Two, start: Two, pool: Pool
) -> Tensor:
    """What the pixels (N, A, B, C) of one pair of remainders receive from the windows that they won."""
    kernel, stride = pool.kernel, pool.stride
    total = torch.zeros((), dtype=wide(dy.dtype), device=dy.device).expand(shape)
    (A, B), ahead = shape[1:3], [-(-kernel[a] // stride[a]) - 1 for a in (0, 1)]
    for t, r in enumerate(range(remainder[0], kernel[0], stride[0])):
        for u, s in enumerate(range(remainder[1], kernel[1], stride[1])):
            row, column = start[0] - t + ahead[0], start[1] - u + ahead[1]
            window = (slice(None), slice(row, row + A), slice(column, column + B))
            won = has_won([w[window] for w in winners], r * kernel[1] + s, pool.ties)
            total = total + torch.where(won, dy[window].to(total.dtype), 0)
    return total


def has_won(winners: list[Tensor], place: int, ties: str) -> Tensor:
    if ties == "first":
        return winners[0].float() == float(place)
    half = (winners[place // BITS].float() * 2.0 ** -(place % BITS)).floor() * 0.5
    return half.floor() != half  # the bit is set: an odd number
