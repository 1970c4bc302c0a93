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

import torch
from torch import Tensor, nn

from alexnet.layers.arguments import check_real
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, cast, wide


def tanh_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y, which the next layer keeps too."""
    y = cast(cast(x, wide(x.dtype)).tanh(), x.dtype)
    return y, y


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx. The slope comes from the y that was handed on, so in bf16 from the rounded one, as in torch."""
    y_wide = cast(y, wide(y.dtype))
    return cast(dy * (1 - y_wide * y_wide), dy.dtype)


PAIRS["tanh", "reference"] = Pair(tanh_forward, tanh_backward)


def tanh(input: Tensor, *, backend: str = Backend.reference) -> Tensor:
    """`torch.tanh` with the gradient above; the type is kept, under autocast too.

    Raises UserError for a type that is not a real floating-point type.
    """
    check_real("tanh", input)
    pair = pair_for("tanh", backend)
    return torch.tanh(input) if pair is None else apply_pair(pair, (input,))


class Tanh(nn.Tanh):
    """`torch.nn.Tanh` with a choice of backend."""

    def __init__(self, *, backend: str = Backend.reference) -> None:
        super().__init__()
        self.backend = checked("tanh", backend)

    def forward(self, input: Tensor) -> Tensor:
        return tanh(input, backend=self.backend)

    def extra_repr(self) -> str:
        return f"backend={self.backend}"
