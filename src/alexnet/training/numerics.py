"""Where the first value came from that is NaN or infinite.

A step computes input -> layers -> loss, then the gradients in reverse, then the new weights. If the loss of a step is
not finite, three places can have started it: the input, the weights (the step before left them so), or a layer that
made such a value of finite ones. A gradient that is not finite reaches every layer before its own, so of the layers
with broken weights the last one was the first.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def origin(
    net: nn.Module, x: Tensor, weights: Mapping[str, Tensor], forward: Callable[[Tensor], Tensor]
) -> str:
    """What was not finite first, in a few words. forward(x) computes the logits with `net` and these weights."""
    if broken := _count(x):
        return f"the input: {broken} of its {len(x)} images, augmentation and mean image included"
    weight = [name for name, w in weights.items() if not w.isfinite().all()]
    if weight:
        return f"{weight[-1]}: the update of the step before made it so"
    found: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if not found and (broken := _count(output)):
            found.append(f"the output of {names[module]}, for {broken} of {len(output)} images")

    names = {module: name for name, module in net.named_modules() if not list(module.children())}
    with ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(look))
        forward(x)
    return found[0] if found else "the loss itself: the logits are finite"


def _count(values: Tensor) -> int:
    """How many images (N, ...) have a value that is not finite."""
    return int((~values.isfinite()).flatten(1).any(1).sum())
