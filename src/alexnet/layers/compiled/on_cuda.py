"""Norms, block, pooling gradient and dropout in the form that CUDA's compiler fuses into single kernels.

The files beside this one are written for a CPU: windows are shifted views of flat memory, the first and the last pixel
are computed apart, the results joined by `cat`. A CPU's compiler fuses all of that into one loop. CUDA's compiler
writes every piece of a `cat` or a `stack` to memory and reads it back. Here a window is a sum of shifted views of a
tensor padded with zeros, and every value is computed again wherever it is read (`compile.fused`), so a kernel reads its
inputs and writes its outputs and nothing else. The padding becomes a condition on each read: what lies outside the
window is never read, so a NaN stays where the reference has it.

On a CPU this form is slower, hence the two: the response norm of (16, 96, 55, 55) float32 takes 18.7 ms forward against
6.9 there (torch 2.14.1, one thread, CPU time, minimum of 5). The norm within a map is faster so on both, and has one
form (same_map_norm.py).

The gradient of a norm, as derived in layers/local_response_norm.py, with q = dy s^-beta x / s:

    dx = dy s^-beta - 2 alpha beta / size x sum_{W*} q

q is computed again for every term of the sum where the window has few, and stored once in between where it has many.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled, fused
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import reach, response
from alexnet.layers.compiled.max_pool2d import has_won, max_pool2d_forward, pooled
from alexnet.layers.compiled.pointwise import dropout_backward, laid_out
from alexnet.layers.compiled.relu_lrn_pool import closed, windows
from alexnet.layers.dropout import mix, row_words, unit_words
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool, Size, Two
from alexnet.layers.pair import Pair, wide

FEW = 8  # terms of a window up to which q is computed again for each of them

# ---- both norms; norm.groups: the towers of the response norm, 0 for the same-map norm -----------------------------


def local_response_norm_forward(x: Tensor, *constants: Any) -> tuple[Tensor, Tensor]:
    """x (N, C, ...) and size, alpha, beta, k, groups -> y; keeps x."""
    (x_last,) = batched(x.movedim(1, -1).contiguous())
    return _normalised(x_last, Norm(*constants), False).movedim(-1, 1), x


def local_response_norm_backward(dy: Tensor, x: Tensor, *constants: Any) -> Tensor:
    """dy (N, C, ...) -> dx."""
    dy, x = dy.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous()
    return norm_gradient(dy, x, Norm(*constants), False).movedim(-1, 1)


def norm_gradient(dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    """dy, x (N, ..., C) -> dx; with relu=True of a ReLU in front of the norm too."""
    dy, x = batched(dy, x)
    if area(norm) <= FEW:
        return _gradient_at_once(dy, x, norm, relu)
    (q,) = batched(_q(dy, x, norm, relu))
    return _gradient(q, dy, x, norm, relu)


@fused
def _normalised(x: Tensor, norm: Norm, relu: bool) -> Tensor:
    """x (N, ..., C) -> y, of x or of max(x, 0)."""
    a = response(x, relu)
    return (a * gain(denominator(a, norm), norm.beta)).to(x.dtype)


@fused
def _gradient_at_once(dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    return gradient(competitors(dy, x, norm, relu), dy, x, norm, relu)


@fused
def _q(dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    return competitors(dy, x, norm, relu)


@fused
def _gradient(q: Tensor, dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    return gradient(q, dy, x, norm, relu)


def competitors(dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    """q, in the type the norm is computed in; a / s before the power, which would underflow on its own."""
    a = response(x, relu)
    s = denominator(a, norm)
    return dy * gain(s, norm.beta) * (a / s)


def gradient(q: Tensor, dy: Tensor, x: Tensor, norm: Norm, relu: bool) -> Tensor:
    a = response(x, relu)
    t = dy * gain(denominator(a, norm), norm.beta)
    competition = window_sum(q, norm, reflected=True)
    dx = t - 2 * norm.alpha * norm.beta / area(norm) * a * competition
    return (torch.where(a <= 0, 0, dx) if relu else dx).to(x.dtype)


def denominator(a: Tensor, norm: Norm) -> Tensor:
    """s of every response."""
    return norm.k + norm.alpha / area(norm) * window_sum(a**2, norm)


def gain(s: Tensor, beta: float) -> Tensor:
    """s^-beta; s is named once, since the compiler works it out again for every mention."""
    return (s.rsqrt() ** 3).sqrt() if beta == 0.75 else s**-beta


def area(norm: Norm) -> int:
    """Responses in an uncut window."""
    return norm.size**2 if norm.groups == 0 else norm.size


def window_sum(a: Tensor, norm: Norm, reflected: bool = False) -> Tensor:
    """a (N, ..., C) -> for each response the sum over its window, or over the windows that hold it."""
    if norm.groups == 0:
        return square_sum(a, norm.size)
    maps = a.shape[-1] // norm.groups
    before, after = reversed(reach(norm.size, maps)) if reflected else reach(norm.size, maps)
    towers = F.pad(a.unflatten(-1, (norm.groups, maps)), (before, after))
    return shifted_sum(towers, -1, before + 1 + after, maps).flatten(-2)


def square_sum(a: Tensor, size: int) -> Tensor:
    """a (N, H, W, C) -> for each pixel the sum over the square centred on it. `size` is odd: its own reflection."""
    half, (H, W) = size // 2, a.shape[1:3]
    padded = F.pad(a, (0, 0, half, half, half, half))
    return shifted_sum(shifted_sum(padded, 2, size, W), 1, size, H)


def shifted_sum(a: Tensor, dim: int, shifts: int, length: int) -> Tensor:
    return sum(a.narrow(dim, shift, length) for shift in range(shifts))  # type: ignore[return-value]


# ---- pooling, and the block ---------------------------------------------------------------------------------------


def max_pool2d_backward(dy: Tensor, *winners_and_constants: Any) -> Tensor:
    """dy (N, C, P, Q), the winners, (H, W) and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, pool = *winners_and_constants[:-5], Pool(*winners_and_constants[-5:])
    dx = pool_gradient(channels_last(dy if dy.dim() == 4 else dy[None]), winners, size, pool)
    return dx.permute(0, 3, 1, 2) if dy.dim() == 4 else dx.permute(0, 3, 1, 2)[0]


