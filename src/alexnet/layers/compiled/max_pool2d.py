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

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.backend import wide
from alexnet.layers.compiled.layout import bordered, channels_last, constant
from alexnet.layers.max_pool2d import Size, Two, output_size

BITS = 7  # places to an int8


def max_pool2d_forward(
    x: Tensor, kernel: Two, stride: Two, padding: Two, ceil_mode: bool, ties: str
) -> tuple[Tensor, ...]:
    """x (N, C, H, W) or (C, H, W) -> y; keeps the winners, (N, P, Q, C) bytes."""
    x_NHWC = channels_last(x if x.dim() == 4 else x[None])
    windows = output_size(x.shape[-2:], kernel, stride, padding, ceil_mode)
    first = first_place(*windows, kernel, stride, padding, x.device) if any(padding) else None
    y, *winners = _forward(*batched(x_NHWC), first, windows, kernel, stride, padding, ties)
    return _as(y, x.dim()), *winners


def max_pool2d_backward(
    dy: Tensor,
    *saved: Tensor | Size | Two | bool | str,
) -> Tensor:
    """dy (N, C, P, Q), the winners, (H, W) and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, kernel, stride, padding, _, ties = saved
    dy_NPQC = channels_last(dy if dy.dim() == 4 else dy[None])
    return _as(gather(dy_NPQC, winners, size, kernel, stride, padding, ties), dy.dim())  # type: ignore[arg-type]


def _as(x_NHWC: Tensor, dimensions: int) -> Tensor:
    x = x_NHWC.permute(0, 3, 1, 2)
    return x if dimensions == 4 else x[0]


@constant
def first_place(P: int, Q: int, kernel: Two, stride: Two, padding: Two, device: torch.device) -> Tensor:
    """(P, Q, 1): where a window's search begins, its first place that is no padding."""
    r = (padding[0] - stride[0] * torch.arange(P, device=device)).clamp(min=0)
    s = (padding[1] - stride[1] * torch.arange(Q, device=device)).clamp(min=0)
    return (r[:, None] * kernel[1] + s)[..., None].float()


def pooled(
    x: Tensor, first: Tensor | None, windows: Two, kernel: Two, stride: Two, padding: Two, ties: str
) -> tuple[Tensor, list[Tensor]]:
    """x (N, H, W, C) -> the maxima (N, P, Q, C) in the type they are compared in, and the winners as floats."""
    candidates = [c.to(wide(x.dtype)) for c in _candidates(x, windows, kernel, stride, padding)]
    y = candidates[0]
    for x_k in candidates[1:]:
        y = torch.maximum(y, x_k)
    if ties == "first":
        place = torch.zeros_like(y)  # of a NaN, which equals nothing
        for number in reversed(range(len(candidates))):
            place = torch.where(candidates[number] == y, float(number), place)
        return y, [place if first is None else torch.maximum(place, first)]
    winners = []
    for start in range(0, len(candidates), BITS):
        some = enumerate(candidates[start : start + BITS])
        winners.append(sum(torch.where(x_k == y, float(2**bit), 0.0) for bit, x_k in some))
    return y, winners  # type: ignore[return-value]


def _candidates(x: Tensor, windows: Two, kernel: Two, stride: Two, padding: Two) -> list[Tensor]:
    """For each place of a window, row-major, the pixels that stand there: (N, P, Q, C) views.

    A window that reaches beyond the last row or column reads that row or column again: its maximum stays, the first
    winner stays, and no pixel asks for a place outside. Reading minus infinity instead takes three times as long.
    """
    if any(padding):
        x = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=float("-inf"))

    def along(axis: int, place: int) -> slice | Tensor:
        count, step, size = windows[axis], stride[axis], x.shape[axis + 1]
        if place + (count - 1) * step < size:
            return slice(place, place + (count - 1) * step + 1, step)
        return (place + step * torch.arange(count, device=x.device)).clamp(max=size - 1)

    return [x[:, along(0, r)][:, :, along(1, s)] for r in range(kernel[0]) for s in range(kernel[1])]


