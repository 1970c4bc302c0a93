"""ReLU, response normalisation and pooling in one (sections 3.1, 3.3, 3.4: what follows conv1 and conv2).

Three operations that read and write the largest tensors of the network and do almost no arithmetic: as one, a
fast backend need not bring every intermediate to memory and back. This file fixes what the one operation is; its
reference is the composition of the three pairs, whose derivations stand in relu.py, local_response_norm.py and
max_pool2d.py. Two orders exist, and they are different functions:

    order="relu_lrn_pool" (paper, Caffe)       order="lrn_pool_relu" (2012 code, block 1: layers-145.cfg:9-63)

    a = max(x, 0)                              s[c] = k + (alpha/n) sum_{j in W(c)} x[j]^2
    s[c] = k + (alpha/n) sum_{j in W(c)} a[j]^2    b = x s^-beta
    b = a s^-beta                              m = max of b over the window (p,q)
    y = max of b over the window (p,q)         y = max(m, 0)

Where the ReLU stands against the *pool* is no difference: max(.,0) is increasing, so it may be taken before or
after the maximum. Against the *norm* it is one: the 2012 denominator also counts the negative responses, so a
unit is quietened by neighbours that a ReLU in front would have silenced.

Backward. If y = h(g(f(x))), a change of x passes f, then g, then h, and the gradient returns through the same
doors in reverse, each time multiplied by that function's own derivative:

    order="relu_lrn_pool"                      order="lrn_pool_relu"

    db[i,j] = sum_{windows won by (i,j)} dy    dm = dy [y > 0]
    t  = db s^-beta                            db[i,j] = sum_{windows won by (i,j)} dm
    da = t - (2 alpha beta/n) a sum_W* t a/s   t  = db s^-beta
    dx = da [a > 0]                            dx = t - (2 alpha beta/n) x sum_W* t x/s

In the paper's order a closed unit, x < 0, gets no gradient at all. In the 2012 order it does: it stands in the
denominators of its neighbours (the second term, which has the factor x, not a). Its own b is negative and wins only
windows that the ReLU closes.

Where the sources differ: block 2 of the 2012 code has the paper's order with the same-map norm in between
(same_map_norm.py); CaffeNet pools before it normalises; torchvision has no norm.

Shapes: x (N, C, H, W), y (N, C, P, Q); maps in `groups` towers; no padding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet.errors import UserError
from alexnet.layers.backend import PAIRS, Backend, Pair, checked, no_autocast, pair_for, to_float32
from alexnet.layers.local_response_norm import (
    check_norm,
    local_response_norm,
    local_response_norm_backward,
    local_response_norm_forward,
)
from alexnet.layers.max_pool2d import (
    Two,
    check_pool,
    check_window,
    max_pool2d,
    max_pool2d_backward,
    max_pool2d_forward,
    two,
)
from alexnet.layers.relu import relu_backward, relu_forward

ORDERS = ("relu_lrn_pool", "lrn_pool_relu")


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
) -> tuple[Tensor | None, ...]:
    """x (N, C, H, W) -> y (N, C, P, Q); keeps one tensor of the ReLU, two of the norm, three of the pool."""
    norm, pool = (size, alpha, beta, k, groups), (kernel, stride, (0, 0), ceil_mode, ties)
    if order == "relu_lrn_pool":
        a, *relu_saved = relu_forward(x)
        b, *norm_saved = local_response_norm_forward(a, *norm)
        y, *pool_saved = max_pool2d_forward(b, *pool)
    else:
        b, *norm_saved = local_response_norm_forward(x, *norm)
        m, *pool_saved = max_pool2d_forward(b, *pool)
        y, *relu_saved = relu_forward(m)
    return y, *relu_saved, *norm_saved, *pool_saved


def relu_lrn_pool_backward(
    dy: Tensor,
    relu_y: Tensor,
    norm_x: Tensor,
    norm_s: Tensor,
    place: Tensor | None,
    pool_x: Tensor | None,
    pool_y: Tensor | None,
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
) -> Tensor:
    """dy (N, C, P, Q) and what the forward kept -> dx (N, C, H, W)."""
    norm = (norm_x, norm_s, size, alpha, beta, k, groups)
    pool = (place, pool_x, pool_y, norm_x.shape[-2:], kernel, stride, (0, 0), ceil_mode, ties)
    if order == "relu_lrn_pool":
        db = max_pool2d_backward(dy, *pool)
        da = local_response_norm_backward(db, *norm)
        return relu_backward(da, relu_y)
    dm = relu_backward(dy, relu_y)
    db = max_pool2d_backward(dm, *pool)
    return local_response_norm_backward(db, *norm)


PAIRS["relu_lrn_pool", "reference"] = Pair(relu_lrn_pool_forward, relu_lrn_pool_backward)


class _ReluLrnPool(torch.autograd.Function):
    """Gives the pair to autograd. No mathematics here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, constants: tuple[Any, ...], pair: Pair) -> Tensor:
        with no_autocast(x):
            y, *saved = pair.forward(x, *constants)
        ctx.save_for_backward(*saved)
        ctx.constants, ctx.pair = constants, pair
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(dy):
            return ctx.pair.backward(dy, *ctx.saved_tensors, *ctx.constants), None, None


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
    kernel, step = two(kernel_size), two(stride)
    _check_order(order)
    check_norm("relu_lrn_pool", size, alpha, k, groups)
    check_pool(input, kernel, step, (0, 0), (1, 1), ceil_mode, ties)
    if input.dim() != 4 or input.shape[1] % groups:
        raise UserError(
            f"relu_lrn_pool: input {tuple(input.shape)} has no maps that groups={groups} towers can share evenly. "
            "Give (N, C, H, W) with C divisible by groups"
        )
    constants = (size, alpha, beta, k, kernel, step, ceil_mode, order, groups, ties)
    pair = pair_for("relu_lrn_pool", backend)
    return (
        _native(input, *constants) if pair is None else _ReluLrnPool.apply(to_float32(input), constants, pair)
    )


def _native(
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
) -> Tensor:
    paper = order == "relu_lrn_pool"
    b = local_response_norm(
        F.relu(x) if paper else x, size, alpha, beta, k, groups=groups, backend=Backend.native
    )
    m = max_pool2d(b, kernel, stride, ceil_mode=ceil_mode, ties=ties, backend=Backend.native)
    return m if paper else F.relu(m)


def _check_order(order: str) -> None:
    if order not in ORDERS:
        raise UserError(f"order={order!r} is no order of the block: choose one of {', '.join(ORDERS)}")


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
        _check_order(order)
        check_norm("ReluLrnPool", size, alpha, k, groups)
        check_window(two(kernel_size), two(stride), (0, 0), (1, 1), ties)
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
