"""Response normalisation in one pass forward and two backward; derivation in layers/local_response_norm.py.

The maps of one pixel lie together in memory, so a tensor is M rows of C numbers, one row a pixel, and the
neighbour j maps away is the same tensor read j numbers further on. At the end of a row that would be the next
pixel: those terms are replaced by 0, by a table of C zeros and ones per neighbour that also ends every tower
(by torch.where, a blend of vectors: a mask of bits goes through memory and takes four times as long). Such reads run
as fast as a copy; padding the last dimension instead is 2 to 4 times slower. Only the first and the last row would
read outside the tensor, so these two are computed apart.

Kept: x. The powers are computed again in the backward, which is cheaper than to write and read s.

This is the form for channels-last tensors, which the network's are. What lies map by map (N, C, H, W) stays so: see
norm_by_maps.py.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import constant
from alexnet.layers.compiled.norm_by_maps import norm_by_maps, norm_by_maps_backward
from alexnet.layers.local_response_norm import Norm, inverse_power
from alexnet.layers.pair import wide

Reach = tuple[int, int]  # neighbours (before, after)


@constant
def inside(C: int, groups: int, before: int, after: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(before + 1 + after, C): 1 where map c has a neighbour j maps away in its own tower, else 0."""
    c = torch.arange(C, device=device)
    first = c // (C // groups) * (C // groups)
    j = torch.arange(-before, after + 1, device=device)[:, None]
    return ((c + j >= first) & (c + j < first + C // groups)).to(dtype)


def reach(size: int, maps: int) -> Reach:
    """Neighbours before and after in W(c), as many as a tower of `maps` can have."""
    return min(size // 2, maps - 1), min((size - 1) // 2, maps - 1)


def pieces(rows: Tensor, pixels: int) -> list[Tensor]:
    """The first row, the rows between, the last row: what `window_sums` belongs to. Images of one pixel are left
    whole: between the ends of a batch of such there may be one row or none, which would need a graph of its own."""
    return [rows] if pixels == 1 else [rows[:1], rows[1:-1], rows[-1:]]


def window_sums(
    rows: Tensor, pixels: int, term: Callable[[Tensor], Tensor], keep: Tensor, before: int
) -> list[Tensor]:
    """For each of the `pieces`: the sum of term(x[j]) over the window of each map."""
    M, C = rows.shape
    after = len(keep) - 1 - before
    flat = rows.reshape(-1)

    def total(neighbours: list[Tensor]) -> Tensor:
        terms = (term(x) if i == before else kept(term(x), keep[i]) for i, x in enumerate(neighbours))
        return sum(terms)  # type: ignore[return-value]

    def edge(row: Tensor) -> Tensor:
        padded = F.pad(row, (before, after))
        return total([padded[:, i : i + C] for i in range(len(keep))])

    if pixels == 1:
        return [edge(rows)]
    shifts = range(-before, after + 1)
    between = total([flat[C + j : (M - 1) * C + j].view(-1, C) for j in shifts])
    return [edge(rows[:1]), between, edge(rows[-1:])]


def kept(terms: Tensor, keep: Tensor) -> Tensor:
    """The terms that the table keeps, else 0: a product with 0 would keep the NaN of another pixel."""
    return torch.where(keep > 0, terms, 0)


def norm_rows(x: Tensor, keep: Tensor, before: int, norm: Norm, relu: bool) -> Tensor:
    """x (N, ..., C) -> y, of x or of max(x, 0)."""
    size, alpha, beta, k, _ = norm
    rows, pixels = x.flatten(0, -2), x.shape[1:-1].numel()
    sums = window_sums(rows, pixels, lambda x: response(x, relu) ** 2, keep, before)
    y = [
        (response(x, relu) * inverse_power(k + alpha / size * total, beta)).to(rows.dtype)
        for x, total in zip(pieces(rows, pixels), sums, strict=True)
    ]
    return torch.cat(y).view(x.shape)


def norm_rows_backward(
    dy: Tensor, x: Tensor, keep: Tensor, reflected: Tensor, before: int, norm: Norm, relu: bool
) -> list[Tensor]:
    """dy, x (N, ..., C) -> the `pieces` of dx. `before` is that of the forward's window; the backward's is the
    reflected one."""
    size, alpha, beta, k, _ = norm
    drows, rows, pixels = dy.flatten(0, -2), x.flatten(0, -2), x.shape[1:-1].numel()
    sums = window_sums(rows, pixels, lambda x: response(x, relu) ** 2, keep, before)
    t, q = [], []
    for d, a, total in zip(pieces(drows, pixels), pieces(rows, pixels), sums, strict=True):
        t_piece, q_piece = gained_and_competing(d, response(a, relu), k + alpha / size * total, beta)
        t.append(t_piece)
        q.append(q_piece)
    # q gets a row of zeros at each end, so that no neighbour of the backward is outside it.
    nothing = torch.zeros_like(rows[:1], dtype=q[0].dtype)
    flat, C = torch.cat([nothing, *q, nothing]).reshape(-1), rows.shape[1]
    after = len(keep) - 1 - before
    dx, row = [], 1
    for d, a in zip(t, pieces(rows, pixels), strict=True):
        end = row + len(d)
        shifted = {j: flat[row * C + j : end * C + j].view(-1, C) for j in range(-after, before + 1)}
        competition = sum(kept(q_j, reflected[after + j]) if j else q_j for j, q_j in shifted.items())
        a = response(a, relu)
        piece = d - 2 * alpha * beta / size * a * competition
        dx.append((torch.where(a <= 0, 0, piece) if relu else piece).to(rows.dtype))
        row = end
    return dx


def response(x: Tensor, relu: bool) -> Tensor:
    """What the norm sees, in the type it computes in."""
    x = x.to(wide(x.dtype))
    return x.clamp(min=0) if relu else x


def gained_and_competing(d: Tensor, a: Tensor, s: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """t = d s^-beta and q = t a / s, in an order in which no product underflows where q does not."""
    t = d * inverse_power(s, beta)
    if beta == 0.75:
        root = s.rsqrt()  # the same root as in the power: no division
        return t, t * (a * root * root)
    return t, t * (a / s)


@compiled
def _forward(rows: Tensor, keep: Tensor, before: int, norm: Norm) -> Tensor:
    return norm_rows(rows, keep, before, norm, relu=False)


@compiled
def _backward(dy: Tensor, x: Tensor, keep: Tensor, reflected: Tensor, before: int, norm: Norm) -> Tensor:
    dx = norm_rows_backward(dy, x, keep, reflected, before, norm, relu=False)
    return torch.cat(dx).view(x.shape)


@compiled
def _backward_into(
    dx: list[Tensor],
    dy: Tensor,
    x: Tensor,
    keep: Tensor,
    reflected: Tensor,
    before: int,
    norm: Norm,
    relu: bool,
) -> None:
    """Given the pieces one by one, the compiler writes each where it belongs; into one tensor it would copy them."""
    values = norm_rows_backward(dy, x, keep, reflected, before, norm, relu)
    for piece, value in zip(dx, values, strict=True):
        piece.copy_(value)


def local_response_norm_forward(x: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """x (N, C, ...) and size, alpha, beta, k, groups -> y; keeps x."""
    norm = Norm(*constants)
    if lies_by_maps(x):
        return norm_by_maps(x, norm, reach(norm.size, x.shape[1] // norm.groups)), x
    (rows,) = batched(x.movedim(1, -1).contiguous())
    keep, _, before = neighbours(rows, norm)
    return _forward(rows, keep, before, norm).movedim(-1, 1), x


def local_response_norm_backward(dy: Tensor, x: Tensor, *constants: Any) -> Tensor:
    """dy (N, C, ...) -> dx."""
    norm = Norm(*constants)
    if lies_by_maps(x):
        return norm_by_maps_backward(dy, x, norm, reach(norm.size, x.shape[1] // norm.groups))
    dy, x = batched(dy.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous())
    return _backward(dy, x, *neighbours(x, norm), norm).movedim(-1, 1)


def lies_by_maps(x: Tensor) -> bool:
    """Whether x (N, C, ...) lies as torch lays a new tensor, a map together; else, or with one pixel, by pixels."""
    return x.is_contiguous() and x.shape[2:].numel() > 1 and x.shape[1] > 1


def backward_into(dx: Tensor, dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> None:
    """dx of the norm, with relu=True that of the ReLU in front of it too; all three (N, ..., C) contiguous."""
    dy, x = batched(dy, x)
    parts = pieces(dx.flatten(0, -2), x.shape[1:-1].numel())
    if len(x) > 1:  # a single image is a constant, and so are its rows
        parts = [batched(part)[0] for part in parts]
    _backward_into(parts, dy, x, *neighbours(x, norm), norm, relu)


def neighbours(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, int]:
    """x (..., C) -> the tables of W and of W reflected, and how many neighbours W has before its map."""
    C, groups = x.shape[-1], norm.groups
    before, after = reach(norm.size, C // groups)
    where = wide(x.dtype), x.device
    return inside(C, groups, before, after, *where), inside(C, groups, after, before, *where), before
