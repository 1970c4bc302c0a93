"""The rectified linear unit (section 3.1).

Forward, element by element:

    y = max(x, 0)

How x reaches the loss: only through its own y, whose slope is 1 where x > 0 and 0 where x < 0. At x = 0 the two
slopes disagree; any number between them is a subgradient, and 0 is everybody's choice.

Backward, given dy = ∂L/∂y of the loss L:

    dx = dy [x > 0] = dy [y > 0]

The two conditions are the same, so the backward reads y. The next layer keeps y anyway (a convolution needs it
for its weight gradient), so the unit keeps nothing of its own, and the memory of x can go.

Paper, 2012 code (neuron.cuh:167-171), Caffe and torch agree, including the 0 at x = 0.

A NaN stays a NaN and lets dy through, as in torch: a diverged run must show.

Shapes: any; x, y, dy, dx alike.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet.errors import UserError
from alexnet.layers.backend import PAIRS, Backend, Pair, checked, pair_for


def relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y, which the next layer keeps too."""
    y = x.clamp(min=0)
    return y, y


def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return dy.masked_fill(y <= 0, 0)  # a filled zero, not a product: an infinite dy under a closed unit is 0


PAIRS["relu", "reference"] = Pair(relu_forward, relu_backward)


class _ReLU(torch.autograd.Function):
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


def relu(input: Tensor, inplace: bool = False, *, backend: str = Backend.reference) -> Tensor:
    """`torch.nn.functional.relu` with the gradient above; the type is kept, under autocast too.

    Raises UserError for inplace=True.
    """
    refuse_inplace("relu", inplace)
    pair = pair_for("relu", backend)
    return F.relu(input) if pair is None else _ReLU.apply(input, pair)


def refuse_inplace(name: str, inplace: bool) -> None:
    """Raises UserError: an output is a tensor of its own here, so that every pair can keep what it needs."""
    if inplace:
        raise UserError(f"{name}: inplace=True is not offered: use inplace=False")


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` (never in place) with a choice of backend. Raises UserError for inplace=True."""

    def __init__(self, inplace: bool = False, *, backend: str = Backend.reference) -> None:
        refuse_inplace("ReLU", inplace)
        super().__init__()
        self.backend = checked("relu", backend)

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"
