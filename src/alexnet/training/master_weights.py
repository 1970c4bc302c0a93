"""The update rule of 2012 on float32 parameters whose bfloat16 *shadows* do the work.

A step in bfloat16 needs the weights rounded, and autocast rounds them anew at every use. Here every parameter w has
a shadow, round(w), which the network computes with and which collects the gradient; the update reads it, and writes
w, the velocity and the new shadow in one pass over memory:

    v <- 0.9 v - 0.0005 e w - e g;    w <- w + v;    shadow <- round(w)

The parameters of the network stay float32 (the *masters*), so checkpoints, averages and `evaluate.py` are as without
shadows; the holdout images of a run are judged with the shadows, as it trains. A shadow is a function of its master
and never stored: a resumed run rounds again and goes on bit for bit.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alexnet.compile import compiled
from alexnet.optim import Krizhevsky, OptimConfig, Rule, parameter_groups

Tensors = list[Tensor]


class Shadows:
    """The shadow of each parameter of a network, and the network as it computes with them."""

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.net, self.dtype = net, dtype
        self.of = {name: p.detach().to(dtype).requires_grad_() for name, p in net.named_parameters()}

    def __call__(self, *inputs: Any, **choices: Any) -> Any:
        """The network's output, computed with the shadows. The masters get no gradient, their shadows do."""
        return functional_call(self.net, self.of, inputs, choices)

    def by_master(self) -> Iterator[tuple[Tensor, Tensor]]:
        for name, p in self.net.named_parameters():
            yield p, self.of[name]

    @torch.no_grad()
    def refresh(self) -> None:
        """After the masters have changed otherwise than by the update: a checkpoint was loaded."""
        for master, shadow in self.by_master():
            shadow.copy_(master)


def _krizhevsky(
    w: Tensors, g: Tensors, v: Tensors, s: Tensors, lr: Tensor, momentum: float, decay: float
) -> None:
    """optim.krizhevsky_update in one pass; w is rounded into s, where there are shadows."""
    for i, (w_i, g_i, v_i) in enumerate(zip(w, g, v, strict=True)):
        v_new = momentum * v_i - decay * lr * w_i - lr * g_i.to(w_i.dtype)
        _write(i, w_i + v_new, v_new, w, v, s)


def _sgd(w: Tensors, g: Tensors, v: Tensors, s: Tensors, lr: Tensor, momentum: float, decay: float) -> None:
    """optim.sgd_update in one pass; w is rounded into s, where there are shadows."""
    for i, (w_i, g_i, v_i) in enumerate(zip(w, g, v, strict=True)):
        v_new = momentum * v_i + decay * w_i + g_i.to(w_i.dtype)
        _write(i, w_i - lr * v_new, v_new, w, v, s)


def _write(i: int, w_new: Tensor, v_new: Tensor, w: Tensors, v: Tensors, s: Tensors) -> None:
    v[i].copy_(v_new)
    w[i].copy_(w_new)
    if s:
        s[i].copy_(w_new)


class FusedKrizhevsky(Krizhevsky):
    """`Krizhevsky` as one compiled pass over memory per group; with shadows, these bring the gradients.

    The rate enters as a tensor, so a schedule compiles nothing anew. State (the velocities) and parameter groups are
    those of `Krizhevsky`.
    """

    def __init__(self, params: Iterable[Any], shadows: Shadows | None = None, **choices: Any) -> None:
        super().__init__(params, **choices)
        self.shadow = dict(shadows.by_master()) if shadows is not None else {}
        self._update = compiled(_krizhevsky if self.rate_inside else _sgd)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, rates: Sequence[Tensor | None] | None = None
    ) -> float | None:
        """One update. `rates` are a 0-dim float32 tensor per group, None for a frozen one; by default those of now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, rate in zip(self.param_groups, rates or self._rate_tensors(), strict=True):
            masters = [p for p in group["params"] if self.shadow.get(p, p).grad is not None]
            if rate is not None and masters:
                self._update_group(masters, rate, group["momentum"], group["weight_decay"])
        return loss

    def rates(self) -> list[float]:
        """The rate of each group now; 0 where a group is frozen."""
        return [group["lr"] * group["scale"] for group in self.param_groups]

    def _rate_tensors(self) -> list[Tensor | None]:
        device = self.param_groups[0]["params"][0].device
        # Filled there: a number copied to a GPU would wait for it.
        return [torch.full((), r, dtype=torch.float32, device=device) if r else None for r in self.rates()]

    def _update_group(self, masters: Tensors, rate: Tensor, momentum: float, decay: float) -> None:
        gradients = [self.shadow.get(p, p).grad for p in masters]
        velocities = [self._velocity(p) for p in masters]
        shadows = [self.shadow[p].detach() for p in masters if p in self.shadow]
        self._update([p.detach() for p in masters], gradients, velocities, shadows, rate, momentum, decay)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for s in self.shadow.values():
            s.grad = None


def build_fused(net: nn.Module, config: OptimConfig, shadows: Shadows | None = None) -> FusedKrizhevsky:
    """optim.build_optimizer, compiled."""
    groups, inside = parameter_groups(net, config), config.rule == Rule.krizhevsky
    return FusedKrizhevsky(groups, shadows, lr=config.lr, momentum=config.momentum, rate_inside=inside)
