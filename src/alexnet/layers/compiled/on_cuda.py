"""Norms, block, pooling gradient and dropout in the form that CUDA's compiler fuses into single kernels.

The files beside this one are written for a CPU: windows are shifted views of flat memory, the first and the last pixel
are computed apart, the results joined by `cat`. A CPU's compiler fuses all of that into one loop. CUDA's compiler
writes every piece of a `cat` or a `stack` to memory and reads it back. Here a window is a sum of shifted views of a
tensor padded with zeros, and every value is computed again wherever it is read (`graphs.fused`), so a kernel reads its
inputs and writes its outputs and nothing else. The padding becomes a condition on each read: what lies outside the
window is never read, so a NaN stays where the reference has it.

On a CPU this form is slower, hence the two: the response norm of (16, 96, 55, 55) float32 takes 18.7 ms forward against
6.9 there (torch 2.14.1, one thread, CPU time, minimum of 5).

The gradient of a norm, in the words of layers/local_response_norm.py, with q = dy x s^(-beta-1):

    dx = dy s^-beta - 2 alpha beta / size x sum_{W*} q

q is computed again for every term of the sum where the window has few, and stored once in between where it has many.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled, fused
from alexnet.layers.backend import Pair, wide
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import Norm, reach, response
from alexnet.layers.compiled.max_pool2d import _won, max_pool2d_forward, pooled
from alexnet.layers.compiled.pointwise import dropout_backward
from alexnet.layers.compiled.relu_lrn_pool import UNPADDED, closed
from alexnet.layers.dropout import mix, row_words, unit_words
from alexnet.layers.max_pool2d import Size, Two, output_size

FEW = 8  # terms of a window up to which q is computed again for each of them

# ---- both norms; groups: the towers of the response norm, None for the same-map norm ------------------------------


def local_response_norm_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[Tensor, Tensor]:
    """x (N, C, ...) -> y; keeps x."""
    (x_last,) = batched(x.movedim(1, -1).contiguous())
    return _normalised(x_last, (size, alpha, beta, k), groups, False).movedim(-1, 1), x


def local_response_norm_backward(
    dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    """dy (N, C, ...) -> dx."""
    dy, x = dy.movedim(1, -1).contiguous(), x.movedim(1, -1).contiguous()
    return norm_gradient(dy, x, (size, alpha, beta, k), groups, relu=False).movedim(-1, 1)


def same_map_norm_forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) -> y; keeps x."""
    (x_NHWC,) = batched(channels_last(x))
    return _normalised(x_NHWC, (size, alpha, beta, k), None, False).permute(0, 3, 1, 2), x


def same_map_norm_backward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """dy (N, C, H, W) -> dx."""
    dy, x = channels_last(dy), channels_last(x)
    return norm_gradient(dy, x, (size, alpha, beta, k), None, relu=False).permute(0, 3, 1, 2)


