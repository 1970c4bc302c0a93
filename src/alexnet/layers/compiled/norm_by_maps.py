"""Response normalisation of (N, C, H, W) in that layout; derivation in layers/local_response_norm.py.

A map lies together in memory and the neighbour j maps away is as many numbers further on, so the loop over the window
stands outside of the one over pixels, which reads and writes vectors. A window that leaves its tower reads zeros: the
choice is one per map and costs nothing. Nothing is turned, and what comes out is laid out like x.

Kept: x. The backward writes q once, with maps of zeros around every tower, and reads it size times. It takes some
images at a time: a tensor of more than 32 MB would be asked from the kernel and given back at each call (system.py,
keep_freed_memory), which takes longer than the arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.local_response_norm import Norm, inverse_power
from alexnet.layers.pair import wide

SLAB = 6 << 20  # numbers whose gradient is computed at a time: 24 MB of float32


@compiled
def _forward(x: Tensor, norm: Norm, reach: tuple[int, int]) -> Tensor:
    """x (N, G, C/G, P) -> y."""
    a = x.to(wide(x.dtype))
    return (a * inverse_power(scale(x, norm, reach), norm.beta)).to(x.dtype)


@compiled
def _backward_into(dx: Tensor, dy: Tensor, x: Tensor, norm: Norm, reach: tuple[int, int]) -> None:
    a, s = x.to(wide(x.dtype)), scale(x, norm, reach)
    t = dy * inverse_power(s, norm.beta)
    root = s.rsqrt()
    q = t * (a * root * root)  # t a / s, in an order in which no product underflows where q does not
    before, after = reach[::-1]  # the window of the backward is the reflected one
    competition = window_sum(bordered(q, before, after), x.shape[2])
    dx.copy_(t - 2 * norm.alpha * norm.beta / norm.size * a * competition)


def scale(x: Tensor, norm: Norm, reach: tuple[int, int]) -> Tensor:
    """s = k + alpha/n times the sum of squares over the window."""
    padded = F.pad(x, (0, 0, *reach)).to(wide(x.dtype))
    return norm.k + norm.alpha / norm.size * window_sum(padded * padded, x.shape[2])


def window_sum(bordered: Tensor, maps: int) -> Tensor:
    """Every map and its neighbours, of (N, G, before + maps + after, P)."""
    count = bordered.shape[2] - maps + 1
    return sum(bordered[:, :, i : i + maps] for i in range(count))  # type: ignore[return-value]


def bordered(q: Tensor, before: int, after: int) -> Tensor:
    """q with maps of zeros around every tower. Joined and not padded: the compiler writes what it joins, and would
    compute what it pads anew for every neighbour."""
    nothing = q.new_zeros(()).expand(*q.shape[:2], 1, q.shape[3])
    return torch.cat([nothing] * before + [q] + [nothing] * after, 2)


def norm_by_maps(x: Tensor, norm: Norm, reach: tuple[int, int]) -> Tensor:
    """x (N, C, ...) contiguous -> y."""
    (towers,) = batched(by_towers(x, norm))
    return _forward(towers, norm, reach).view(x.shape)


def norm_by_maps_backward(dy: Tensor, x: Tensor, norm: Norm, reach: tuple[int, int]) -> Tensor:
    """dy (N, C, ...) of any layout, x contiguous -> dx."""
    dx = torch.empty_like(x)
    # No slab of one image among larger ones: that would be a graph of its own.
    slabs = max(1, min(len(x) // 2, -(-x.numel() // SLAB))) if not torch.compiler.is_compiling() else 1
    parts = [by_towers(tensor, norm).tensor_split(slabs) for tensor in (dx, dy.contiguous(), x)]
    for slab in zip(*parts, strict=True):
        _backward_into(*batched(*slab), norm, reach)
    return dx


def by_towers(x: Tensor, norm: Norm) -> Tensor:
    """(N, C, ...) -> (N, G, C/G, P)."""
    return x.view(len(x), norm.groups, x.shape[1] // norm.groups, -1)
