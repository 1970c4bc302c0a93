"""The small operations: the reference formulas, compiled. linear is three matrix products and needs no compiler.

ReLU and tanh work on memory as it lies, so one graph serves every layer. A gradient is brought to the layout of
the output it belongs to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.backend import wide
from alexnet.layers.compiled.layout import constant
from alexnet.layers.cross_entropy import cross_entropy_forward as loss_value
from alexnet.layers.cross_entropy import reduced
from alexnet.layers.dropout import mix, row_words, unit_words
from alexnet.layers.linear import Gradients
from alexnet.layers.linear import linear_backward as three_products
from alexnet.layers.relu import relu_backward as rectified_gradient
from alexnet.layers.tanh import tanh_backward as squashed_gradient
from alexnet.layers.tanh import tanh_forward as squashed


def as_it_lies(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x as one dense line of numbers in the memory order of `like` (or its own); a view where x is dense."""
    like = x if like is None else like
    channels_last = like.dim() == 4 and not like.is_contiguous()
    (line,) = batched((x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1).contiguous())
    return line


def shaped(line: Tensor, like: Tensor) -> Tensor:
    """`as_it_lies` undone."""
    if like.dim() == 4 and not like.is_contiguous():
        N, C, H, W = like.shape
        return line.view(N, H, W, C).permute(0, 3, 1, 2)
    return line.view(like.shape)


def relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y."""
    y = shaped(_relu(as_it_lies(x)), x)
    return y, y


def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return shaped(_relu_gradient(as_it_lies(dy, y), as_it_lies(y)), y)


def tanh_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y."""
    y = shaped(_tanh(as_it_lies(x)), x)
    return y, y


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return shaped(_tanh_gradient(as_it_lies(dy, y), as_it_lies(y)), y)


@compiled
def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@compiled
def _relu_gradient(dy: Tensor, y: Tensor) -> Tensor:
    return rectified_gradient(dy, y)


@compiled
def _tanh(x: Tensor) -> Tensor:
    return squashed(x)[0]


@compiled
def _tanh_gradient(dy: Tensor, y: Tensor) -> Tensor:
    return squashed_gradient(dy, y)


def dropout_forward(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> y = scale m x; keeps the mask, one byte a unit."""
    x_NU = _units(x).contiguous()
    rows = row_words(len(x_NU), key, first_row)
    units = _unit_words(x_NU.shape[1], x.device)
    # A tensor, where a number would be a constant of the graph.
    least = torch.tensor(round(p * 2**32))
    y, keep = _dropout(*batched(x_NU, rows), units, least, _number(scale, x))
    return y.view(x.shape), keep.view(x.shape)


def _units(x: Tensor) -> Tensor:
    """x (N, ...) -> (N, U), one unit a row where there are no other dimensions."""
    return x.unsqueeze(-1).flatten(1)


_unit_words = constant(unit_words)


def _number(scale: float, x: Tensor) -> Tensor:
    """For a product with x, in the type x is computed in."""
    return torch.tensor(scale, dtype=wide(x.dtype))


@compiled
def _dropout(x: Tensor, rows: Tensor, units: Tensor, least: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    # One mixing in here: the compiler writes shared terms out again, and the words of the rows need four in a row.
    keep = mix(rows ^ units) >= least
    return torch.where(keep, x.to(scale.dtype) * scale, 0).to(x.dtype), keep


def dropout_backward(dy: Tensor, keep: Tensor, p: float, first_row: int, scale: float) -> Tensor:
    """dy (N, ...) -> dx."""
    dx = _dropout_gradient(*batched(_units(dy).contiguous(), _units(keep)), _number(scale, dy))
    return dx.view(dy.shape)


@compiled
def _dropout_gradient(dy: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    return torch.where(keep, dy.to(scale.dtype) * scale, 0).to(dy.dtype)


def cross_entropy_forward(
    x: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, K), target (N) -> loss; keeps x, target and one number an image."""
    x, target = batched(x.contiguous(), target)
    loss_N, lse = _losses(x, target, label_smoothing)
    return reduced(loss_N, reduction), x, lse, target


@compiled
def _losses(x: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    loss, _, lse, _ = loss_value(x, target, label_smoothing, "none")
    return loss, lse


def cross_entropy_backward(
    dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> Tensor:
    """dloss, a number or (N) -> dx (N, K)."""
    # (1, 1) or (N, 1), which are graphs of their own.
    dloss = dloss.reshape(-1, 1).contiguous()
    return _loss_gradient(*batched(dloss, x, lse, target), label_smoothing, reduction)


@compiled
def _loss_gradient(
    dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> Tensor:
    images, classes = x.shape
    dloss_N1 = dloss / images if reduction == "mean" else dloss
    p = (x.to(lse.dtype) - lse).exp()
    hit = torch.arange(classes, device=x.device) == target[:, None]
    q = (1 - label_smoothing) * hit.to(p.dtype) + label_smoothing / classes
    return (dloss_N1 * (p - q)).to(x.dtype)


def linear_forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., I), w (O, I), b (O) -> y (..., O), product and bias in one call; keeps x and w."""
    return F.linear(x, w, b), x, w


def linear_backward(dy: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    """dy (..., O) -> dx, dw, db: the reference's three products, which the library multiplies."""
    return three_products(dy, x, w, needs)