def pool_gradient(dy: Tensor, winners: list[Tensor], size: Size, pool: Pool) -> Tensor:
    """dy (N, P, Q, C) -> dx (N, H, W, C)."""
    dy, *winners = batched(dy, *winners)
    return _pool_gradient(dy, winners, size, pool)


@fused
def _pool_gradient(dy: Tensor, winners: list[Tensor], size: Size, pool: Pool) -> Tensor:
    """With the padding counted in, pixel i = u a + rho belongs to the windows a - t at the places rho + u t.

    The image is seen as blocks of stride x stride pixels, (N, A, u, B, v, C): all pixels of a block read the same
    windows, and each compares their winners with places of its own.
    """
    kernel, stride, padding = pool[:3]
    deep = [-(-kernel[axis] // stride[axis]) for axis in (0, 1)]  # windows that hold a pixel, along each axis
    A, B = (-(-(size[axis] + padding[axis]) // stride[axis]) for axis in (0, 1))
    sides = (0, 0, deep[1] - 1, B - dy.shape[2], deep[0] - 1, A - dy.shape[1])
    windows = F.pad(dy.to(wide(dy.dtype)), sides)
    won = [F.pad(bits, sides) for bits in winners]  # windows that are not there send 0, whoever wins them
    total = torch.zeros((), dtype=windows.dtype, device=dy.device)
    for t in range(deep[0]):
        for s in range(deep[1]):
            row, column = deep[0] - 1 - t, deep[1] - 1 - s
            block = (slice(None), slice(row, row + A), None, slice(column, column + B), None)
            mine = _wins([bits[block] for bits in won], (t, s), pool)
            total = total + torch.where(mine, windows[block], 0)
    pixels = total.flatten(3, 4).flatten(1, 2)
    return pixels[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].to(dy.dtype)


def _wins(winners: list[Tensor], turn: Two, pool: Pool) -> Tensor:
    """(N, A, u, B, v, C): whether a pixel of a block won the window `turn` = (t, s) before its block's own."""
    kernel, stride, device = pool.kernel, pool.stride, winners[0].device
    rho = torch.arange(stride[0], device=device).view(-1, 1, 1, 1)
    sigma = torch.arange(stride[1], device=device)
    wins = torch.zeros((), dtype=torch.bool, device=device)
    for r in range(stride[0] * turn[0], min(stride[0] * (turn[0] + 1), kernel[0])):
        for c in range(stride[1] * turn[1], min(stride[1] * (turn[1] + 1), kernel[1])):
            here = (rho == r % stride[0]) & (sigma == c % stride[1]).view(-1, 1)
            wins = wins | here & has_won(winners, r * kernel[1] + c, pool.ties)
    return wins


def relu_lrn_pool_forward(x: Tensor, norm: Norm, pool: Pool, order: str) -> tuple[Tensor, ...]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps x and the winners."""
    (x_NHWC,) = batched(channels_last(x))
    b = _normalised(x_NHWC, norm, order == "relu_lrn_pool")
    y, *winners = _pooled(*batched(b), windows(x, pool), pool, order)
    return y.permute(0, 3, 1, 2), x, *winners


# Apart from the norm: the running maximum and the winner name every place of a window many times over, and with a norm
# at each place the kernel took minutes to compile.
@fused
def _pooled(b: Tensor, windows: Two, pool: Pool, order: str) -> tuple[Tensor, ...]:
    return closed(*pooled(b, None, windows, pool), order, pool.ties, b.dtype)


def relu_lrn_pool_backward(dy: Tensor, x: Tensor, *winners_and_constants: Any) -> Tensor:
    """dy (N, C, P, Q), x, the winners and the forward's constants -> dx (N, C, H, W)."""
    *winners, norm, pool, order = winners_and_constants
    db = pool_gradient(channels_last(dy), winners, x.shape[-2:], pool)
    return norm_gradient(db, channels_last(x), norm, order == "relu_lrn_pool").permute(0, 3, 1, 2)


# ---- dropout ------------------------------------------------------------------------------------------------------


def dropout_forward(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> y = scale m x; keeps the mask, one byte a unit.

    The key is a tensor, the only input that changes from step to step: a captured step draws new masks. p, first_row
    and scale are constants of the graph.
    """
    (x_NU,) = batched(x.unsqueeze(-1).flatten(1).contiguous())
    y, keep = _dropout(x_NU, key, p, first_row, scale)
    return laid_out(y.view(x.shape), x), keep.view(x.shape)


# Not `fused`: every step of the hash names its word twice, and working each mention out anew takes a minute to compile.
@compiled
def _dropout(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    words = row_words(len(x), key, first_row) ^ unit_words(x.shape[1], x.device)
    keep = mix(words) >= round(p * 2**32)
    return (x.to(wide(x.dtype)) * scale * keep).to(x.dtype), keep


ON_CUDA = {
    "local_response_norm": Pair(local_response_norm_forward, local_response_norm_backward),
    "relu_lrn_pool": Pair(relu_lrn_pool_forward, relu_lrn_pool_backward),
    "max_pool2d": Pair(max_pool2d_forward, max_pool2d_backward),
    "dropout": Pair(dropout_forward, dropout_backward),
}
