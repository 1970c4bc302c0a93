"""Update rule, initialisation and data path: no backward, but a mistake there trains a worse network in silence.

Each rule is held against the formula it came from, written out here in float64 or by plain slicing, or against an
identity that only the right rule satisfies. Nothing is shared with the code under test but its name.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from alexnet import model, optim
from alexnet.data import augment
from alexnet.data.augment import AugmentConfig, Colour, Draws, Flip, InputScale
from alexnet.gradcheck.checks import Result, relative
from alexnet.model import Init, ModelConfig

EXACT, ROUNDED = 1e-12, 1e-6  # float64 by another order of operations; images are float32
UPDATE, START, DATA = RULES = ("update rule", "initialisation", "data path")

# ---- the update rule (section 5) ------------------------------------------------------------------------------


class _Layers(nn.Module):
    """Names that the parameter groups tell apart; the same weights every time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Linear(4, 3, dtype=torch.float64)
        self.fc8 = nn.Linear(3, 2, dtype=torch.float64)
        for w, values in zip(self.parameters(), _gradients(self, 99), strict=True):
            w.data = values


def _gradients(net: nn.Module, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in net.parameters()]


def _step(optimizer: torch.optim.Optimizer, net: nn.Module, gradients: list[Tensor]) -> None:
    for w, g in zip(net.parameters(), gradients, strict=True):
        w.grad = g.clone()
    optimizer.step()


def _section_5() -> float:
    """Nine steps, a drop after five; decay on weights only, biases at twice the rate (layer-params-145.cfg)."""
    net = _Layers()
    config = optim.OptimConfig(lr=0.3, weight_decay=0.05, bias_lr_mult=2.0)
    optimizer = optim.build_optimizer(net, config)
    names = [name for name, _ in net.named_parameters()]
    weights = [w.detach().clone() for w in net.parameters()]
    velocity = [torch.zeros_like(w) for w in weights]
    for step in range(9):
        drop = 1.0 if step < 5 else 0.1
        for group in optimizer.param_groups:
            group["lr"] *= 0.1 if step == 5 else 1.0
        gradients = _gradients(net, step)
        _step(optimizer, net, gradients)
        for i, (name, g) in enumerate(zip(names, gradients, strict=True)):
            rate, decay = (0.6, 0.0) if name.endswith("bias") else (0.3, 0.05)
            velocity[i] = 0.9 * velocity[i] - decay * (rate * drop) * weights[i] - (rate * drop) * g
            weights[i] = weights[i] + velocity[i]
    return max(relative(ours, w) for ours, w in zip(net.parameters(), weights, strict=True))


def _coasted(rule: Callable[..., torch.optim.Optimizer]) -> tuple[Tensor, Tensor]:
    """How far conv1's weights still move after five steps, and the fifth step itself.

    The rate falls from 0.3 to 0.03, gradients stop and nothing decays: only the old velocity is left.
    """
    net = _Layers()
    optimizer = rule(net.parameters(), lr=0.3, momentum=0.9, weight_decay=0.0)
    w = net.conv1.weight.data
    for step in range(5):
        last = w.clone()
        _step(optimizer, net, _gradients(net, step))
    here = w.clone()
    optimizer.param_groups[0]["lr"] = 0.03
    for _ in range(400):
        _step(optimizer, net, [torch.zeros_like(w) for w in net.parameters()])
    return w - here, here - last


