"""Softmax and cross-entropy, the cost of the network (section 3.5).

Forward, for image n with logits x[n,k], k = 1..K, and true class t[n]. The softmax is

    p[n,k] = exp(x[n,k]) / sum_j exp(x[n,j])

The target is a distribution over the classes: all of it on t[n], or, with label smoothing e, a share e spread
evenly over all K:

    q[n,k] = (1 - e) [k = t[n]] + e/K

    loss[n] = - sum_k q[n,k] log p[n,k]
    L       = (1/N) sum_n loss[n]

exp overflows in float32 above 88. Taking the largest logit, top, out of numerator and denominator changes nothing but
that: every exponent is then <= 0 and one of them is 0.

    log p[n,k] = (x[n,k] - top[n]) - log sum_j exp(x[n,j] - top[n])

The order of the two differences matters. Put the other way, x - (top + log sum), the small logarithm is added to the
large logit and loses its digits: in float32, logits (1e6, 1e6) would cost .6875 instead of log 2 = .6931.

How x[n,k] reaches the loss. Write lse[n] = log sum_j exp(x[n,j]), so that log p = x - lse. The q of an image sum to 1:

    loss[n] = lse[n] - sum_k q[n,k] x[n,k]
    d lse[n] / d x[n,k] = exp(x[n,k]) / sum_j exp(x[n,j]) = p[n,k]
    d loss[n] / d x[n,k] = p[n,k] - q[n,k]

Backward, with dL the gradient that arrives at L (1 when L is the end of the graph):

    dx[n,k] = dL (p[n,k] - q[n,k]) / N

Both distributions sum to 1, so each row of dx sums to 0: logits are pushed apart, never all one way.

In general the target is any u[n,k] that does not depend on x, with sum U[n] = sum_k u[n,k]:

    loss[n] = - sum_k u[n,k] log p[n,k] = U[n] lse[n] - sum_k u[n,k] x[n,k]
    dx[n,k] = dL (U[n] p[n,k] - u[n,k])

Every option of torch is such a u: class weights w make it w[k] q[n,k]; an image of the ignored class has u = 0; class
probabilities stand in for [k = t[n]]; and a mean divides it, by the number of images for probabilities, else by the sum
of w[t[n]] over the images that are not ignored. So a mean over nothing but ignored images is NaN, as in torch.

Who differs: nothing in the mathematics. The 2012 code maximises the log-likelihood, so its gradient is q - p
(layer_kernels.cu:456-471), and it divides by N in the weight gradients (layer.cu:653-673), not here. The paper
maximises the mean over the images, as here; Caffe and torch as here. Label smoothing is later than 2012, torch's
definition. Half types are summed in float32 and the loss stays float32: bf16 would leave it two digits.

Shapes: N images, K classes; x, dx (N, K), t (N) int64 or u (N, K); top, log_sum (N, 1); loss a number, or (N) without
reduction.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.errors import UserError
from alexnet.layers.arguments import check_choice, check_number, check_real
from alexnet.layers.backend import Backend, checked, pair_for
from alexnet.layers.pair import PAIRS, Pair, apply_pair, cast, to_float32, wide

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_forward(
    x: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> tuple[Tensor, ...]:
    """x (N, K), target (N) classes or u (N, K) -> loss; keeps x, target and two numbers an image.

    With u there is no smoothing and no mean: they are in u.
    """
    x_wide = cast(x, wide(x.dtype))
    top = x_wide.amax(1, keepdim=True)
    log_sum = (x_wide - top).exp().sum(1, keepdim=True).log()
    log_p = (x_wide - top) - log_sum
    if target.dim() == 2:
        loss = -torch.where(target == 0, 0, target * log_p).sum(1)  # 0 log 0 is 0
    else:
        loss = -log_p.gather(1, target[:, None]).squeeze(1)
        if label_smoothing:  # a logit of -inf is fine until some of the target lies on it
            loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    return reduced(loss, reduction), x, top, log_sum, target


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
    images, classes = x.shape
    p = ((cast(x, top.dtype) - top) - log_sum).exp()
    dloss_N1 = dloss.reshape(-1, 1) / (images if reduction == "mean" else 1)
    if target.dim() == 2:
        return cast(dloss_N1 * (target.sum(1, keepdim=True) * p - target), x.dtype)
    q = torch.full_like(p, label_smoothing / classes)
    q.scatter_(1, target[:, None], 1 - label_smoothing + label_smoothing / classes)
    return cast(dloss_N1 * (p - q), x.dtype)


def reduced(loss_N: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_N
    return loss_N.mean() if reduction == "mean" else loss_N.sum()


PAIRS["cross_entropy", "reference"] = Pair(cross_entropy_forward, cross_entropy_backward)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` with the gradient above; float32 for half types and under autocast.

    input (N, K), (N, K, d1, ...) or (K) logits; target integers 0..K-1 without the dimension of the classes, or
    probabilities shaped as the input; weight (K). -> a number, or the target's shape without classes for
    reduction="none". ignore_index: the class whose images do not count; none by default, where torch has -100.
    Raises UserError for other shapes and types, an unknown reduction, a smoothing outside 0..1, and a target or weight
    that wants a gradient: there is one for the logits only.
    """
    _check(label_smoothing, reduction)
    _check_tensors(input, target, weight, ignore_index)
    x, target = to_float32(input), target if target.is_floating_point() else target.long()
    pair = pair_for("cross_entropy", backend)
    if pair is None:
        return _native(x, target, weight, ignore_index, label_smoothing, reduction)
    rows, labels, shape = _one_row_an_image(x, target)
    options = label_smoothing, reduction
    if labels.dim() == 2 or weight is not None or ignore_index is not None:
        labels = general_target(rows, labels, weight, ignore_index, *options)
        options = 0.0, "none" if reduction == "none" else "sum"
    loss = apply_pair(pair, (rows, labels), options)
    return loss.reshape(shape) if reduction == "none" else loss


