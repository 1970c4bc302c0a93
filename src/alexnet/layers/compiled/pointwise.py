"""The small operations: the reference formulas, compiled. linear is three matrix products and needs no compiler.

ReLU and tanh work on memory as it lies, so one graph serves every layer. A gradient is brought to the layout of
the output it belongs to.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.layers.compiled.graph import batched, compiled
from alexnet.layers.cross_entropy import cross_entropy_forward as loss_value
from alexnet.layers.dropout import dropout_mask
from alexnet.layers.linear import Gradients
from alexnet.layers.linear import linear_backward as three_products
from alexnet.layers.relu import relu_backward as rectified_gradient
from alexnet.layers.tanh import tanh_backward as squashed_gradient
from alexnet.layers.tanh import tanh_forward as squashed


def as_it_lies(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x as one line of numbers in the memory order of `like` (or its own); a view where x is dense."""
    like = x if like is None else like
    channels_last = like.dim() == 4 and not like.is_contiguous()
    (line,) = batched((x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1))
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
    first = torch.as_tensor(first_row, device=x.device)  # a tensor: a number would be a constant of the graph
    y, keep = _dropout(*batched(x.flatten(1)), key, first, p, scale)
    return y.view(x.shape), keep.view(x.shape)


@compiled
def _dropout(x: Tensor, key: Tensor, first_row: Tensor, p: float, scale: float) -> tuple[Tensor, Tensor]:
    keep = dropout_mask(x.shape, p, key, first_row, x.device)  # type: ignore[arg-type]
    return torch.where(keep, x * scale, 0), keep


def dropout_backward(dy: Tensor, keep: Tensor, p: float, first_row: int, scale: float) -> Tensor:
    """dy (N, ...) -> dx."""
    return _dropout_gradient(*batched(dy.contiguous(), keep), scale)


@compiled
def _dropout_gradient(dy: Tensor, keep: Tensor, scale: float) -> Tensor:
    return torch.where(keep, dy * scale, 0)


def cross_entropy_forward(
    x: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, K), target (N) -> loss; keeps x, target and one number an image."""
    x, target = batched(x.contiguous(), target)
    loss, lse = _loss(x, target, label_smoothing, reduction)
    return loss, x, lse, target


@compiled
def _loss(x: Tensor, target: Tensor, label_smoothing: float, reduction: str) -> tuple[Tensor, Tensor]:
    loss, _, lse, _ = loss_value(x, target, label_smoothing, reduction)
    return loss, lse


def cross_entropy_backward(
    dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> Tensor:
    """dloss, a number or (N) -> dx (N, K)."""
    dloss = dloss.detach() if dloss.dim() == 0 else batched(dloss.contiguous())[0]
    return _loss_gradient(dloss, *batched(x, lse, target), label_smoothing, reduction)


@compiled
def _loss_gradient(
    dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> Tensor:
    images, classes = x.shape
    p = (x.to(lse.dtype) - lse).exp()
    hit = torch.arange(classes, device=x.device) == target[:, None]
    q = (1 - label_smoothing) * hit.to(p.dtype) + label_smoothing / classes
    dloss_N1 = dloss.reshape(-1, 1) / (images if reduction == "mean" else 1)
    return (dloss_N1 * (p - q)).to(x.dtype)


def linear_forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., I), w (O, I), b (O) -> y (..., O), product and bias in one call; keeps x and w."""
    return F.linear(x, w, b), x, w


def linear_backward(dy: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool, bool]) -> Gradients:
    """dy (..., O) -> dx, dw, db: the reference's three products, which the library multiplies."""
    return three_products(dy, x, w, needs)
