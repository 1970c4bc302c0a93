"""Local response normalisation across maps (section 3.3).

Forward. Fix one image and one pixel, and write x[c] for the response of map c. The window of map c is

    W(c) = { c - floor(n/2), ..., c - floor(n/2) + n - 1 },  cut at the first and last map of its tower:

n maps, centred on c when n is odd, with one map more below than above when n is even. Then

    s[c] = k + (alpha/n) sum_{j in W(c)} x[j]^2
    y[c] = x[c] s[c]^-beta

The division is by n even where the window is cut: a missing map counts as a map of zeros.

How x[c] reaches the loss. As the numerator of its own y[c], and inside the denominator s[i] of every map i whose
window holds c. Those maps are W*(c) = { i : c in W(i) }. Solving i - floor(n/2) <= c <= i - floor(n/2) + n - 1
for i gives

    W*(c) = { c + floor(n/2) - n + 1, ..., c + floor(n/2) },  cut likewise:

the window reflected at c. For odd n it is W(c) itself; for even n it lies one map higher, and a backward that
uses W(c) is wrong there.

The pieces of the chain rule:

    ∂y[c]/∂x[c], s held fixed  =  s[c]^-beta
    ∂y[i]/∂s[i]                =  -beta x[i] s[i]^(-beta-1)
    ∂s[i]/∂x[c]                =  (2 alpha/n) x[c]  for i in W*(c), else 0

Backward. dy[c] is ∂L/∂y[c] for the loss L, dx[c] is ∂L/∂x[c]. Multiply along each path and add the paths; x[c] does not
depend on i and leaves the sum:

    dx[c] = dy[c] s[c]^-beta  +  sum_{i in W*(c)} dy[i] (-beta x[i] s[i]^(-beta-1)) (2 alpha/n) x[c]

          = dy[c] s[c]^-beta  -  (2 alpha beta/n) x[c] sum_{i in W*(c)} dy[i] x[i] s[i]^(-beta-1)

The first term is the gain of the unit. The second is the competition: a unit that grows makes its neighbours
smaller. Both share t[c] = dy[c] s[c]^-beta, so the code takes one power:

    dx[c] = t[c]  -  (2 alpha beta/n) x[c] sum_{i in W*(c)} t[i] x[i] / s[i]

A check that needs no second implementation: multiply by x[c] and sum over c, then swap the two sums. For a fixed i the
inner sum over c is (alpha/n) sum_{c in W(i)} x[c]^2 = s[i] - k, so

    sum x dx = (1 - 2 beta) sum dy y  +  2 beta k sum dy y / s

Who differs, for the paper's n = 5, alpha = 1e-4, beta = 0.75, k = 2:

    paper       s = k + alpha sum, undivided; as alpha here that is 5e-4
    2012 code   divides alpha by n (layer.py:1183), k = 2; window inside one tower: groups = 2 here
    Caffe       divides alpha by n, k = 1; window crosses the towers; odd n only
    torch       divides alpha by n, k = 1 by default, whole tensor; even n as above. The meaning used here

Non-finite values stay with their pixel and tower. Map m holds one; s[i] has it for the maps i whose window holds m:

    x[m]                        y                                       dx
    NaN                         NaN in those maps i                     NaN in the maps whose W* holds such an i
    +inf, -inf                  NaN in m itself, 0 in the other i       NaN in the maps whose W* holds m
    finite, its square is not   0 in all those i                        0 in m, finite elsewhere
    NaN, inf with beta = 0      y = x; s^0 is 1, even for NaN           as above, 0 NaN is NaN; native: NaN in m itself

Shapes: N images, C maps in `groups` towers of C/groups, any number of further dimensions (none, L, or H x W);
x, s, y, dy, dx alike.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import check_number, check_positive, check_real
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, cast, to_float32, wide


class Norm(NamedTuple):
    """The constants, in the order of the functions below."""

    size: int
    alpha: float
    beta: float
    k: float
    groups: int  # towers; 0: none, the window lies inside one map (same_map_norm.py)


def window_sum(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """total[c] = sum of x[j] for j = c - before, ..., c + after along `dim`, cut at both ends."""
    total, length = x.clone(), x.shape[dim]
    for j in range(1, min(before, length - 1) + 1):
        total.narrow(dim, j, length - j).add_(x.narrow(dim, 0, length - j))
    for j in range(1, min(after, length - 1) + 1):
        total.narrow(dim, 0, length - j).add_(x.narrow(dim, j, length - j))
    return total


def map_window_sum(x: Tensor, before: int, after: int, groups: int) -> Tensor:
    """`window_sum` over the maps (dimension 1), each tower for itself."""
    towers = x.unflatten(1, (groups, x.shape[1] // groups))
    return window_sum(towers, 2, before, after).flatten(1, 2)


def inverse_power(s: Tensor, beta: float) -> Tensor:
    """s^-beta, s > 0. The paper's 3/4 is 1/2 + 1/4: two square roots, without a logarithm and an exponential."""
    if beta == 0.75:
        root = s.rsqrt()  # s^-1/2
        return root * root.sqrt()
    return s**-beta


