"""ReLU, response norm and pool in one graph forward; derivation in layers/relu_lrn_pool.py.

Kept are x, the convolution's output, and one byte of winners per output (two for ties="all"): nothing else. In the
order of 2012 the ReLU stands last, and a window whose maximum it closes has no winner.

Backward: the gather of max_pool2d.py, then the two passes of local_response_norm.py with the ReLU inside.
Computing the gather inside those passes instead was measured slower: every gathered value is read five times.
A large batch goes through them in two halves on a CPU, which takes 1 to 2 % longer: what lies between the passes is
the peak of the whole step's memory.
"""

from typing import Any

import torch
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import backward_into, neighbours, norm_rows
from alexnet.layers.compiled.max_pool2d import NO_WINNER, gather, pooled
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool, Two, output_size

LARGE = 24 << 20  # bytes of x from which on its batch is halved


def relu_lrn_pool_forward(x: Tensor, norm: Norm, pool: Pool, order: str) -> tuple[Tensor, ...]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps x and the winners."""
    (x_NHWC,) = batched(channels_last(x))
    keep, _, before = neighbours(x_NHWC, norm)
    y, *winners = _forward(x_NHWC, keep, before, norm, pool, windows(x, pool), order)
    return y.permute(0, 3, 1, 2), x, *winners


def windows(x: Tensor, pool: Pool) -> Two:
    """How many windows x (N, C, H, W) has, down and across."""
    return output_size(x.shape[-2:], *pool[:4])


@compiled
def _forward(
    x: Tensor, keep: Tensor, before: int, norm: Norm, pool: Pool, windows: Two, order: str
) -> tuple[Tensor, ...]:
    b = norm_rows(x, keep, before, norm, relu=order == "relu_lrn_pool")
    return closed(*pooled(b, None, windows, pool), order, pool.ties, x.dtype)


def closed(m: Tensor, winners: list[Tensor], order: str, ties: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Maxima and winners as they are kept; in the order of 2012 a window that the ReLU closes has no winner."""
    if order == "lrn_pool_relu":
        winners = [torch.where(m <= 0, float(NO_WINNER[ties]), w) for w in winners]
        m = m.clamp(min=0)
    return m.to(dtype), *(w.to(torch.int8) for w in winners)


def relu_lrn_pool_backward(dy: Tensor, x: Tensor, *winners_and_constants: Any) -> Tensor:
    """dy (N, C, P, Q), x, the winners and the forward's constants -> dx (N, C, H, W)."""
    *winners, norm, pool, order = winners_and_constants
    dy, x = channels_last(dy), channels_last(x)
    dx = torch.empty_like(x)
    parts = [part.tensor_split(halves(x)) for part in (dx, dy, x, *winners)]
    for dx_part, dy_part, x_part, *won in zip(*parts, strict=True):
        db = gather(dy_part, won, x.shape[1:3], pool)
        backward_into(dx_part, db, x_part, norm, relu=order == "relu_lrn_pool")
    return dx.permute(0, 3, 1, 2)


def halves(x: Tensor) -> int:
    """2 where memory matters and neither half is a single image, which would be a graph of its own; else 1."""
    return 2 if x.device.type == "cpu" and x.nbytes > LARGE and len(x) >= 4 else 1
