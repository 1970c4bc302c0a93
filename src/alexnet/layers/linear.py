"""The fully connected layer (section 3.5: fc6, fc7, fc8).

Forward, for image n and output o, with i running over the inputs:

    y[n,o] = sum_i x[n,i] w[o,i] + b[o]                              Y = X W' + b    (' is the transpose)

How each operand reaches the loss L, given dy[n,o] = dL/dy[n,o]:

    x[n,i] enters y[n,o] for every o, with factor w[o,i]:
        dx[n,i] = sum_o dy[n,o] w[o,i]                               dX = dY W
    w[o,i] enters y[n,o] for every n, with factor x[n,i]:
        dw[o,i] = sum_n dy[n,o] x[n,i]                               dW = dY' X
    b[o] enters y[n,o] for every n, with factor 1:
        db[o]   = sum_n dy[n,o]

The sum over n is a plain sum: the mean over the batch is part of the loss (cross_entropy.py), as in torch.
The 2012 code divides by the batch size here instead (layer.cu:653-673); the product is the same.

Shapes: N images (or any leading dimensions), I inputs, O outputs; x (N, I), w (O, I), b (O), y (N, O).
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import check_real
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, to_autocast, wide

# A name's last capitals are its dimensions: dy_NO is (N, O).


def linear_forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., I), w (O, I), b (O) -> y (..., O); keeps x and w, which exist anyway."""
    y = x @ w.T
    return (y if b is None else y + b), x, w


def linear_backward(
    dy: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """dy (..., O) -> dx (..., I), dw (O, I), db (O); None where `needs` says no."""
    dy_NO, x_NI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    dx = dy @ w if needs[0] else None
    dw = dy_NO.T @ x_NI if needs[1] else None
    db = dy_NO.sum(0, dtype=wide(dy.dtype)).to(dy.dtype) if needs[2] else None
    return dx, dw, db


PAIRS["linear", "reference"] = Pair(linear_forward, linear_backward, operands=3)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = Backend.reference
) -> Tensor:
    """`torch.nn.functional.linear` with the gradients above. input (..., I), weight (O, I), bias (O) -> (..., O).

    Raises UserError for other shapes and for a type that is not a real floating-point type.
    """
    check_real("linear", input, weight, bias)
    fits = input.dim() > 0 and weight.dim() == 2 and input.shape[-1] == weight.shape[1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (input, weight, bias) if t is not None)
        raise UserError(f"linear: {shapes} must be input (..., I), weight (O, I) and bias (O)")
    pair = pair_for("linear", backend)
    if pair is None:
        return F.linear(input, weight, bias)
    return apply_pair(pair, to_autocast(input, weight, bias))


class Linear(nn.Linear):
    """`torch.nn.Linear` (same arguments, parameters and initialisation) with a choice of backend."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        backend: str = Backend.reference,
        **factory: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **factory)
        self.backend = checked("linear", backend)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backend={self.backend}"
