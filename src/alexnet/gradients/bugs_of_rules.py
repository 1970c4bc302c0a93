"""The bugs of the update rule and of the data path, for the kill table."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from alexnet import optim
from alexnet.data import augment
from alexnet.data.augment import Augment
from alexnet.gradients import rules
from alexnet.gradients.mutants import Mutant, attribute

# ---- the update rule ------------------------------------------------------------------------------------------

Lists = list[Tensor]


def _update(rule: Callable[..., None]) -> Callable[..., None]:
    """One weight after the other, in place: rule(w, g, v, lr, momentum, decay)."""

    def update(w: Lists, g: Lists, v: Lists, lr: float, momentum: float, decay: float) -> None:
        for one in zip(w, g, v, strict=True):
            rule(*one, lr, momentum, decay)

    return update


def _decay_without_rate(w: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float, decay: float) -> None:
    v.mul_(momentum).sub_(decay * w + lr * g)
    w.add_(v)


def _decay_outside(w: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float, decay: float) -> None:
    v.mul_(momentum).sub_(lr * g)
    w.mul_(1 - lr * decay).add_(v)


def _old_velocity(w: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float, decay: float) -> None:
    step = v.clone()
    v.mul_(momentum).sub_(lr * decay * w + lr * g)
    w.add_(step)


def _nesterov(w: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float, decay: float) -> None:
    slope = g + decay * w
    v.mul_(momentum).sub_(lr * slope)
    w.add_(momentum * v - lr * slope)


def _dampened(w: Tensor, g: Tensor, v: Tensor, lr: float, momentum: float, decay: float) -> None:
    v.mul_(momentum).sub_((1 - momentum) * lr * (g + decay * w))
    w.add_(v)


def _groups(
    **wrong: Callable[[dict[str, Any], optim.OptimConfig], float],
) -> Callable[..., list[dict[str, Any]]]:
    """The parameter groups with wrong values for the biases."""
    right = optim.parameter_groups

    def groups(model: Any, config: optim.OptimConfig) -> list[dict[str, Any]]:
        found = right(model, config)
        for group in found:
            if group["name"].endswith("bias"):
                group.update({key: value(group, config) for key, value in wrong.items()})
        return found

    return groups


@torch.no_grad()
def _coasting_step(self: optim.Krizhevsky) -> None:
    """A frozen group whose velocity still moves it."""
    for group in self.param_groups:
        lr = group["lr"] * group["scale"]
        velocities = [self._velocity(p) for p in group["params"]]
        gradients = [p.grad for p in group["params"]]
        optim.krizhevsky_update(
            group["params"], gradients, velocities, lr, group["momentum"], group["weight_decay"]
        )


def _of_update(name: str, rule: Callable[..., None]) -> Mutant:
    return attribute(rules.UPDATE, name, optim, "krizhevsky_update", rule)


UPDATE = [
    _of_update("rate outside the velocity", optim.sgd_update),
    _of_update("decay without the rate", _update(_decay_without_rate)),
    _of_update("decay outside the velocity", _update(_decay_outside)),
    _of_update("step by the velocity before", _update(_old_velocity)),
    _of_update("Nesterov's look ahead", _update(_nesterov)),
    _of_update("gradient dampened by 1 - momentum", _update(_dampened)),
    attribute(
        rules.UPDATE,
        "decay on biases",
        optim,
        "parameter_groups",
        _groups(weight_decay=lambda g, c: c.weight_decay),
    ),
    attribute(
        rules.UPDATE, "biases at the weights' rate", optim, "parameter_groups", _groups(lr=lambda g, c: c.lr)
    ),
    attribute(rules.UPDATE, "frozen layers coast on", optim.Krizhevsky, "step", _coasting_step),
]

# ---- the data path --------------------------------------------------------------------------------------------

_cut, _draw, _principal = augment.crop_rows, augment.draw_epoch, augment.principal_colours
_forward, _noise, _input, _fill, _views = (
    Augment.forward,
    Augment.colour_noise,
    Augment._to_input,
    Augment._fill,
    Augment.ten_views,
)


def _one_right(images: Tensor, top: Tensor, left: Tensor, side: int) -> Tensor:
    return _cut(images, top, (left + 1).clamp(max=images.shape[2] - side), side)


def _upside_down(crops: Tensor, flip: Tensor) -> Tensor:
    return torch.where(flip[:, None, None, None], crops.flip(1), crops)


def _mean_from_the_corner(self: Augment, statistics: dict[str, Tensor]) -> None:
    _fill(self, {**statistics, "mean": statistics["mean"].roll((2, 2), (0, 1))})


def _mean_mirrored_too(self: Augment, images: Tensor, draws: augment.Draws, colour_on: bool = True) -> Tensor:
    out = _forward(self, images, draws._replace(flip=torch.zeros_like(draws.flip)), colour_on)
    return torch.where(draws.flip[:, None, None, None], out.flip(3), out)


def _divided_first(self: Augment, crops: Tensor, noise: Tensor | None = None, *rest: Any) -> Tensor:
    divided = self.config.colour_divide and noise is not None
    return _input(self, crops, noise * 1.1 if divided and noise is not None else noise, *rest)


def _views_upside_down(self: Augment, images: Tensor) -> Tensor:
    views = _views(self, images)
    return torch.cat([views[:, :5], _views(self, images.flip(1))[:, [2, 3, 0, 1, 4]]], 1)


def _of_data(name: str, attribute_name: str, wrong: Any, owner: Any = augment) -> Mutant:
    return attribute(rules.DATA, name, owner, attribute_name, wrong)


DATA = [
    _of_data("crop offset by one", "crop_rows", _one_right),
    _of_data(
        "rows and columns of the crop exchanged",
        "crop_rows",
        lambda images, top, left, side: _cut(images, left, top, side),
    ),
    _of_data("BGR for RGB", "crop_rows", lambda *a: _cut(*a).flip(-1)),
    _of_data("mirrored upside down", "mirror", _upside_down),
    _of_data("mean image not from its centre", "_fill", _mean_from_the_corner, Augment),
    _of_data("mean subtracted before mirroring", "forward", _mean_mirrored_too, Augment),
    _of_data(
        "colour along rows of the eigenvectors",
        "principal_colours",
        lambda s: (_principal(s)[0], _principal(s)[1].T),
    ),
    _of_data(
        "colour along the wrong eigenvector",
        "principal_colours",
        lambda s: (_principal(s)[0].flip(0), _principal(s)[1]),
    ),
    _of_data(
        "variance for standard deviation",
        "colour_noise",
        lambda self, z: _noise(self, z * self.eigenvalues.sqrt()),
        Augment,
    ),
    _of_data("divided by 1.1 before colour is added", "_to_input", _divided_first, Augment),
    _of_data(
        "offsets stop one short of the margin",
        "draw_epoch",
        lambda c, order, px, *a: _draw(c, order, px - 1, *a),
    ),
    _of_data(
        "draws by position, not by image", "draw_epoch", lambda c, order, *a: _draw(c, order.sort()[0], *a)
    ),
    _of_data(
        "the same draws in every epoch",
        "draw_epoch",
        lambda c, order, px, seed, epoch: _draw(c, order, px, seed, 0),
    ),
    _of_data(
        "a flip for each image, not for 32",
        "draw_epoch",
        lambda c, *a: _draw(replace(c, flip=augment.Flip.per_image), *a),
    ),
    _of_data("ten views mirrored upside down", "ten_views", _views_upside_down, Augment),
    _of_data(
        "ten views: five of them twice",
        "ten_views",
        lambda self, x: _views(self, x)[:, :5].repeat(1, 2, 1, 1, 1),
        Augment,
    ),
]
