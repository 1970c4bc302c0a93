"""The hyperbolic tangent, the saturating unit that section 3.1 compares the ReLU with.

Forward, element by element:

    y = tanh(x) = sinh(x) / cosh(x)

How x reaches the loss: only through its own y. By the quotient rule, with sinh' = cosh and cosh' = sinh,

    ∂y/∂x = (cosh(x)^2 - sinh(x)^2) / cosh(x)^2 = 1 - tanh(x)^2 = 1 - y^2

Backward, given dy = ∂L/∂y of the loss L:

    dx = dy (1 - y^2)

The slope is at most 1 and falls to 0 as |y| nears 1: a saturated unit learns no more. That is the paper's
reason for the ReLU, whose slope is 1 wherever it is open.

Paper, Caffe and torch agree. The 2012 code's neuron is tanh[a,b], y = a tanh(b x); here a = b = 1.

Shapes: any; x, y, dy, dx alike.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet.layers.backend import PAIRS, Backend, Pair, cast, checked, pair_for, wide


def tanh_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y, which the next layer keeps too."""
    y = cast(cast(x, wide(x.dtype)).tanh(), x.dtype)
    return y, y


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx. The slope comes from the y that was handed on, so in bf16 from the rounded one, as in torch."""
    y_wide = cast(y, wide(y.dtype))
    return cast(dy * (1 - y_wide * y_wide), dy.dtype)


PAIRS["tanh", "reference"] = Pair(tanh_forward, tanh_backward)


class _Tanh(torch.autograd.Function):
    """Gives the pair to autograd. No mathematics here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pair: Pair) -> Tensor:
        y, *saved = pair.forward(x)
        ctx.save_for_backward(*saved)
        ctx.pair = pair
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.pair.backward(dy, *ctx.saved_tensors), None


def tanh(input: Tensor, *, backend: str = Backend.reference) -> Tensor:
    """`torch.tanh` with the gradient above; the type is kept, under autocast too."""
    pair = pair_for("tanh", backend)
    return torch.tanh(input) if pair is None else _Tanh.apply(input, pair)


class Tanh(nn.Tanh):
    """`torch.nn.Tanh` with a choice of backend."""

    def __init__(self, *, backend: str = Backend.reference) -> None:
        super().__init__()
        self.backend = checked("tanh", backend)

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"