def local_response_norm_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, C, ...) -> y; keeps x, and s in the type it was computed in: one tensor more than x."""
    x_wide = cast(x, wide(x.dtype))
    s = k + alpha / size * map_window_sum(x_wide * x_wide, size // 2, (size - 1) // 2, groups)
    return cast(x_wide * inverse_power(s, beta), x.dtype), x, s


def local_response_norm_backward(
    dy: Tensor, x: Tensor, s: Tensor, size: int, alpha: float, beta: float, k: float, groups: int
) -> Tensor:
    """dy (N, C, ...) -> dx. (k is already in s; a pair that keeps no s needs it.)"""
    x_wide = cast(x, s.dtype)
    t = dy * inverse_power(s, beta)
    competition = map_window_sum(t * x_wide / s, (size - 1) // 2, size // 2, groups)  # reflected: W*, not W
    return cast(t - 2 * alpha * beta / size * x_wide * competition, x.dtype)


PAIRS["local_response_norm", "reference"] = Pair(local_response_norm_forward, local_response_norm_backward)


def local_response_norm(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    *,
    groups: int = 1,
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.local_response_norm` with the gradient above, inside `groups` towers.

    input (N, C), (N, C, L) or (N, C, H, W); float32 under autocast. Raises UserError unless size is positive, alpha
    >= 0, k > 0, C a multiple of groups and the type a real floating-point type.
    """
    check_norm("local_response_norm", size, alpha, beta, k, groups)
    check_real("local_response_norm", input)
    if input.dim() < 2 or input.shape[1] % groups:
        raise UserError(
            f"local_response_norm: input {tuple(input.shape)} must be (N, C, ...) with C a multiple of groups={groups}"
        )
    pair = pair_for("local_response_norm", backend)
    if pair is None:
        return _native(input, size, alpha, beta, k, groups)
    return apply_pair(pair, (to_float32(input),), Norm(int(size), alpha, beta, k, int(groups)))


def check_norm(name: str, size: int, alpha: float, beta: float, k: float, groups: int = 1) -> None:
    """Raises UserError for constants with which s could be zero, negative or NaN."""
    check_positive(f"{name}: groups", groups)
    check_positive(f"{name}: size", size)
    check_number(f"{name}: alpha", alpha, 0)
    check_number(f"{name}: beta", beta, float("-inf"))
    check_number(f"{name}: k", k, 0, above=True)


def _native(x: Tensor, size: int, alpha: float, beta: float, k: float, groups: int) -> Tensor:
    # A tower is to torch a smaller image of its own; torch refuses (N, C), so that gets a dimension of size 1.
    towers = x.unflatten(1, (groups, x.shape[1] // groups)).flatten(0, 1)
    towers = towers if towers.dim() > 2 else towers[..., None]
    return F.local_response_norm(towers, size, alpha, beta, k).reshape(x.shape)


class LocalResponseNorm(nn.LocalResponseNorm):
    """`torch.nn.LocalResponseNorm` with towers and a choice of backend. No parameters, no state."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        *,
        groups: int = 1,
        backend: str = Backend.reference,
    ) -> None:
        check_norm("LocalResponseNorm", size, alpha, beta, k, groups)
        super().__init__(size, alpha, beta, k)
        self.groups = groups
        self.backend = checked("local_response_norm", backend)

    def forward(self, input: Tensor) -> Tensor:
        constants = self.size, self.alpha, self.beta, self.k
        return local_response_norm(input, *constants, groups=self.groups, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}, backend={self.backend}"
