"""Softmax and cross-entropy, the cost of the network (section 3.5).

Forward, for image n with logits x[n,k], k = 1..K, and true class t[n]. The softmax is

    p[n,k] = exp(x[n,k]) / sum_j exp(x[n,j]) = exp(x[n,k] - lse[n]),      lse[n] = log sum_j exp(x[n,j])

The target is a distribution over the classes: all of it on t[n], or, with label smoothing e, a share e spread
evenly over all K:

    q[n,k] = (1 - e) [k = t[n]] + e/K

    loss[n] = - sum_k q[n,k] log p[n,k] = lse[n] - sum_k q[n,k] x[n,k]          (the q of an image sum to 1)
    L       = (1/N) sum_n loss[n]

exp overflows in float32 above 88. Taking the largest logit out changes nothing but that:
lse = top + log sum_j exp(x[j] - top), where every exponent is <= 0 and one of them is 0.

How x[n,k] reaches the loss. Through lse[n], and through its own term q[n,k] x[n,k]:

    d lse[n] / d x[n,k] = exp(x[n,k]) / sum_j exp(x[n,j]) = p[n,k]
    d loss[n] / d x[n,k] = p[n,k] - q[n,k]

Backward, with dL the gradient that arrives at L (1 when L is the end of the graph):

    dx[n,k] = dL (p[n,k] - q[n,k]) / N

Both distributions sum to 1, so each row of dx sums to 0: logits are pushed apart, never all one way.

Who differs: nothing in the mathematics. The 2012 code maximises the log-likelihood, so its gradient is q - p
(layer_kernels.cu:456-471), and it divides by N in the weight gradients (layer.cu:653-673), not here. The paper
maximises the mean over the images, as here; Caffe and torch as here. Label smoothing is later than 2012, torch's
definition. Half types are summed in float32 and the loss stays float32: bf16 would leave it two digits.

Shapes: N images, K classes; x, dx (N, K), t (N) int64, lse (N, 1), loss a number, or (N) without reduction.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from alexnet.errors import UserError
from alexnet.layers.backend import (
    PAIRS,
    Backend,
    Pair,
    cast,
    checked,
    no_autocast,
    pair_for,
    to_float32,
    wide,
)

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_forward(
    x: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, K), target (N) -> loss; keeps x, target and one number an image."""
    x_wide = cast(x, wide(x.dtype))
    top = x_wide.amax(1, keepdim=True)
    lse = top + (x_wide - top).exp().sum(1, keepdim=True).log()
    log_p = x_wide - lse
    loss = -log_p.gather(1, target[:, None]).squeeze(1)
    if label_smoothing:  # a logit of -inf is fine until some of the target lies on it
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    return reduced(loss, reduction), x, lse, target


def cross_entropy_backward(
    dloss: Tensor, x: Tensor, lse: Tensor, target: Tensor, label_smoothing: float, reduction: str
) -> Tensor:
    """dloss, a number or (N) -> dx (N, K)."""
    images, classes = x.shape
    p = (cast(x, lse.dtype) - lse).exp()
    q = torch.full_like(p, label_smoothing / classes)
    q.scatter_(1, target[:, None], 1 - label_smoothing + label_smoothing / classes)
    dloss_N1 = dloss.reshape(-1, 1) / (images if reduction == "mean" else 1)
    return cast(dloss_N1 * (p - q), x.dtype)


def reduced(loss_N: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss_N
    return loss_N.mean() if reduction == "mean" else loss_N.sum()


PAIRS["cross_entropy", "reference"] = Pair(cross_entropy_forward, cross_entropy_backward)


class _CrossEntropy(torch.autograd.Function):
    """Gives the pair to autograd. No mathematics here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, constants: tuple[Any, ...], pair: Pair) -> Tensor:
        with no_autocast(x):
            loss, *saved = pair.forward(x, target, *constants)
        ctx.save_for_backward(*saved)
        ctx.constants, ctx.pair = constants, pair
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        with no_autocast(dloss):
            return ctx.pair.backward(dloss, *ctx.saved_tensors, *ctx.constants), None, None, None


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = Backend.reference,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of class indices with the gradient above.

    input (N, K) logits, target (N) integers 0..K-1 -> a number, or (N) for reduction="none"; float32 for half
    types and under autocast. Classes have no weights, and none is ignored. Raises UserError for other shapes, class
    probabilities, an unknown reduction and a smoothing outside 0..1.
    """
    _check(label_smoothing, reduction)
    integers = not (target.is_floating_point() or target.dtype == torch.bool)
    if input.dim() != 2 or target.shape != input.shape[:1] or not integers:
        raise UserError(
            f"cross_entropy: input {tuple(input.shape)} with target {tuple(target.shape)} {target.dtype}. "
            "Give logits (N, K) and class indices (N)"
        )
    pair = pair_for("cross_entropy", backend)
    input, target = to_float32(input), target.long()
    if pair is None:
        # In the type of the sums, so that the loss of half-type logits has the type of the pairs' loss.
        wide_input = cast(input, wide(input.dtype))
        no_class = torch.iinfo(torch.int64).min  # torch would leave out images of class -100
        return F.cross_entropy(
            wide_input, target, ignore_index=no_class, reduction=reduction, label_smoothing=label_smoothing
        )
    return _CrossEntropy.apply(input, target, (label_smoothing, reduction), pair)


def _check(label_smoothing: float, reduction: str) -> None:
    if not 0 <= label_smoothing <= 1:
        raise UserError(
            f"cross_entropy: label_smoothing={label_smoothing} is no share. Use 0 to 1 (the paper: 0)"
        )
    if reduction not in REDUCTIONS:
        raise UserError(
            f"cross_entropy: reduction={reduction!r} is unknown. Choose one of {', '.join(REDUCTIONS)}"
        )


class CrossEntropyLoss(nn.Module):
    """`torch.nn.CrossEntropyLoss` of class indices, unweighted, with a choice of backend."""

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        backend: str = Backend.reference,
    ) -> None:
        super().__init__()
        _check(label_smoothing, reduction)
        self.label_smoothing, self.reduction = label_smoothing, reduction
        self.backend = checked("cross_entropy", backend)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        options: dict[str, Any] = {"label_smoothing": self.label_smoothing, "reduction": self.reduction}
        return cross_entropy(input, target, **options, backend=self.backend)

    def extra_repr(self) -> str:
        smoothing, reduction = self.label_smoothing, self.reduction
        return f"label_smoothing={smoothing}, reduction={reduction}, backend={self.backend}"
