"""ReLU, response normalisation and pooling in one (sections 3.1, 3.3, 3.4: what follows conv1 and conv2).

Three operations that read and write the largest tensors of the network and do almost no arithmetic: in one, a fast
backend does not write the tensors in between to memory and read them back. This file defines the one operation; its
reference is the composition of the three pairs, which are derived in relu.py, local_response_norm.py and
max_pool2d.py. Two orders exist, and they are different functions:

    order="relu_lrn_pool" (paper, Caffe)       order="lrn_pool_relu" (2012 code, block 1: layers-145.cfg:9-63)

    a = max(x, 0)                              s[c] = k + (alpha/n) sum_{j in W(c)} x[j]^2
    s[c] = k + (alpha/n) sum_{j in W(c)} a[j]^2    b = x s^-beta
    b = a s^-beta                              m = max of b over the window (p,q)
    y = max of b over the window (p,q)         y = max(m, 0)

Pool and ReLU can be exchanged: max(.,0) is increasing, so it may be taken before or after the maximum. Norm and ReLU
cannot: the 2012 denominator also counts the negative responses, so a unit is made smaller by neighbours that a ReLU in
front would have set to zero.

Backward, by the chain rule: if y = h(g(f(x))), the gradient passes h, then g, then f, and each multiplies it by its own
derivative:

    order="relu_lrn_pool"                      order="lrn_pool_relu"

    db[i,j] = sum_{windows won by (i,j)} dy    dm = dy [y > 0]
    t  = db s^-beta                            db[i,j] = sum_{windows won by (i,j)} dm
    da = t - (2 alpha beta/n) a sum_W* t a/s   t  = db s^-beta
    dx = da [a > 0]                            dx = t - (2 alpha beta/n) x sum_W* t x/s

In the paper's order a closed unit, x < 0, gets no gradient. In the 2012 order it does: it is part of its neighbours'
denominators (the second term, which has the factor x, not a). Its own b is negative and wins only windows that the ReLU
closes.

Where the sources differ: block 2 of the 2012 code has the paper's order with the same-map norm in between
(same_map_norm.py); CaffeNet pools before it normalises; torchvision has no norm.

Shapes: x (N, C, H, W), y (N, C, P, Q); maps in `groups` towers; no padding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import check_choice, no_longer, two
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.local_response_norm import (
    Norm,
    check_norm,
    local_response_norm,
    local_response_norm_backward,
    local_response_norm_forward,
)
from alexnet.layers.max_pool2d import (
    Pool,
    Two,
    check_pool,
    check_window,
    max_pool2d,
    max_pool2d_backward,
    max_pool2d_forward,
)
from alexnet.layers.pair import PAIRS, Pair, apply_pair, to_float32
from alexnet.layers.relu import relu_backward, relu_forward

ORDERS = ("relu_lrn_pool", "lrn_pool_relu")


def relu_lrn_pool_forward(x: Tensor, norm: Norm, pool: Pool, order: str) -> tuple[Tensor | None, ...]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps x, y, the norm's s and three tensors of the pool."""
    a = relu_forward(x)[0] if order == "relu_lrn_pool" else x
    b, _, s = local_response_norm_forward(a, *norm)
    m, *pool_saved = max_pool2d_forward(b, *pool)
    y = m if order == "relu_lrn_pool" else relu_forward(m)[0]
    return y, x, y, s, *pool_saved


def relu_lrn_pool_backward(
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    s: Tensor,
    place: Tensor | None,
    pool_x: Tensor | None,
    pool_y: Tensor | None,
    norm: Norm,
    pool: Pool,
    order: str,
) -> Tensor:
    """dy (N, C, P, Q) and what the forward kept -> dx (N, C, H, W)."""
    if order == "relu_lrn_pool":
        a = relu_forward(x)[0]  # computed again: of x and a, one is kept
        db = max_pool2d_backward(dy, place, pool_x, pool_y, x.shape[-2:], *pool)
        da = local_response_norm_backward(db, a, s, *norm)
        return relu_backward(da, a)
    dm = relu_backward(dy, y)
    db = max_pool2d_backward(dm, place, pool_x, pool_y, x.shape[-2:], *pool)
    return local_response_norm_backward(db, x, s, *norm)


