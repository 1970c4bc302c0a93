"""The network as a whole: its gradients on real shapes, and ten steps of training compared with torch's.

d) A network is right if its layers are right and in the right order. Its loss L is a number; along a random
   direction d in all parameters and the image at once, (L(w + h d) - L(w - h d)) / 2h must be <gradient, d>. It takes
   two forward passes, however many parameters there are. A direction crosses kinks (units that open, windows whose
   winner changes), each of which adds an error of order h times its share: few at h = 1e-7. And every parameter's
   gradient is compared with autograd's on its own.

e) Ten steps in float64 with the same images, masks and rates: on our side the hand-derived backward and
   `alexnet.optim`, on the other native operations, torch's autograd, and section 5's formula written out below. After
   five steps the rate drops by ten, so that a rate outside the velocity would show. What agrees to ten digits after
   ten steps agreed in each.

Weights and images are multiples of 2^-15 from an integer generator, so every machine starts from the same bits.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call

from alexnet.cli import compose_group
from alexnet.gradcheck.checks import Result, quotient_error, relative
from alexnet.layers import cross_entropy, dropout_key
from alexnet.layers.backend import OPERATIONS
from alexnet.model import AlexNet, Init, ModelConfig, Order
from alexnet.optim import OptimConfig, build_optimizer

Chosen = Mapping[str, str]  # {operation: backend}
NATIVE = dict.fromkeys(OPERATIONS, "native")
IMAGES = 2
STEP = 1e-7
DIRECTION_BOUND = 1e-6
DIRECTIONS = 2
PARAMETER_BOUND = 1e-10
LOSS_BOUND, WEIGHT_BOUND = 1e-10, 1e-9
FLOAT32_BOUND = 1e-3
TRAINING_STEPS, DROP_AFTER = 10, 5


# Every operation, both orders of block 1, both norms, towers, overlapping pools and ties of 2012, small enough for
# float64: 28-14-7-3 pixels. alpha is large, so that the norms count.
STEPS_NET: ModelConfig = compose_group(
    "model", "mini", ModelConfig, {
        "num_classes": 5, "channels": [8, 16, 12, 12, 8], "hidden": [24, 20], "order1": Order.lrn_pool_relu,
        "same_map_norm": True, "lrn_alpha": 0.1, "lrn_alpha_divided": False, "init": Init.he,
    }
)  # fmt: skip
NETWORKS: dict[str, ModelConfig] = {  # real shapes
    "mini": compose_group("model", "mini", ModelConfig, {"num_classes": 200, "init": Init.he}),
    "code145, 224 px": compose_group("model", "code145", ModelConfig, {"init": Init.he}),
}


def reproducible(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Multiples of 2^-15 between -1 and 1, float64."""
    return torch.randint(-(2**15), 2**15, shape, generator=generator).double() / 2**15


def network(config: ModelConfig, backends: Chosen, device: str, dtype: torch.dtype) -> AlexNet:
    """Weights of He's variance 2 / fan-in, uniform, the same bits on every machine; small biases."""
    with torch.device("meta"):
        net = AlexNet(config, backends, seed=0)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, w in net.named_parameters():
        scale = (6 / w[0].numel()) ** 0.5 if w.dim() > 1 else 0.1
        weights[name] = nn.Parameter((scale * reproducible(w.shape, generator)).to(device, dtype))
    net.load_state_dict(weights, assign=True)
    return net