def _as_sgd_while_constant() -> float:
    """v = -rate u turns one rule into the other, decay included."""
    ours, theirs = _Layers(), _Layers()
    optimizers = (
        optim.Krizhevsky(ours.parameters(), 0.3, 0.9, 0.05),
        torch.optim.SGD(theirs.parameters(), 0.3, 0.9, weight_decay=0.05),
    )
    for step in range(8):
        for net, optimizer in zip((ours, theirs), optimizers, strict=True):
            _step(optimizer, net, _gradients(net, step))
    return max(relative(a, b.detach()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def _residual_after_a_drop() -> float:
    """The old velocity v keeps its size: 0.9 v + 0.81 v + ... = 9 v is still to come, whatever the new rate."""
    moved, velocity = _coasted(optim.Krizhevsky)
    return relative(moved, 9 * velocity)


def _unlike_sgd_after_a_drop() -> float:
    """torch's rate stands outside, so what is still to come falls with it, to 0.9 v: the rules part by 8.1 v."""
    ours, velocity = _coasted(optim.Krizhevsky)
    theirs, _ = _coasted(torch.optim.SGD)
    return relative(ours - theirs, 8.1 * velocity)


def _frozen() -> float:
    """A group whose scale is 0 stands still, its velocity included (weights.cu:148)."""
    net = _Layers()
    optimizer = optim.build_optimizer(net, optim.OptimConfig())
    _step(optimizer, net, _gradients(net, 0))
    for group in optimizer.param_groups:
        group["scale"] = 0.0 if group["name"].startswith("conv1.") else 1.0
    before = {name: w.detach().clone() for name, w in net.named_parameters()}
    for step in (1, 2):
        _step(optimizer, net, _gradients(net, step))
    moved = {name: float((w.detach() - before[name]).abs().max()) for name, w in net.named_parameters()}
    still = [amount for name, amount in moved.items() if name.startswith("conv1.")]
    return max(still) if min(moved["fc8.weight"], moved["fc8.bias"]) > 0 else float("inf")


# ---- the initialisation (section 5) ---------------------------------------------------------------------------

SMALL_NET: dict[str, Any] = {"image_px": 32, "channels": [8] * 5, "hidden": [40, 30], "num_classes": 20,
                             "kernel_size": [5, 3, 3, 3, 3], "stride": [1] * 5, "padding": [[1] * 4] * 5}  # fmt: skip


def _variance_of_a_sum() -> float:
    """fan-in var(w): that of the network of 2012 under `fan_in`, 2 under `he`; `normal` is what is configured."""
    wrong = []
    for i, paper_fan_in in enumerate(model.PAPER_FAN_IN):
        config = ModelConfig(init_std=[0.01 * (j + 1) for j in range(8)])
        expected = {Init.normal: config.init_std[i] ** 2 * 50, Init.fan_in: config.init_std[i] ** 2 * paper_fan_in,
                    Init.he: 2.0}  # fmt: skip
        for init, variance in expected.items():
            std = model.initial_std(replace(config, init=init), i, 50)
            wrong.append(abs(50 * std**2 - variance) / variance)
    return max(wrong)


def _signal_through_relus() -> float:
    """Ten layers of He's weights and ReLUs, 512 wide: the mean square comes out as it went in, but for chance.

    relu(z)^2 of a normal z has mean 1/2 and variance 5/4, so a layer's mean square has a relative deviation of
    sqrt(5/512), and the logarithm after ten layers one of sqrt(50/512): the bound is three of them.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 512, generator=generator, dtype=torch.float64)
    std = model.initial_std(ModelConfig(init=Init.he), 0, 512)
    for _ in range(10):
        x = (x @ (std * torch.randn(512, 512, generator=generator, dtype=torch.float64))).clamp(min=0)
    return abs(float(x.square().mean().log()))


def _weights_as_asked() -> float:
    """Deviation of the largest layers' weights within 5 %, 4 times its standard error; biases exactly."""
    config = ModelConfig(**SMALL_NET, init=Init.he)
    net = model.AlexNet(config, seed=0)
    large = (net.fc6.weight.detach(), net.fc7.weight.detach())
    off = [abs(float(w.std()) * (w[0].numel() / 2) ** 0.5 - 1) for w in large]
    biases = [getattr(net, name).bias for name in model.LAYERS]
    exact = all(bool((b == value).all()) for b, value in zip(biases, config.init_bias, strict=True))
    return max(off) if exact else float("inf")


# ---- the data path (section 4.1) ------------------------------------------------------------------------------

PX, CROP = 11, 6  # stored side and crop: a margin of 5, so that the centre is 2 and not 2.5


def _photos(n: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (n, PX, PX, 3), generator=generator, dtype=torch.uint8)


def _statistics() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    spread = torch.randn(3, 3, generator=generator, dtype=torch.float64) * torch.tensor([50.0, 20.0, 8.0])
    mean = 255 * torch.rand(PX, PX, 3, generator=generator)
    return {"mean": mean, "channel_mean": mean.double().mean((0, 1)), "covariance": spread @ spread.T}


def _augment(**options: object) -> augment.Augment:
    return augment.Augment(AugmentConfig(crop_px=CROP, **options), PX, _statistics())  # type: ignore[arg-type]


def _draws() -> Draws:
    """The four corners of what a crop may be; every second image mirrored; colours of size 1."""
    margin = PX - CROP
    tops, lefts = torch.tensor([0, margin, 1, margin]), torch.tensor([0, 2, margin, margin])
    normals = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))
    return Draws(tops, lefts, torch.arange(4) % 2 == 1, normals)