def _one_row_an_image(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, torch.Size]:
    """x (N, K), target (N) or (N, K), and the shape of the losses before: that of x without the classes."""
    if x.dim() == 2:
        return x, target, x.shape[:1]
    last = x.movedim(min(1, x.dim() - 1), -1)
    rows = last.reshape(-1, last.shape[-1])
    if target.is_floating_point():
        return rows, target.movedim(min(1, x.dim() - 1), -1).reshape(rows.shape), last.shape[:-1]
    return rows, target.reshape(-1), last.shape[:-1]


def general_target(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """u (N, K) of the docstring, in the type of the sums; target classes (N) or probabilities (N, K)."""
    (N, K), dtype = x.shape, wide(x.dtype)
    w = torch.ones(K, dtype=dtype, device=x.device) if weight is None else weight.to(dtype)
    counts = torch.ones(N, 1, dtype=dtype, device=x.device)
    if target.dim() == 2:
        q, divisor = target.to(dtype), counts.sum()
    else:
        if ignore_index is not None:
            counts = (target != ignore_index).to(dtype)[:, None]
            target = target.masked_fill(target == ignore_index, 0)
        q = torch.zeros(N, K, dtype=dtype, device=x.device).scatter_(1, target[:, None], 1.0)
        divisor = (w[target] * counts[:, 0]).sum()
    u = counts * w * ((1 - label_smoothing) * q + label_smoothing / K)
    return u / divisor if reduction == "mean" else u


def _native(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int | None,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    # In the type of the sums, so that the loss of half-type logits has the type of the pairs' loss.
    x = cast(x, wide(x.dtype))
    target = target.to(x.dtype) if target.is_floating_point() else target
    weight = None if weight is None else weight.to(x.dtype)
    ignored = torch.iinfo(torch.int64).min if ignore_index is None else ignore_index  # never torch's own -100
    options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
    return F.cross_entropy(x, target, weight, ignore_index=ignored, **options)


def _check(label_smoothing: float, reduction: str) -> None:
    check_number("cross_entropy: label_smoothing", label_smoothing, 0, 1)
    check_choice("cross_entropy: reduction", reduction, REDUCTIONS)


def _check_tensors(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> None:
    check_real("cross_entropy", x, weight)
    probabilities, axis = target.is_floating_point(), min(1, x.dim() - 1)
    classes = x.shape if probabilities else (*x.shape[:axis], *x.shape[axis + 1 :])
    if x.dim() < 1 or target.dtype == torch.bool or target.is_complex() or target.shape != classes:
        raise UserError(
            f"cross_entropy: input {tuple(x.shape)} with target {tuple(target.shape)} {target.dtype} must be logits "
            "(N, K) with classes (N) or probabilities (N, K), or both with more dimensions after these"
        )
    if weight is not None and weight.shape != x.shape[axis : axis + 1]:
        raise UserError(
            f"cross_entropy: weight {tuple(weight.shape)} must be ({x.shape[axis]},), one per class"
        )
    if probabilities and ignore_index is not None:
        raise UserError(
            f"cross_entropy: ignore_index={ignore_index} must be None where target holds probabilities"
        )
    if target.requires_grad or (weight is not None and weight.requires_grad):
        raise UserError("cross_entropy: target and weight must not require a gradient: use .detach()")


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` (ignore_index: none by default) with a choice of backend."""

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str = Backend.reference,
    ) -> None:
        super().__init__()
        _check(label_smoothing, reduction)
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.backend = checked("cross_entropy", backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "reduction": self.reduction}
        ignore = self.ignore_index
        return cross_entropy(input, target, self.weight, ignore_index=ignore, **options, backend=self.backend)

    def extra_repr(self) -> str:
        smoothing, reduction = self.label_smoothing, self.reduction
        return f"label_smoothing={smoothing}, reduction={reduction}, backend={self.backend}"
