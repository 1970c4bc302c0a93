"""Response normalisation inside one map: the 2012 code's `cnorm2`, which the paper does not mention.

It stands after the response norm of block 2 (layers-145.cfg:107-117). A unit competes with its neighbours in
space instead of its neighbours in map order; the rest is local_response_norm.py.

Forward. Fix one image and one map, and write x[p] for the response at pixel p = (row, column). The window W(p)
is the square of n x n pixels centred on p, n odd, cut at the border of the map:

    s[p] = k + (alpha/n^2) sum_{q in W(p)} x[q]^2
    y[p] = x[p] s[p]^-beta

The division is by n^2 even where the window is cut: pixels outside count as zeros.

How x[p] reaches the loss. As the numerator of its own y[p], and inside s[q] for every q whose window holds p.
The square is symmetric, so p lies in W(q) exactly when q lies in W(p): the reflected window is W(p) itself.

The pieces of the chain rule:

    ∂y[p]/∂x[p], s held fixed  =  s[p]^-beta
    ∂y[q]/∂s[q]                =  -beta x[q] s[q]^(-beta-1)
    ∂s[q]/∂x[p]                =  (2 alpha/n^2) x[p]  for q in W(p), else 0

Backward, given dy = ∂L/∂y of the loss L, with t[p] = dy[p] s[p]^-beta:

    dx[p] = t[p]  -  (2 alpha beta/n^2) x[p] sum_{q in W(p)} t[q] x[q] / s[q]

A square window is a row window of column windows, so a sum over n^2 pixels costs 2 (n - 1) additions.

Who differs: paper, Caffe's default and torch have no such layer (Caffe's LRN does with norm_region WITHIN_CHANNEL).
The 2012 code uses n = 5, alpha = 1e-3 divided by n^2 (layer.py:1183), beta = 0.75, and k = 1 always: its minDiv
reaches the cross-map norm only (layer.py:1185-1186).

Shapes: N images, C maps, H x W pixels; x, s, y, dy, dx alike (N, C, H, W).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import check_real
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.local_response_norm import check_norm, inverse_power, window_sum
from alexnet.layers.pair import PAIRS, Pair, apply_pair, cast, to_float32, wide


def square_sum(x: Tensor, size: int) -> Tensor:
    """For each pixel, the sum of x over the size x size square centred on it, cut at the border."""
    rows = window_sum(x, -1, size // 2, size // 2)
    return window_sum(rows, -2, size // 2, size // 2)


def same_map_norm_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, H, W) -> y; keeps x, and s in the type it was computed in: one tensor more than x."""
    x_wide = cast(x, wide(x.dtype))
    s = k + alpha / size**2 * square_sum(x_wide * x_wide, size)
    return cast(x_wide * inverse_power(s, beta), x.dtype), x, s


def same_map_norm_backward(
    dy: Tensor, x: Tensor, s: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """dy (N, C, H, W) -> dx. (k is already in s; a pair that keeps no s needs it.)"""
    x_wide = cast(x, s.dtype)
    t = dy * inverse_power(s, beta)
    competition = square_sum(t * x_wide / s, size)
    return cast(t - 2 * alpha * beta / size**2 * x_wide * competition, x.dtype)


PAIRS["same_map_norm", "reference"] = Pair(same_map_norm_forward, same_map_norm_backward)


def same_map_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    backend: str = Backend.reference,
) -> Tensor:
    """Response norm over size x size pixels of one map; alpha is divided by size**2.

    input (N, C, H, W) -> the same; float32 under autocast. Raises UserError unless size is odd and positive, alpha
    >= 0, k > 0, the input of four dimensions and of a real floating-point type.
    """
    _check("same_map_norm", size, alpha, beta, k)
    check_real("same_map_norm", input)
    if input.dim() != 4:
        raise UserError(f"same_map_norm: input {tuple(input.shape)} must be (N, C, H, W)")
    pair = pair_for("same_map_norm", backend)
    if pair is None:
        return _native(input, size, alpha, beta, k)
    return apply_pair(pair, (to_float32(input),), (int(size), alpha, beta, k))


def _check(name: str, size: int, alpha: float, beta: float, k: float) -> None:
    check_norm(name, size, alpha, beta, k)
    if size % 2 == 0:
        raise UserError(
            f"{name}: size={size} must be odd, for the square to have a centre: try size={size + 1}"
        )


def _native(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    # torch has no such layer; its mean pooling counts the padded zeros and so always divides by size**2.
    x = to_float32(x)
    mean_square = F.avg_pool2d(x * x, size, stride=1, padding=size // 2)
    return x / (k + alpha * mean_square) ** beta


class SameMapNorm(nn.Module):
    """The 2012 code's same-map response norm with a choice of backend. No parameters, no state."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        backend: str = Backend.reference,
    ) -> None:
        super().__init__()
        _check("SameMapNorm", size, alpha, beta, k)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.backend = checked("same_map_norm", backend)

    def forward(self, input: Tensor) -> Tensor:
        return same_map_norm(input, self.size, self.alpha, self.beta, self.k, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, backend={self.backend}"