def norm_gradient(dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    """dy, x (N, ..., C) -> dx; with relu=True of a ReLU in front of the norm too."""
    dy, x = batched(dy, x)
    if area(norm[0], groups) <= FEW:
        return _gradient_at_once(dy, x, norm, groups, relu)
    (q,) = batched(_q(dy, x, norm, groups, relu))
    return _gradient(q, dy, x, norm, groups, relu)


@fused
def _normalised(x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    """x (N, ..., C) -> y, of x or of max(x, 0)."""
    a = response(x, relu)
    return (a * gain(denominator(a, norm, groups), norm[2])).to(x.dtype)


@fused
def _gradient_at_once(dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    return gradient(competitors(dy, x, norm, groups, relu), dy, x, norm, groups, relu)


@fused
def _q(dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    return competitors(dy, x, norm, groups, relu)


@fused
def _gradient(q: Tensor, dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    return gradient(q, dy, x, norm, groups, relu)


def competitors(dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    """q, in the type the norm is computed in."""
    a = response(x, relu)
    return dy * a * slope(denominator(a, norm, groups), norm[2])


def gradient(q: Tensor, dy: Tensor, x: Tensor, norm: Norm, groups: int | None, relu: bool) -> Tensor:
    size, alpha, beta, _ = norm
    a = response(x, relu)
    t = dy * gain(denominator(a, norm, groups), beta)
    competition = window_sum(q, size, groups, reflected=True)
    dx = t - 2 * alpha * beta / area(size, groups) * a * competition
    return (torch.where(a <= 0, 0, dx) if relu else dx).to(x.dtype)


def denominator(a: Tensor, norm: Norm, groups: int | None) -> Tensor:
    """s of every response."""
    size, alpha, _, k = norm
    return k + alpha / area(size, groups) * window_sum(a**2, size, groups)


def gain(s: Tensor, beta: float) -> Tensor:
    """s^-beta; s is named once, since the compiler works it out again for every mention."""
    return (s.rsqrt() ** 3).sqrt() if beta == 0.75 else s**-beta


def slope(s: Tensor, beta: float) -> Tensor:
    """s^(-beta-1)."""
    return gain(s, beta) / s


def area(size: int, groups: int | None) -> int:
    """Responses in an uncut window."""
    return size if groups is not None else size**2


def window_sum(a: Tensor, size: int, groups: int | None, reflected: bool = False) -> Tensor:
    """a (N, ..., C) -> for each response the sum over its window, or over the windows that hold it."""
    if groups is None:
        return square_sum(a, size)
    maps = a.shape[-1] // groups
    before, after = reversed(reach(size, maps)) if reflected else reach(size, maps)
    towers = F.pad(a.unflatten(-1, (groups, maps)), (before, after))
    return shifted_sum(towers, -1, before + 1 + after, maps).flatten(-2)


def square_sum(a: Tensor, size: int) -> Tensor:
    """a (N, H, W, C) -> for each pixel the sum over the square centred on it. `size` is odd: its own reflection."""
    half, (H, W) = size // 2, a.shape[1:3]
    padded = F.pad(a, (0, 0, half, half, half, half))
    return shifted_sum(shifted_sum(padded, 2, size, W), 1, size, H)


def shifted_sum(a: Tensor, dim: int, shifts: int, length: int) -> Tensor:
    return sum(a.narrow(dim, shift, length) for shift in range(shifts))  # type: ignore[return-value]


# ---- pooling, and the block ---------------------------------------------------------------------------------------


def max_pool2d_backward(dy: Tensor, *saved: Tensor | Size | Two | bool | str) -> Tensor:
    """dy (N, C, P, Q), the winners, (H, W) and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, kernel, stride, padding, _, ties = saved
    dy_NPQC = channels_last(dy if dy.dim() == 4 else dy[None])
    dx = pool_gradient(dy_NPQC, winners, size, kernel, stride, padding, ties).permute(0, 3, 1, 2)  # type: ignore[arg-type]
    return dx if dy.dim() == 4 else dx[0]


def pool_gradient(
    dy: Tensor, winners: list[Tensor], size: Size, kernel: Two, stride: Two, padding: Two, ties: str
) -> Tensor:
    """dy (N, P, Q, C) -> dx (N, H, W, C)."""
    dy, *winners = batched(dy, *winners)
    return _pool_gradient(dy, winners, size, kernel, stride, padding, ties)


@fused
def _pool_gradient(
    dy: Tensor, winners: list[Tensor], size: Size, kernel: Two, stride: Two, padding: Two, ties: str
) -> Tensor:
    """With the padding counted in, pixel i = u a + rho belongs to the windows a - t at the places rho + u t.

    The image is seen as blocks of stride x stride pixels, (N, A, u, B, v, C): all pixels of a block read the same
    windows, and each compares their winners with places of its own.
    """
    deep = [-(-kernel[axis] // stride[axis]) for axis in (0, 1)]  # windows that hold a pixel, along each axis
    A, B = (-(-(size[axis] + padding[axis]) // stride[axis]) for axis in (0, 1))
    sides = (0, 0, deep[1] - 1, B - dy.shape[2], deep[0] - 1, A - dy.shape[1])
    windows = F.pad(dy.to(wide(dy.dtype)), sides)
    won = [
        F.pad(bits, sides) for bits in winners
    ]  # of windows that are not there: they pay 0 to whom they may
    total = torch.zeros((), dtype=windows.dtype, device=dy.device)
    for t in range(deep[0]):
        for s in range(deep[1]):
            rows, columns = (
                slice(deep[0] - 1 - t, deep[0] - 1 - t + A),
                slice(deep[1] - 1 - s, deep[1] - 1 - s + B),
            )
            block = (slice(None), rows, None, columns, None)
            mine = _wins([bits[block] for bits in won], (t, s), kernel, stride, ties)
            total = total + torch.where(mine, windows[block], 0)
    pixels = total.flatten(3, 4).flatten(1, 2)
    return pixels[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].to(dy.dtype)


def _wins(winners: list[Tensor], turn: Two, kernel: Two, stride: Two, ties: str) -> Tensor:
    """(N, A, u, B, v, C): whether a pixel of a block won the window `turn` = (t, s) before its block's own."""
    device = winners[0].device
    rho, sigma = (
        torch.arange(stride[0], device=device).view(-1, 1, 1, 1),
        torch.arange(stride[1], device=device),
    )
    wins = torch.zeros((), dtype=torch.bool, device=device)
    for r in range(stride[0] * turn[0], min(stride[0] * (turn[0] + 1), kernel[0])):
        for c in range(stride[1] * turn[1], min(stride[1] * (turn[1] + 1), kernel[1])):
            here = (rho == r % stride[0]) & (sigma == c % stride[1]).view(-1, 1)
            wins = wins | here & _won(winners, r * kernel[1] + c, ties)
    return wins


def relu_lrn_pool_forward(
    x: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    kernel: Two,
    stride: Two,
    ceil_mode: bool,
    order: str,
    groups: int,
    ties: str,
) -> tuple[Tensor, ...]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps x and the winners."""
    (x_NHWC,) = batched(channels_last(x))
    windows = output_size(x.shape[-2:], kernel, stride, UNPADDED, ceil_mode)
    b = _normalised(x_NHWC, (size, alpha, beta, k), groups, order == "relu_lrn_pool")
    y, *winners = _pooled(*batched(b), windows, kernel, stride, order, ties)
    return y.permute(0, 3, 1, 2), x, *winners


# Apart from the norm: the running maximum and the winner name every place of a window many times over, and with a norm
# at each place the kernel took minutes to compile.
@fused
def _pooled(b: Tensor, windows: Two, kernel: Two, stride: Two, order: str, ties: str) -> tuple[Tensor, ...]:
    m, winners = pooled(b, None, windows, kernel, stride, UNPADDED, ties)
    return closed(m, winners, order, ties, b.dtype)


def relu_lrn_pool_backward(dy: Tensor, x: Tensor, *saved: Tensor | Two | float | str | bool) -> Tensor:
    """dy (N, C, P, Q), x, the winners and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, alpha, beta, k, kernel, stride, _, order, groups, ties = saved
    db = pool_gradient(channels_last(dy), winners, x.shape[-2:], kernel, stride, UNPADDED, ties)  # type: ignore[arg-type]
    norm = (size, alpha, beta, k)
    dx = norm_gradient(db, channels_last(x), norm, groups, relu=order == "relu_lrn_pool")  # type: ignore[arg-type]
    return dx.permute(0, 3, 1, 2)


# ---- dropout ------------------------------------------------------------------------------------------------------


def dropout_forward(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> y = scale m x; keeps the mask, one byte a unit.

    The key is a tensor, the only input that changes from step to step: a captured step draws new masks. p, first_row
    and scale are constants of the graph.
    """
    (x_NU,) = batched(x.unsqueeze(-1).flatten(1).contiguous())
    y, keep = _dropout(x_NU, key, p, first_row, scale)
    return y.view(x.shape), keep.view(x.shape)


# Not `fused`: every step of the hash names its word twice, and working each mention out anew takes a minute to compile.
@compiled
def _dropout(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    words = row_words(len(x), key, first_row) ^ unit_words(x.shape[1], x.device)
    keep = mix(words) >= round(p * 2**32)
    return torch.where(keep, x.to(wide(x.dtype)) * scale, 0).to(x.dtype), keep


ON_CUDA = {
    "local_response_norm": Pair(local_response_norm_forward, local_response_norm_backward),
    "same_map_norm": Pair(same_map_norm_forward, same_map_norm_backward),
    "relu_lrn_pool": Pair(relu_lrn_pool_forward, relu_lrn_pool_backward),
    "max_pool2d": Pair(max_pool2d_forward, max_pool2d_backward),
    "dropout": Pair(dropout_forward, dropout_backward),
}
