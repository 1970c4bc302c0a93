"""One compiled graph for every batch size.

`torch.compile` specialises a function on the shapes of its inputs and compiles again for others; after a fixed
number of variants of one function it refuses. Here the batch is declared variable and everything else constant:
a layer (its shape, type, layout and constants) costs one graph, whatever the batch, and a ragged last batch costs
nothing. A batch of one image is a graph of its own, since torch treats the size 1 as a constant.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

# Variants of one function: layers x types x layouts x (training, evaluating) x (batch of one, more). A network has
# at most eight layers of a kind and four graphs per pool; torch's own limit is 8.
VARIANTS = 512


# Inductor stores a value that is read more than a few times, or that takes many operations. Under these limits it
# computes the value again wherever it is read.
RECOMPUTE = {
    "realize_reads_threshold": 128,
    "realize_opcount_threshold": 2000,
    "realize_acc_reads_threshold": 128,
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one graph per layer; an error, never a fallback, if torch cannot make it one."""
    return _compiled(function, None)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, as one kernel: only inputs and outputs are in memory."""
    return _compiled(function, RECOMPUTE)


def _compiled(function: Callable[..., Any], options: dict[str, Any] | None) -> Callable[..., Any]:
    @cache
    def graphs() -> Callable[..., Any]:
        """Made at the first call, since it loads the compiler, which takes seconds."""
        # dynamic=False: constant unless declared variable.
        return torch.compile(function, fullgraph=True, dynamic=False, options=options)

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # inside somebody else's graph: a part of it
            return function(*arguments)
        _allow_variants()
        return graphs()(*arguments)

    return call


def _allow_variants() -> None:
    """At every call, since torch keeps its settings for each thread: on CUDA autograd's own run the backward."""
    limits = torch._dynamo.config
    if limits.recompile_limit < VARIANTS:
        limits.recompile_limit = VARIANTS
        limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 16 * VARIANTS)


def batched(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, detached, their first dimension declared variable."""
    if torch.compiler.is_compiling():
        return tensors
    views = tuple(tensor.detach() for tensor in tensors)
    for view in views:
        if view.shape[0] > 1:
            torch._dynamo.mark_dynamic(view, 0)
    return views
