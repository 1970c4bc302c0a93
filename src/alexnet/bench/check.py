"""Is what will be timed right? Each layer of the network on its own inputs; in float32 whole networks as well.

Gradients of a whole network say little in bfloat16: rounding changes which pixel wins a pooling window, and the
gradient then flows elsewhere (half of its norm, at initial weights). So each layer is checked alone. Its input is
what a float32 forward brings to it, rounded to the type; its dy are random numbers, rounded alike; and the reference
in float32 gets the very same numbers. What remains are the roundings of one layer.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from alexnet.bench.networks import backends_named, stock_network, task
from alexnet.layers import LocalResponseNorm, ReluLrnPool, SameMapNorm, cross_entropy, local_response_norm
from alexnet.model import AlexNet, Init, ModelConfig, Ties
from alexnet.system import set_precision

# Largest relative difference (Frobenius norm) of a result, by type. bfloat16: every result is rounded when it is
# stored, by at most 2^-8 of itself, and a layer may round three times more on the way (partial sums, operands of a
# product). tf32: the same with 2^-11, the operands of products. float32: thousands of terms in another order.
BOUND = {"float32": 1e-4, "tf32": 4 * 2.0**-11, "bfloat16": 4 * 2.0**-8}
# Two numbers further apart than this (relative to the larger) stay in order when both are rounded to bfloat16.
CLEAR = 2.0**-7

Function = Callable[..., Tensor]


def check(model: str, backend: str, dtype: str, device: str) -> float:
    """Returns the largest difference found. AssertionError, before anything is timed, if one is too large."""
    worst = check_layers(model, backends_named(backend, device.partition(":")[0]), dtype, device)
    return max(worst, check_network(model, backend, device)) if dtype == "float32" else worst


def check_layers(model: str, backends: dict[str, str], dtype: str, device: str) -> float:
    """`compare` for every layer of the network and for the loss, on two images.

    Weights by He's rule and no biases, so that the layers' inputs vary as those of a trained network do: with the
    paper's weights they are nearly constant, and a wrong pixel is hardly wrong.
    """
    given = task(model, 2, dtype, device)
    config = replace(given.config, init=Init.he, init_bias=[0.0] * 8)
    exact = AlexNet(config, seed=0).to(device)
    ours = AlexNet(config, backends, seed=0)
    ours.to(device, given.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for p, rounded in zip(exact.parameters(), ours.parameters(), strict=True):
        p.data.copy_(rounded)
    set_precision("float32")
    calls, logits = recorded(exact, given.cast.float())
    worst = 0.0
    for name, x, choices in calls:
        layer = ours.get_submodule(name)
        if isinstance(layer, (ReluLrnPool, LocalResponseNorm, SameMapNorm)):
            # So large that k and the sum of squares weigh alike in s.
            x = x * (layer.k / layer.alpha) ** 0.5 / x.square().mean().sqrt()
        x = x.to(given.dtype)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        mine, right = (as_function(net.get_submodule(name), choices) for net in (ours, exact))
        clear = clear_windows(layer, x.float()) if isinstance(layer, ReluLrnPool) else None
        worst = max(worst, compare(f"{model}, {name}", mine, right, [x, *layer.parameters()], dtype, clear))

    def loss(backend: str) -> Function:
        return lambda x: cross_entropy(x, given.labels, label_smoothing=0.1, backend=backend)

    losses = loss(backends["cross_entropy"]), loss("reference")
    return max(worst, compare(f"{model}, loss", *losses, [logits.to(given.dtype)], dtype))


def compare(
    what: str,
    ours: Function,
    exact: Function,
    operands: list[Tensor],
    dtype: str,
    clear: Tensor | None = None,
) -> float:
    """The largest difference of ours from exact: in y and in the gradient of every operand.

    Ours computes with the operands as they are, exact with the same numbers in float32. Where `clear` (of y's shape)
    is 0, dy is 0. AssertionError above BOUND[dtype].
    """
    leaves = [x.detach().requires_grad_() for x in operands]
    set_precision(dtype)
    y = ours(*leaves)
    generator = torch.Generator().manual_seed(1)
    # In another memory order than y: maps come channels-last, matrices row by row.
    shape = y.mT.shape if y.dim() == 2 else y.shape
    dy = torch.randn(shape, generator=generator).to(y.device, y.dtype)
    dy = dy.mT if y.dim() == 2 else dy
    dy = dy if clear is None else dy * clear
    got = [y, *torch.autograd.grad(y, leaves, dy)]
    set_precision("float32")
    leaves = [x.detach().float().requires_grad_() for x in operands]
    y = exact(*leaves)
    expected = [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))]
    return require(f"{what}, {dtype}", differences(expected, got), BOUND[dtype])


def require(what: str, off: list[float], bound: float) -> float:
    wrong = [f"{d:.1e}" for d in off if not d <= bound]
    assert not wrong, f"{what}: results differ by {', '.join(wrong)}; nothing is timed"
    return max(off)


def differences(expected: list[Tensor], actual: list[Tensor]) -> list[float]:
    both = [(e.float(), a.float()) for e, a in zip(expected, actual, strict=True)]
    return [float((a - e).detach().norm() / e.detach().norm().clamp(min=1e-12)) for e, a in both]


def as_function(layer: nn.Module, choices: dict[str, Any]) -> Function:
    """Of its input and its parameters."""
    names = [name for name, _ in layer.named_parameters()]
    return lambda x, *p: functional_call(layer, dict(zip(names, p, strict=True)), (x,), choices)


def recorded(net: AlexNet, images: Tensor) -> tuple[list[tuple[str, Tensor, dict[str, Any]]], Tensor]:
    """(layer, its input, its other arguments) for each call in a forward pass, and the logits."""
    calls: list[tuple[str, Tensor, dict[str, Any]]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _, given, choices: calls.append((name, given[0].detach(), choices))

    layers = [(name, layer) for name, layer in net.named_modules() if not list(layer.children())]
    hooks = [layer.register_forward_pre_hook(record(name), with_kwargs=True) for name, layer in layers]
    with torch.no_grad():
        logits = net(images, torch.tensor(7, device=images.device), first_row=3)
    for hook in hooks:
        hook.remove()
    return calls, logits


def clear_windows(block: ReluLrnPool, x: Tensor) -> Tensor:
    """1 where rounding cannot change which pixel wins the window, else 0: (N, C, P, Q) for a block without padding.

    The separate operations round the norm's output before they compare it; a fused kernel need not.
    """
    size, step = int(block.kernel_size), int(block.stride)  # type: ignore[arg-type]
    norm = block.size, block.alpha, block.beta, block.k
    a = F.relu(x) if block.order == "relu_lrn_pool" else x
    b = local_response_norm(a, *norm, groups=block.groups)
    P, Q = F.max_pool2d(b, size, step, ceil_mode=block.ceil_mode).shape[2:]
    rows, columns = ((n - 1) * step + size - side for n, side in zip((P, Q), b.shape[2:], strict=True))
    b = F.pad(b, (0, columns, 0, rows), value=-torch.inf)
    first, second = b.unfold(2, size, step).unfold(3, size, step).flatten(4).topk(2).values.unbind(-1)
    closed = first == 0  # by the ReLU before the norm, in any type
    return (closed | (first - second > CLEAR * first.abs())).float()


def check_network(model: str, backend: str, device: str) -> float:
    """Float32 gradients of two images without dropout: ours beside the reference's, these beside the stock net's."""
    set_precision("float32")
    given = task(model, 2, "float32", device)

    def gradients(net: nn.Module) -> list[Tensor]:
        loss = F.cross_entropy(net(given.cast).float(), given.labels)
        return list(torch.autograd.grad(loss, list(net.parameters())))

    def ours(config: ModelConfig, backend: str) -> list[Tensor]:
        net = AlexNet(config, backends_named(backend, given.images.device.type), seed=0)
        return gradients(net.to(device, memory_format=torch.channels_last))  # type: ignore[call-overload]

    config = replace(given.config, dropout=0.0)
    off = differences(ours(config, "reference"), ours(config, backend))
    common = replace(config, lrn_within_tower=False, pool_ties=Ties.first)  # what stock modules can do
    stock = stock_network(common)
    for theirs, weights in zip(stock.parameters(), AlexNet(common, seed=0).parameters(), strict=True):
        theirs.data.copy_(weights.data)
    off += differences(ours(common, "reference"), gradients(stock.to(given.images.device)))
    return require(f"{model}, float32, {backend}", off, BOUND["float32"])