def batches(config: ModelConfig, steps: int, device: str, dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = 2 * reproducible((IMAGES, 3, config.image_px, config.image_px), generator)
        labels = torch.randint(config.classes, (IMAGES,), generator=generator)
        yield [images.to(device, dtype), labels.to(device)]


def loss_of(
    net: AlexNet, images: Tensor, labels: Tensor, step: int = 0, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """The training loss of one step, dropout included; at other weights than the network's own if given."""
    arguments = (images, dropout_key(0, step, 0))
    logits = net(*arguments) if weights is None else functional_call(net, dict(weights), arguments)
    return cross_entropy(logits, labels, backend=net.backends["cross_entropy"])


# ---- d) gradients of the whole network ------------------------------------------------------------------------


def network_results(name: str, config: ModelConfig, backends: Chosen, device: str) -> Iterator[Result]:
    """Random directions, then every parameter, on real shapes in float64 with a batch of two."""
    net = network(config, backends, device, torch.float64).train()
    native = AlexNet(config, NATIVE, seed=0).train()
    native.load_state_dict(dict(net.named_parameters()), assign=True)
    ((images, labels),) = batches(config, 1, device, torch.float64)
    images.requires_grad_()
    ours, exact = ({**dict(each.named_parameters()), "images": images} for each in (net, native))
    gradients = dict(zip(ours, grad(loss_of(net, images, labels), list(ours.values())), strict=True))
    error = _along_random(net, ours, labels, gradients)
    yield _result(name, backends, device, "directions", error, DIRECTION_BOUND)
    native_gradients = grad(loss_of(native, images, labels), list(exact.values()))
    for (parameter, gradient), theirs in zip(gradients.items(), native_gradients, strict=True):
        error = relative(gradient, theirs)
        yield _result(name, backends, device, "parameters", error, PARAMETER_BOUND, what=parameter)


@torch.no_grad()
def _along_random(
    net: AlexNet, points: Mapping[str, Tensor], labels: Tensor, gradients: Mapping[str, Tensor]
) -> float:
    """The largest error of a difference quotient along a few directions."""
    generator, errors = torch.Generator().manual_seed(2), []
    for _ in range(DIRECTIONS):
        direction = {
            name: reproducible(x.shape, generator).to(x) * x.square().mean().sqrt()
            for name, x in points.items()
        }
        losses = []
        for step in (STEP, -STEP):
            moved = {name: x + step * direction[name] for name, x in points.items()}
            losses.append(loss_of(net, moved.pop("images"), labels, weights=moved))
        quotient = float(losses[0] - losses[1]) / (2 * STEP)
        errors.append(quotient_error(quotient, [gradients[name] * d for name, d in direction.items()]))
    return max(errors)


# ---- e) ten steps ---------------------------------------------------------------------------------------------


class Training(NamedTuple):
    """The losses of the steps and the weights after the last."""

    losses: list[float]
    weights: dict[str, Tensor]


def train_ours(config: ModelConfig, backends: Chosen, device: str, dtype: torch.dtype) -> Training:
    """Ten steps with the hand-derived gradients and the update rule that `scripts/train.py` uses."""
    net = network(config, backends, device, dtype).train()
    optimizer = build_optimizer(net, OptimConfig(lr=0.01, bias_lr_mult=2.0))
    losses = []
    for step, (images, labels) in enumerate(batches(config, TRAINING_STEPS, device, dtype)):
        if step == DROP_AFTER:
            for group in optimizer.param_groups:
                group["lr"] /= 10
        loss = loss_of(net, images, labels, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Training(losses, {name: w.detach() for name, w in net.named_parameters()})


def train_native(config: ModelConfig, device: str) -> Training:
    """The same ten steps by autograd, and by section 5 as it is printed, one weight tensor after the other."""
    net = network(config, NATIVE, device, torch.float64).train()
    weights = dict(net.named_parameters())
    velocity = {name: torch.zeros_like(w) for name, w in weights.items()}
    losses = []
    for step, (images, labels) in enumerate(batches(config, TRAINING_STEPS, device, torch.float64)):
        loss = loss_of(net, images, labels, step)
        gradients = dict(zip(weights, grad(loss, list(weights.values())), strict=True))
        with torch.no_grad():
            for name, w in weights.items():
                is_bias = name.endswith("bias")
                rate = 0.01 * (2 if is_bias else 1) * (1.0 if step < DROP_AFTER else 0.1)
                decay = 0.0 if is_bias else 0.0005
                velocity[name] = 0.9 * velocity[name] - decay * rate * w - rate * gradients[name]
                w.add_(velocity[name])
        losses.append(loss.item())
    return Training(losses, {name: w.detach() for name, w in weights.items()})


def step_results(
    name: str, config: ModelConfig, backends: Chosen, device: str, both_types: bool = False
) -> Iterator[Result]:
    """Losses and weights of ten steps against native's in float64.

    With `both_types` the losses of float32 too. Only a small network stays on float64's path for ten steps: two images
    throw the paper's about (its loss rises to 13), and rounding grows with every step, right gradients or not.
    """
    native = train_native(config, device)
    for dtype in (torch.float64, torch.float32) if both_types else (torch.float64,):
        ours = train_ours(config, backends, device, dtype)
        bound = LOSS_BOUND if dtype == torch.float64 else FLOAT32_BOUND
        kind = str(dtype).removeprefix("torch.")
        result = _result(name, backends, device, "steps", loss_error(ours, native), bound, f"losses, {kind}")
        result.dtype, result.curve = kind, list(enumerate(ours.losses, start=1))
        yield result
        if dtype == torch.float64:
            error = max(relative(w, native.weights[key]) for key, w in ours.weights.items())
            yield _result(name, backends, device, "steps", error, WEIGHT_BOUND, "weights, float64")


def loss_error(ours: Training, native: Training) -> float:
    """The largest relative difference of a loss."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours.losses, native.losses, strict=True))


def _result(
    name: str, backends: Chosen, device: str, check: str, value: float, bound: float, what: str = ""
) -> Result:
    where = (f"network {name}", "+".join(sorted(set(backends.values()))), device, "float64")
    return Result(*where, f"batch of {IMAGES}", "network", check, value, bound, what)
