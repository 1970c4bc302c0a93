"""ReLU, response norm and pool in one graph forward; derivation in layers/relu_lrn_pool.py.

Kept are x, the convolution's output, and one byte of winners per output (two for ties="all"): nothing else. In the
order of 2012 the ReLU stands last, and a window whose maximum it closes has no winner.

Backward: the gather of max_pool2d.py, then the two passes of local_response_norm.py with the ReLU inside.
Computing the gather inside those passes instead was measured slower: every gathered value is read five times.
A large batch goes through them in two halves on a CPU, which takes 1 to 2 % longer: what lies between the passes is
the peak of the whole step's memory.
"""

import torch
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import channels_last
from alexnet.layers.compiled.local_response_norm import Norm, backward_into, neighbours, norm_rows
from alexnet.layers.compiled.max_pool2d import NOBODY, gather, pooled
from alexnet.layers.max_pool2d import Two, output_size

UNPADDED = (0, 0)
LARGE = 24 << 20  # bytes of x from which on its batch is halved


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
    keep, _, before = neighbours(x_NHWC, size, groups)
    windows = output_size(x.shape[-2:], kernel, stride, UNPADDED, ceil_mode)
    y, *winners = _forward(x_NHWC, keep, before, (size, alpha, beta, k), windows, kernel, stride, order, ties)
    return y.permute(0, 3, 1, 2), x, *winners


@compiled
def _forward(
    x: Tensor,
    keep: Tensor,
    before: int,
    norm: Norm,
    windows: Two,
    kernel: Two,
    stride: Two,
    order: str,
    ties: str,
) -> tuple[Tensor, ...]:
    b = norm_rows(x, keep, before, norm, relu=order == "relu_lrn_pool")
    m, winners = pooled(b, None, windows, kernel, stride, UNPADDED, ties)
    return closed(m, winners, order, ties, x.dtype)


def closed(m: Tensor, winners: list[Tensor], order: str, ties: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Maxima and winners as they are kept; in the order of 2012 a window that the ReLU closes has no winner."""
    if order == "lrn_pool_relu":
        winners = [torch.where(m <= 0, float(NOBODY[ties]), w) for w in winners]
        m = m.clamp(min=0)
    return m.to(dtype), *(w.to(torch.int8) for w in winners)


def relu_lrn_pool_backward(dy: Tensor, x: Tensor, *saved: Tensor | Two | float | str | bool) -> Tensor:
    """dy (N, C, P, Q), x, the winners and the forward's constants -> dx (N, C, H, W)."""
    *winners, size, alpha, beta, k, kernel, stride, _, order, groups, ties = saved
    dy, x = channels_last(dy), channels_last(x)
    dx = torch.empty_like(x)
    parts = [part.tensor_split(halves(x)) for part in (dx, dy, x, *winners)]  # type: ignore[union-attr]
    for dx_part, dy_part, x_part, *won in zip(*parts, strict=True):
        db = gather(dy_part, won, x.shape[1:3], kernel, stride, UNPADDED, ties)  # type: ignore[arg-type]
        norm = (size, alpha, beta, k)
        backward_into(dx_part, db, x_part, norm, groups, relu=order == "relu_lrn_pool")  # type: ignore[arg-type]
    return dx.permute(0, 3, 1, 2)


def halves(x: Tensor) -> int:
    """2 where memory matters and neither half is a single image, which would be a graph of its own; else 1."""
    return 2 if x.device.type == "cpu" and x.nbytes > LARGE and len(x) >= 4 else 1
