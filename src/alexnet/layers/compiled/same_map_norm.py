"""Response normalisation inside one map, compiled; derivation in layers/same_map_norm.py. Kept: x."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import gained_and_competing
from alexnet.layers.local_response_norm import inverse_power
from alexnet.layers.pair import wide


def same_map_norm_forward(x: Tensor, *norm: Any) -> tuple[Tensor, Tensor]:
    """x (N, C, H, W) and size, alpha, beta, k -> y; keeps x."""
    return _forward(*batched(channels_last(x)), norm).permute(0, 3, 1, 2), x


def same_map_norm_backward(dy: Tensor, x: Tensor, *norm: Any) -> Tensor:
    """dy (N, C, H, W) -> dx."""
    return _backward(*batched(channels_last(dy), channels_last(x)), norm).permute(0, 3, 1, 2)


def square_sum(x: Tensor, size: int) -> Tensor:
    """x (N, H, W, C): for each pixel the sum over the square centred on it, zeros outside."""
    half, (H, W) = size // 2, x.shape[1:3]
    padded = F.pad(x, (0, 0, half, half, half, half))
    rows = torch.stack([padded[:, :, j : j + W] for j in range(size)]).sum(0)
    return torch.stack([rows[:, i : i + H] for i in range(size)]).sum(0)


@compiled
def _forward(x: Tensor, norm: tuple[Any, ...]) -> Tensor:
    size, alpha, beta, k = norm
    x_wide = x.to(wide(x.dtype))
    s = k + alpha / size**2 * square_sum(x_wide * x_wide, size)
    return (x_wide * inverse_power(s, beta)).to(x.dtype)


@compiled
def _backward(dy: Tensor, x: Tensor, norm: tuple[Any, ...]) -> Tensor:
    size, alpha, beta, k = norm
    x_wide = x.to(wide(x.dtype))
    s = k + alpha / size**2 * square_sum(x_wide * x_wide, size)
    t, q = gained_and_competing(dy, x_wide, s, beta)
    return (t - 2 * alpha * beta / size**2 * x_wide * square_sum(q, size)).to(x.dtype)
