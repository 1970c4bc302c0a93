"""The rectified linear unit (section 3.1).

Forward, element by element:

    y = max(x, 0)

How x reaches the loss: only through its own y, whose slope is 1 where x > 0 and 0 where x < 0. At x = 0 the two
slopes disagree; any number between them is a subgradient. Paper, 2012 code (neuron.cuh:167-171), Caffe and torch
take 0.

Backward, given dy = ∂L/∂y of the loss L:

    dx = dy [x > 0] = dy [y > 0]

The two conditions are the same, so the backward reads y. The next layer keeps y anyway (a convolution needs it
for its weight gradient), so the unit keeps nothing of its own, and the memory of x can go.

A NaN stays a NaN and passes dy on, as in torch: a run that diverged must show it.

Shapes: any; x, y, dy, dx alike.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.layers.arguments import check_real, refuse_inplace
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair


def relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y, which the next layer keeps too."""
    y = x.clamp(min=0)
    return y, y


def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return dy.masked_fill(y <= 0, 0)  # a filled zero, not a product: an infinite dy under a closed unit is 0


PAIRS["relu", "reference"] = Pair(relu_forward, relu_backward)


def relu(input: Tensor, inplace: bool = False, *, backend: str = Backend.reference) -> Tensor:
    """`torch.nn.functional.relu` with the gradient above; the type is kept, under autocast too.

    Raises UserError for inplace=True and for a type that is not a real floating-point type.
    """
    refuse_inplace("relu", inplace)
    check_real("relu", input)
    pair = pair_for("relu", backend)
    return F.relu(input) if pair is None else apply_pair(pair, (input,))


class ReLU(nn.ReLU):
    """`torch.nn.ReLU` (never in place) with a choice of backend. Raises UserError for inplace=True."""

    def __init__(self, inplace: bool = False, *, backend: str = Backend.reference) -> None:
        refuse_inplace("ReLU", inplace)
        super().__init__()
        self.backend = checked("relu", backend)

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"
