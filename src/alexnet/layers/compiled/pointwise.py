"""The small operations: the reference formulas, compiled. linear is a matrix product, its backward the reference's.

ReLU and tanh see memory as one line of numbers, so one graph serves every layer. A gradient is brought to the layout of
its output first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from alexnet.compile import batched, compiled
from alexnet.layers.compiled.layout import constant
from alexnet.layers.cross_entropy import cross_entropy_forward as loss_value
from alexnet.layers.cross_entropy import reduced
from alexnet.layers.dropout import mix, row_words, unit_words
from alexnet.layers.linear import linear_backward as linear_backward
from alexnet.layers.pair import memory_format, wide
from alexnet.layers.relu import relu_backward as relu_gradient
from alexnet.layers.tanh import tanh_backward as tanh_gradient
from alexnet.layers.tanh import tanh_forward as tanh_value


@compiled
def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


@compiled
def _tanh(x: Tensor) -> Tensor:
    return tanh_value(x)[0]


_relu_gradient, _tanh_gradient = compiled(relu_gradient), compiled(tanh_gradient)


def flatten_dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    """x as one dense line of numbers in the memory order of `like` (or its own); a view where x is dense."""
    like = x if like is None else like
    channels_last = like.dim() == 4 and not like.is_contiguous()
    (line,) = batched((x.permute(0, 2, 3, 1) if channels_last else x).reshape(-1).contiguous())
    return line


def unflatten_dense(line: Tensor, like: Tensor) -> Tensor:
    """`flatten_dense` undone."""
    if like.dim() == 4 and not like.is_contiguous():
        N, C, H, W = like.shape
        return line.view(N, H, W, C).permute(0, 3, 1, 2)
    return line.view(like.shape)


def relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y."""
    y = unflatten_dense(_relu(flatten_dense(x)), x)
    return y, y


def relu_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return unflatten_dense(_relu_gradient(flatten_dense(dy, y), flatten_dense(y)), y)


def tanh_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """x -> y; keeps y."""
    y = unflatten_dense(_tanh(flatten_dense(x)), x)
    return y, y


def tanh_backward(dy: Tensor, y: Tensor) -> Tensor:
    """dy -> dx."""
    return unflatten_dense(_tanh_gradient(flatten_dense(dy, y), flatten_dense(y)), y)


def dropout_forward(x: Tensor, key: Tensor, p: float, first_row: int, scale: float) -> tuple[Tensor, Tensor]:
    """x (N, ...) -> y = scale m x; keeps the mask, one byte a unit."""
    x_NU = _units(x).contiguous()
    rows = row_words(len(x_NU), key, first_row)
    units = _unit_words(x_NU.shape[1], x.device)
    # A tensor, where a number would be a constant of the graph.
    least = torch.tensor(round(p * 2**32))
    y, keep = _dropout(*batched(x_NU, rows), units, least, _number(scale, x))
    return laid_out(y.view(x.shape), x), keep.view(x.shape)


def laid_out(y: Tensor, like: Tensor) -> Tensor:
    """y in the memory order of `like`: channels-last in, channels-last out, as torch does."""
    return y.contiguous(memory_format=memory_format(like))


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
    return (x.to(scale.dtype) * scale * keep).to(x.dtype), keep


def dropout_backward(dy: Tensor, keep: Tensor, p: float, first_row: int, scale: float) -> Tensor:
    """dy (N, ...) -> dx."""
    dx = _dropout_gradient(*batched(_units(dy).contiguous(), _units(keep)), _number(scale, dy))
    return laid_out(dx.view(dy.shape), dy)


@compiled
def _dropout_gradient(dy: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    return (dy.to(scale.dtype) * scale * keep).to(dy.dtype)


def cross_entropy_forward(
    x: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> tuple[Tensor, ...]:
    """x (N, K), target (N) or (N, K) -> loss; keeps x, target and two numbers an image."""
    loss_N, top, log_sum = _losses(*batched(x.contiguous(), target), label_smoothing)
    return reduced(loss_N, reduction), x, top, log_sum, target


@compiled
def _losses(x: Tensor, target: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
    loss, _, top, log_sum, _ = loss_value(x, target, label_smoothing, "none")
    return loss, top, log_sum


def cross_entropy_backward(
    dloss: Tensor,
    x: Tensor,
    top: Tensor,
    log_sum: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """dloss, a number or (N) -> dx (N, K)."""
    # (1, 1) or (N, 1), which are graphs of their own.
    dloss = dloss.reshape(-1, 1).contiguous()
    tensors = batched(dloss, x.contiguous(), top, log_sum, target)
    return _loss_gradient(*tensors, label_smoothing, reduction)


@compiled
def _loss_gradient(
    dloss: Tensor,
    x: Tensor,
    top: Tensor,
    log_sum: Tensor,
    target: Tensor,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    images, classes = x.shape
    if target.dim() == 1:  # compared, where the reference scatters: one pass
        hit = torch.arange(classes, device=x.device) == target[:, None]
        q = (1 - label_smoothing) * hit.to(top.dtype) + label_smoothing / classes
        total: float | Tensor = 1.0
    else:
        q, total = target, target.sum(1, keepdim=True)
    p = ((x.to(top.dtype) - top) - log_sum).exp()
    dloss_N1 = dloss / images if reduction == "mean" else dloss
    return (dloss_N1 * (total * p - q)).to(x.dtype)


def linear_forward(x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., I), w (O, I), b (O) -> y (..., O), product and bias in one call; keeps x and w."""
    return F.linear(x, w, b), x, w