PAIRS["relu_lrn_pool", "reference"] = Pair(relu_lrn_pool_forward, relu_lrn_pool_backward)


def relu_lrn_pool(
    input: Tensor,
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    kernel_size: int | Two = 3,
    stride: int | Two = 2,
    *,
    ceil_mode: bool = True,
    order: str = "relu_lrn_pool",
    groups: int = 1,
    ties: str = "first",
    backend: str = Backend.reference,
) -> Tensor:
    """`max_pool2d(local_response_norm(relu(input)))`, or the 2012 order; input (N, C, H, W), a convolution's output.

    Arguments as in the three functions; the norm's defaults are torch's, the pool's those of 2012 (3 wide, 2 apart,
    rounded up). Float32 under autocast. Raises UserError for an unknown order and for
    what the three functions refuse.
    """
    norm = Norm(size, alpha, beta, k, groups)
    pool = Pool(two(kernel_size, "kernel_size"), two(stride, "stride"), (0, 0), ceil_mode, ties)
    _check("relu_lrn_pool", norm, pool, order)
    check_pool(input, *pool[:3], (1, 1), ceil_mode, ties)
    if input.dim() != 4 or input.shape[1] % groups:
        raise UserError(
            f"relu_lrn_pool: input {tuple(input.shape)} must be (N, C, H, W) with C a multiple of groups={groups}"
        )
    norm = Norm(int(size), alpha, beta, k, int(groups))
    pool = pool._replace(stride=no_longer(pool.stride, (input.shape[2], input.shape[3])))
    pair = pair_for("relu_lrn_pool", backend)
    if pair is None:
        return _native(input, norm, pool, order)
    return apply_pair(pair, (to_float32(input),), (norm, pool, order))


def _native(x: Tensor, norm: Norm, pool: Pool, order: str) -> Tensor:
    a = F.relu(x) if order == "relu_lrn_pool" else x
    b = local_response_norm(a, *norm[:4], groups=norm.groups, backend=Backend.native)
    m = max_pool2d(b, *pool[:3], ceil_mode=pool.ceil_mode, ties=pool.ties, backend=Backend.native)
    return m if order == "relu_lrn_pool" else F.relu(m)


def _check(name: str, norm: Norm, pool: Pool, order: str) -> None:
    check_choice(f"{name}: order", order, ORDERS)
    check_norm(name, *norm)
    check_window(*pool[:3], (1, 1), pool.ties)


class ReluLrnPool(nn.Module):
    """`relu_lrn_pool` with its constants. No parameters, no state."""

    def __init__(
        self,
        size: int,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 1.0,
        kernel_size: int | Two = 3,
        stride: int | Two = 2,
        *,
        ceil_mode: bool = True,
        order: str = "relu_lrn_pool",
        groups: int = 1,
        ties: str = "first",
        backend: str = Backend.reference,
    ) -> None:
        super().__init__()
        pool = Pool(two(kernel_size, "kernel_size"), two(stride, "stride"), (0, 0), ceil_mode, ties)
        _check("ReluLrnPool", Norm(size, alpha, beta, k, groups), pool, order)
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k
        self.kernel_size, self.stride, self.ceil_mode = kernel_size, stride, ceil_mode
        self.order, self.groups, self.ties = order, groups, ties
        self.backend = checked("relu_lrn_pool", backend)

    def forward(self, input: Tensor) -> Tensor:
        return relu_lrn_pool(
            input,
            *(self.size, self.alpha, self.beta, self.k, self.kernel_size, self.stride),
            ceil_mode=self.ceil_mode,
            order=self.order,
            groups=self.groups,
            ties=self.ties,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        norm = f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}, groups={self.groups}"
        pool = f"kernel_size={self.kernel_size}, stride={self.stride}, ceil_mode={self.ceil_mode}, ties={self.ties}"
        return f"order={self.order}, {norm}, {pool}, backend={self.backend}"