@compiled
def _forward(
    x: Tensor, first: Tensor | None, windows: Two, kernel: Two, stride: Two, padding: Two, ties: str
) -> tuple[Tensor, ...]:
    y, winners = pooled(x, first, windows, kernel, stride, padding, ties)
    return y.to(x.dtype), *(w.to(torch.int8) for w in winners)


def gather(
    dy: Tensor, winners: list[Tensor], size: Size, kernel: Two, stride: Two, padding: Two, ties: str
) -> Tensor:
    """dy (N, P, Q, C) -> dx (N, H, W, C)."""
    N, P, Q, C = dy.shape
    reach = [-(-kernel[a] // stride[a]) - 1 for a in (0, 1)]  # windows before its own that reach a pixel
    ends = [(size[a] - 1 + padding[a]) // stride[a] + 1 for a in (0, 1)]
    sides = (reach[1], ends[1] - Q, reach[0], ends[0] - P)
    dy_bordered, *winners_bordered = batched(
        bordered(dy, *sides), *(bordered(w, *sides, NOBODY[ties]) for w in winners)
    )
    dx = dy.new_empty((N, *size, C))
    planes, remainders, starts = [], [], []
    for rho in range(stride[0]):
        for sigma in range(stride[1]):
            rows, columns = (rho - padding[0]) % stride[0], (sigma - padding[1]) % stride[1]
            if rows < size[0] and columns < size[1]:
                planes.append(apart(dx[:, rows :: stride[0], columns :: stride[1]]))
                remainders.append((rho, sigma))
                starts.append(((rows + padding[0]) // stride[0], (columns + padding[1]) // stride[1]))
    _gather(list(batched(*planes)), dy_bordered, winners_bordered, remainders, starts, kernel, stride, ties)
    return dx


def apart(plane: Tensor) -> Tensor:
    """The same memory under a storage of its own: planes share no element, but the compiler sees that they share
    memory and would write the whole of it once for each."""
    return torch.from_dlpack(plane)


NOBODY = {"first": -1, "all": 0}  # the winners of a window that is not there


@compiled
def _gather(
    planes: list[Tensor],
    dy: Tensor,
    winners: list[Tensor],
    remainders: list[Two],
    starts: list[Two],
    kernel: Two,
    stride: Two,
    ties: str,
) -> None:
    """Writes dx plane by plane, each (N, A, B, C): the pixels of one pair of remainders."""
    for plane, remainder, start in zip(planes, remainders, starts, strict=True):
        plane.copy_(_paid(plane.shape, dy, winners, remainder, start, kernel, stride, ties).to(dy.dtype))


def _paid(
    shape: torch.Size,
    dy: Tensor,
    winners: list[Tensor],
    remainder: Two,
    start: Two,
    kernel: Two,
    stride: Two,
    ties: str,
) -> Tensor:
    """What the windows pay to the pixels (N, A, B, C) of one pair of remainders."""
    total = torch.zeros((), dtype=wide(dy.dtype), device=dy.device).expand(shape)
    (A, B), ahead = shape[1:3], [-(-kernel[a] // stride[a]) - 1 for a in (0, 1)]
    for t, r in enumerate(range(remainder[0], kernel[0], stride[0])):
        for u, s in enumerate(range(remainder[1], kernel[1], stride[1])):
            row, column = start[0] - t + ahead[0], start[1] - u + ahead[1]
            window = (slice(None), slice(row, row + A), slice(column, column + B))
            won = _won([w[window] for w in winners], r * kernel[1] + s, ties)
            total = total + torch.where(won, dy[window].to(total.dtype), 0)
    return total


def _won(winners: list[Tensor], place: int, ties: str) -> Tensor:
    if ties == "first":
        return winners[0].float() == float(place)
    half = (winners[place // BITS].float() * 2.0 ** -(place % BITS)).floor() * 0.5
    return half.floor() != half  # the bit is set: an odd number
