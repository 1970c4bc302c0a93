"""The update rule of 2012 on float32 master weights, of which bfloat16 working copies do the work.

A step in bfloat16 needs the weights rounded, and autocast rounds them anew at every use. Here every parameter w has
a working copy, round(w). The network computes with it, and it collects the gradient g. The update reads g and writes
w, the velocity v and the new copy in one pass over memory:

    v <- 0.9 v - 0.0005 e w - e g;    w <- w + v;    copy <- round(w)

The parameters of the network stay float32 (the master weights), so checkpoints, averages and `evaluate.py` are the
same as without copies. The holdout images of a run are judged with the copies, as it trains. A copy follows from its
master weight and is never stored: a resumed run rounds again and continues bit for bit.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from alexnet.compile import compiled
from alexnet.optim import Krizhevsky, OptimConfig, Rule, parameter_groups

Tensors = list[Tensor]


class WorkingCopies:
    """The working copy of each parameter of a network, {name: copy}, and the network as it computes with them."""

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.net, self.dtype = net, dtype
        self.by_name = {
            name: p.detach().to(dtype).requires_grad_(p.requires_grad) for name, p in net.named_parameters()
        }

    def __call__(self, *inputs: Any, **choices: Any) -> Any:
        """The network's output, computed with the copies. They get the gradients, the master weights get none."""
        return functional_call(self.net, self.by_name, inputs, choices)

    def by_master(self) -> dict[Tensor, Tensor]:
        """{master weight: its copy}"""
        return {master: self.by_name[name] for name, master in self.net.named_parameters()}

    @torch.no_grad()
    def refresh(self) -> None:
        """After the master weights have changed otherwise than by the update: a checkpoint was loaded."""
        for master, copy in self.by_master().items():
            copy.copy_(master)


def _update(
    w: Tensors,
    g: Tensors,
    v: Tensors,
    copies: Tensors,
    lr: Tensor,
    momentum: float,
    decay: float,
    inside: bool,
) -> None:
    """optim.krizhevsky_update (the rate inside the velocity) or optim.sgd_update in one pass over memory.

    w is rounded into its copies, if there are any.
    """
    for i, (w_i, g_i, v_i) in enumerate(zip(w, g, v, strict=True)):
        if inside:
            v_new = momentum * v_i - decay * lr * w_i - lr * g_i.to(w_i.dtype)
            w_new = w_i + v_new
        else:
            v_new = momentum * v_i + decay * w_i + g_i.to(w_i.dtype)
            w_new = w_i - lr * v_new
        v[i].copy_(v_new)
        w[i].copy_(w_new)
        if copies:
            copies[i].copy_(w_new)


class FusedKrizhevsky(Krizhevsky):
    """`Krizhevsky` as one compiled pass over memory per group; working copies, if there are any, bring the gradients.

    The rate enters as a tensor, so a schedule compiles nothing anew. State (the velocities) and parameter groups are
    those of `Krizhevsky`.
    """

    def __init__(self, params: Iterable[Any], copies: WorkingCopies | None = None, **choices: Any) -> None:
        super().__init__(params, **choices)
        self.copy_of = {} if copies is None else copies.by_master()
        self._update = compiled(_update)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, rates: Sequence[Tensor | None] | None = None
    ) -> float | None:
        """One update. `rates` are a 0-dim float32 tensor per group, None for a frozen one; by default those of now."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if rates is None:
            device = self.param_groups[0]["params"][0].device
            # Filled there: a number copied to a GPU would wait for it.
            rates = [
                torch.full((), r, dtype=torch.float32, device=device) if r else None for r in self.rates()
            ]
        for group, rate in zip(self.param_groups, rates, strict=True):
            params = [p for p in group["params"] if self.copy_of.get(p, p).grad is not None]
            if rate is None or not params:
                continue
            gradients = [self.copy_of.get(p, p).grad for p in params]
            velocities = [self._velocity(p) for p in params]
            copies = [self.copy_of[p].detach() for p in params if p in self.copy_of]
            tensors = [p.detach() for p in params], gradients, velocities, copies
            self._update(*tensors, rate, group["momentum"], group["weight_decay"], self.rate_inside)
        return loss

    def rates(self) -> list[float]:
        """The rate of each group now; 0 where a group is frozen."""
        return [group["lr"] * group["scale"] for group in self.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for copy in self.copy_of.values():
            copy.grad = None


def build_fused(net: nn.Module, config: OptimConfig, copies: WorkingCopies | None = None) -> FusedKrizhevsky:
    """optim.build_optimizer, compiled."""
    groups, inside = parameter_groups(net, config), config.rule == Rule.krizhevsky
    return FusedKrizhevsky(groups, copies, lr=config.lr, momentum=config.momentum, rate_inside=inside)
