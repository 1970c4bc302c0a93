"""Response normalisation inside one map, compiled; derivation in layers/same_map_norm.py. Kept: x."""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.backend import wide
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import Norm, gain_and_slope
from alexnet.layers.local_response_norm import inverse_power


def same_map_norm_forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) -> y; keeps x."""
    return _forward(*batched(channels_last(x)), (size, alpha, beta, k)).permute(0, 3, 1, 2), x


def same_map_norm_backward(dy: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """dy (N, C, H, W) -> dx."""
    pixels = batched(channels_last(dy), channels_last(x))
    return _backward(*pixels, (size, alpha, beta, k)).permute(0, 3, 1, 2)


def square_sum(x: Tensor, size: int) -> Tensor:
    """x (N, H, W, C): for each pixel the sum over the square centred on it, zeros outside."""
    half, (H, W) = size // 2, x.shape[1:3]
    padded = F.pad(x, (0, 0, half, half, half, half))
    rows = torch.stack([padded[:, :, j : j + W] for j in range(size)]).sum(0)
    return torch.stack([rows[:, i : i + H] for i in range(size)]).sum(0)


@compiled
def _forward(x: Tensor, norm: Norm) -> Tensor:
    size, alpha, beta, k = norm
    x_wide = x.to(wide(x.dtype))
    s = k + alpha / size**2 * square_sum(x_wide * x_wide, size)
    return (x_wide * inverse_power(s, beta)).to(x.dtype)


@compiled
def _backward(dy: Tensor, x: Tensor, norm: Norm) -> Tensor:
    size, alpha, beta, k = norm
    x_wide = x.to(wide(x.dtype))
    gain, slope = gain_and_slope(k + alpha / size**2 * square_sum(x_wide * x_wide, size), beta)
    competition = square_sum(dy * x_wide * slope, size)
    return (dy * gain - 2 * alpha * beta / size**2 * x_wide * competition).to(x.dtype)