def _crops_by_slicing() -> float:
    """Cut, mirrored left to right, minus the centre of the mean image, which is neither moved nor mirrored."""
    photos, draws, mean = _photos(), _draws(), _statistics()["mean"]
    centre = mean[2 : 2 + CROP, 2 : 2 + CROP]
    expected = []
    for photo, top, left, flip in zip(photos, draws.top, draws.left, draws.flip, strict=True):
        crop = photo[top : top + CROP, left : left + CROP].float()
        expected.append(((crop.flip(1) if flip else crop) - centre).permute(2, 0, 1))
    return relative(_augment(colour=Colour.none)(photos, draws), torch.stack(expected).double())


def _offsets_reach_everywhere() -> float:
    """0 to px - crop in both directions, all of them and nothing else; half of the images mirrored."""
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(6))
    draws = augment.draw_epoch(AugmentConfig(crop_px=CROP), order, PX, 1, 2)
    every = list(range(PX - CROP + 1))
    missing = sum(sorted(set(axis.tolist())) != every for axis in (draws.top, draws.left))
    return missing + float(abs(draws.flip.double().mean() - 0.5) > 0.05)


def _draws_follow_the_image() -> float:
    """An image's draws depend on the image and the epoch, not on when it is visited."""
    config, order = AugmentConfig(crop_px=CROP), torch.arange(40)
    ahead = augment.draw_epoch(config, order, PX, 1, 2)
    back = augment.draw_epoch(config, order.flip(0), PX, 1, 2)
    other = augment.draw_epoch(config, order, PX, 1, 3)
    same = all(torch.equal(a, b.flip(0)) for a, b in zip(ahead, back, strict=True))
    return 0.0 if same and not torch.equal(ahead.top, other.top) else 1.0


def _draws_per_32() -> float:
    """One flip for 32 consecutive images, as in 2012: 64 images show two values of it at most, in two runs."""
    config = AugmentConfig(crop_px=CROP, flip=Flip.per_32)
    runs = [augment.draw_epoch(config, torch.randperm(64), PX, 0, epoch).flip for epoch in range(8)]
    constant = all(len(set(run[part].tolist())) == 1 for run in runs for part in (slice(32), slice(32, 64)))
    return 0.0 if constant and any(run[0] != run[40] for run in runs) else 1.0


def _colour_spreads_as_the_pixels() -> float:
    """sum_i (std s_i v_i)(std s_i v_i)' = std^2 S for s_i = sqrt(l_i): noise has the pixels' own covariance."""
    noise = _augment(colour=Colour.stdev).colour_noise(torch.eye(3)).double()
    return relative(noise.T @ noise, 0.01 * _statistics()["covariance"])


def _colour_by_eigenvalues() -> float:
    """With the paper's s_i = l_i (of 0..1 pixels, times 255) the same sum is std^2 S^2 / 255^2."""
    noise = _augment(colour=Colour.eigenvalue).colour_noise(torch.eye(3)).double()
    covariance = _statistics()["covariance"]
    return relative(noise.T @ noise, 0.01 * covariance @ covariance / 255**2)


def _colour_added_then_divided() -> float:
    """(image - mean + noise) / 1.1, the same noise for every pixel of an image (convdata_jpeg.py:155-179)."""
    photos, draws = _photos(), _draws()
    module = _augment(colour=Colour.stdev, colour_divide=True)
    clean = _augment(colour=Colour.none)(photos, draws).double()
    noise = module.colour_noise(draws.colour).double()
    return relative(module(photos, draws), (clean + noise[:, :, None, None]) / 1.1)


def _ten_views_by_slicing() -> float:
    """Corners, centre, and the five mirrored, in this order; the mean as in training."""
    photos, mean = _photos(2), _statistics()["mean"][2 : 2 + CROP, 2 : 2 + CROP]
    places = [(0, 0), (0, 5), (5, 0), (5, 5), (2, 2)]
    cut = [photos[:, top : top + CROP, left : left + CROP].float() for top, left in places]
    views = torch.stack([view - mean for view in [*cut, *(view.flip(2) for view in cut)]], 1)
    return relative(_augment(colour=Colour.none).ten_views(photos), views.permute(0, 1, 4, 2, 3).double())


