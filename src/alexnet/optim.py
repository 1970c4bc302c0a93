"""The update rule of 2012 and its schedules (section 5; layer-params-145.cfg; weights.cu:146-198).

For every weight w with gradient g, averaged over the batch, and rate e:

    v <- 0.9 v - 0.0005 e w - e g
    w <- w + v

The rate stands *inside* the velocity. torch.optim.SGD keeps u <- 0.9 u + g + 0.0005 w and steps w <- w - e u: the
same sequence of weights while e is constant (v = -e u), but not right after a drop of e. Here the old velocity
keeps its size and dies out over ten steps; there it is rescaled at once. `rate_inside=False` is torch's rule.

Weights are decayed, biases are not (layer.cu:565), and the 2012 biases had twice the rate, which was not annealed
with the weights'. The paper says "equal learning rate for all layers"; `paper` and `code145` differ here. The
code also slows conv1 by 10 at epoch 67 of 91 and freezes it at 72: `conv1_slow_at`, `conv1_frozen_at`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from alexnet.errors import UserError


class Rule(StrEnum):
    krizhevsky = "krizhevsky"  # rate inside the velocity
    sgd = "sgd"  # rate outside, as torch.optim.SGD


class Schedule(StrEnum):
    constant = "constant"
    plateau = "plateau"  # divide by 10 when the holdout error stops improving, three times (section 5)
    steps = "steps"  # the same drops at fixed fractions of training (notes in layer-params-145.cfg:165-182)
    cosine = "cosine"
    one_cycle = "one_cycle"


@dataclass
class OptimConfig:
    """The update rule, its rates and its schedule. Defaults: the paper, section 5."""

    rule: Rule = Rule.krizhevsky
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # Rate of the biases over the rate of the weights; 2 in layer-params-145.cfg:1-119.
    bias_lr_mult: float = 1.0
    bias_decay: bool = False
    # False: the biases keep their first rate while the weights' falls (2012 code).
    bias_anneals: bool = True
    epochs: int = 90
    schedule: Schedule = Schedule.plateau
    # plateau: patience, in epochs without a better holdout error (the next such epoch drops the rate); number of drops.
    patience: int = 5
    drops: int = 3
    # steps: fractions of training at which the rate is divided by 10 (epochs 25, 51, 79 of 91 in the notes).
    milestones: list[float] = field(default_factory=lambda: [0.275, 0.56, 0.868])
    # one_cycle, cosine: fraction of training in which the rate rises linearly to `lr`.
    warmup: float = 0.0
    # Fractions of training after which conv1's rate is divided by 10, then 0 (0.736 and 0.791 in the 2012 notes).
    conv1_slow_at: float = 1.0
    conv1_frozen_at: float = 1.0
    label_smoothing: float = 0.0
    # Decay per step of an exponential average of the weights that is evaluated instead of them; 0 is off.
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        positive = {"lr": self.lr, "epochs": self.epochs, "bias_lr_mult": self.bias_lr_mult}
        for name, value in positive.items():
            if value <= 0:
                raise UserError(f"optim.{name}={value} must be positive")
        unit = {"momentum": self.momentum, "label_smoothing": self.label_smoothing, "warmup": self.warmup}
        for name, value in {**unit, "ema_decay": self.ema_decay}.items():
            if not 0 <= value < 1:
                raise UserError(f"optim.{name}={value} must be in [0, 1)")
        counts = {"weight_decay": self.weight_decay, "patience": self.patience, "drops": self.drops}
        for name, value in counts.items():
            if value < 0:
                raise UserError(f"optim.{name}={value} must not be negative")
        fractions = {"conv1_slow_at": [self.conv1_slow_at], "conv1_frozen_at": [self.conv1_frozen_at]}
        for name, values in {**fractions, "milestones": self.milestones}.items():
            if not all(0 <= value <= 1 for value in values):
                raise UserError(
                    f"optim.{name}={getattr(self, name)} must be in [0, 1], a fraction of training"
                )


Tensors = list[Tensor]


def krizhevsky_update(w: Tensors, g: Tensors, v: Tensors, lr: float, momentum: float, decay: float) -> None:
    """v <- momentum v - decay lr w - lr g;  w <- w + v, in place (section 5)."""
    torch._foreach_mul_(v, momentum)
    if decay:
        torch._foreach_add_(v, w, alpha=-decay * lr)
    torch._foreach_add_(v, g, alpha=-lr)
    torch._foreach_add_(w, v)


def sgd_update(w: Tensors, g: Tensors, v: Tensors, lr: float, momentum: float, decay: float) -> None:
    """v <- momentum v + decay w + g;  w <- w - lr v, in place: torch.optim.SGD."""
    torch._foreach_mul_(v, momentum)
    if decay:
        torch._foreach_add_(v, w, alpha=decay)
    torch._foreach_add_(v, g)
    torch._foreach_add_(w, v, alpha=-lr)


class Krizhevsky(torch.optim.Optimizer):
    """The rule above for groups of parameters with their own rates.

    A group whose `lr` or `scale` is 0 is frozen, its velocity included (weights.cu:148). `scale` multiplies the
    group's rate from outside the schedule: it is how conv1 is slowed down and frozen.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        rate_inside: bool = True,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, scale=1.0)
        super().__init__(params, defaults)
        self.rate_inside = rate_inside

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        update = krizhevsky_update if self.rate_inside else sgd_update
        for group in self.param_groups:
            lr = group["lr"] * group["scale"]
            params = [p for p in group["params"] if p.grad is not None]
            if lr and params:
                gradients = [p.grad for p in params]
                velocities = [self._velocity(p) for p in params]
                update(params, gradients, velocities, lr, group["momentum"], group["weight_decay"])
        return loss

    def _velocity(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(p)
        return state["velocity"]


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Weights and biases of conv1 and of the other layers, each with its rate and decay. Empty groups are left out."""
    named = list(model.named_parameters())
    groups = []
    for layer in ("conv1", "others"):
        for kind in ("weight", "bias"):
            params = [
                p for n, p in named if n.endswith(kind) and n.startswith("conv1.") == (layer == "conv1")
            ]
            is_bias = kind == "bias"
            groups.append(
                {
                    "name": f"{layer}.{kind}",
                    "params": params,
                    "lr": config.lr * (config.bias_lr_mult if is_bias else 1.0),
                    "weight_decay": config.weight_decay if config.bias_decay or not is_bias else 0.0,
                }
            )
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimConfig) -> Krizhevsky:
    groups = parameter_groups(model, config)
    return Krizhevsky(groups, config.lr, config.momentum, rate_inside=config.rule == Rule.krizhevsky)


def build_scheduler(
    optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int
) -> LRScheduler | ReduceLROnPlateau:
    """`steps` is the number of updates in the whole run. The plateau rule is stepped per epoch, the rest per update."""
    annealed = [config.bias_anneals or not g["name"].endswith("bias") for g in optimizer.param_groups]
    if config.schedule == Schedule.plateau:
        # A group that is not annealed has its own rate as its lowest.
        rates = [group["lr"] for group in optimizer.param_groups]
        lowest = [lr * (0.1**config.drops if a else 1.0) for lr, a in zip(rates, annealed, strict=True)]
        return ReduceLROnPlateau(
            optimizer, factor=0.1, patience=config.patience, threshold=0.0, min_lr=lowest, eps=0.0
        )

    def factor(step: int) -> float:
        return rate_factor(config, step / max(steps, 1))

    return LambdaLR(optimizer, [factor if a else (lambda step: 1.0) for a in annealed])


def rate_factor(config: OptimConfig, progress: float) -> float:
    """What the rate is multiplied by after a fraction `progress` of training.

    Raises UserError for a schedule that progress alone does not decide, as the plateau rule.
    """
    if config.schedule == Schedule.constant:
        return 1.0
    if config.schedule == Schedule.steps:
        return 0.1 ** sum(progress >= milestone for milestone in config.milestones)
    if config.schedule not in (Schedule.cosine, Schedule.one_cycle):
        raise UserError(f"optim.schedule={config.schedule} has no rate that follows from the progress alone")
    if progress < config.warmup:
        return max(progress / config.warmup, 0.01)
    rest = min((progress - config.warmup) / (1 - config.warmup), 1.0)
    if config.schedule == Schedule.one_cycle:
        return 1.0 - rest
    return 0.5 * (1.0 + math.cos(math.pi * rest))


def conv1_scale(config: OptimConfig, progress: float) -> float:
    """1, then 0.1, then 0: conv1 is slowed down and frozen before the others (layer-params-145.cfg:171-176)."""
    if progress >= config.conv1_frozen_at:
        return 0.0
    return 0.1 if progress >= config.conv1_slow_at else 1.0