def _normalised_by_channel() -> float:
    """(x - mean) / standard deviation, each channel by its own."""
    photos, statistics = _photos(), _statistics()
    crop = photos[:, 2 : 2 + CROP, 2 : 2 + CROP].double()
    deviation = statistics["covariance"].diagonal().sqrt()
    expected = ((crop - statistics["channel_mean"]) / deviation).permute(0, 3, 1, 2)
    return relative(_augment(colour=Colour.none, input=InputScale.normalised).centre(photos), expected)


# ---- the tables -------------------------------------------------------------------------------------------------

CHECKS: list[tuple[str, str, Callable[[], float], float]] = [  # rule, what is checked, the error, its bound
    (UPDATE, "section 5 written out, with a drop", _section_5, EXACT),
    (UPDATE, "torch.optim.SGD at a constant rate", _as_sgd_while_constant, EXACT),
    (UPDATE, "9 v still to come after a drop", _residual_after_a_drop, EXACT),
    (UPDATE, "8.1 v apart from torch.optim.SGD", _unlike_sgd_after_a_drop, EXACT),
    (UPDATE, "conv1 frozen, velocity included", _frozen, 0.0),
    (START, "variance of a unit's sum", _variance_of_a_sum, EXACT),
    (START, "mean square kept by ten ReLU layers", _signal_through_relus, 3 * (50 / 512) ** 0.5),
    (START, "weights and biases as asked", _weights_as_asked, 0.05),
    (DATA, "crops and mirrors by slicing", _crops_by_slicing, ROUNDED),
    (DATA, "offsets reach every place", _offsets_reach_everywhere, 0.0),
    (DATA, "draws follow the image", _draws_follow_the_image, 0.0),
    (DATA, "one flip for 32 images", _draws_per_32, 0.0),
    (DATA, "colour has the pixels' covariance", _colour_spreads_as_the_pixels, ROUNDED),
    (DATA, "colour by eigenvalues", _colour_by_eigenvalues, ROUNDED),
    (DATA, "colour added, then divided", _colour_added_then_divided, ROUNDED),
    (DATA, "ten views by slicing", _ten_views_by_slicing, ROUNDED),
    (DATA, "normalised by channel", _normalised_by_channel, ROUNDED),
]


def rule_results(only: str = "") -> Iterator[Result]:
    """Every check of this file, or those of one rule: each one number and its bound."""
    for rule, what, error, bound in CHECKS:
        if only in ("", rule):
            dtype = "float32" if rule == DATA else "float64"
            yield Result(rule, "-", "cpu", dtype, what, "ordinary", "rule", error(), bound)


# ---- one call of a rule, for the diagnosis ----------------------------------------------------------------------


def _updated(update: Callable[..., Any], decay: float) -> dict[str, Tensor]:
    w, v = (torch.tensor(values, dtype=torch.float64) for values in ([1.0, -2.0], [0.5, 0.25]))
    for g in ([1.0, 2.0], [-1.0, 0.5]):
        update([w], [torch.tensor(g, dtype=torch.float64)], [v], 0.1, 0.9, decay)
    return {"w": w, "v": v}


def _deviations(initial_std: Callable[..., Any], init: Init) -> dict[str, Tensor]:
    config = ModelConfig(init=init)
    return {"std": torch.tensor([initial_std(config, i, 100) for i in range(8)], dtype=torch.float64)}


_STATE = "w=[1, -2], v=[0.5, 0.25], g=[1, 2] then [-1, 0.5]"
# {exercise: [(what is asked of a function, the question)]}
CALLS: dict[str, list[tuple[str, Callable[..., dict[str, Tensor]]]]] = {
    "update_rule": [
        (f"two steps: lr=0.1, momentum=0.9, decay={decay}, {_STATE}", partial(_updated, decay=decay))
        for decay in (0.0, 0.05)
    ],
    "initialisation": [
        (f"conv1 to fc8 with 100 inputs a unit, init={init}, init_std=0.01", partial(_deviations, init=init))
        for init in (Init.normal, Init.he, Init.fan_in)
    ],
}
