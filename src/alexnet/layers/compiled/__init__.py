"""The pairs through `torch.compile`: the same mathematics in fewer passes over memory.

    local_response_norm   the window as shifted views of flat memory; only x is kept
    norm_by_maps          the same for tensors that lie map by map, which stay so
    max_pool2d            one byte per output is kept (two for ties="all"); the gradient is gathered
    relu_lrn_pool         both in one, for either order; kept are the convolution's output and the winners
    conv2d                library forward convolutions and matrix products on operands we derive
    pointwise             relu, tanh, dropout, cross_entropy: the reference formulas, compiled; linear as it is
    same_map_norm         the square as a sum of shifted views, on CPU and CUDA alike
    on_cuda               norm, block, pooling gradient and dropout once more, in the form that CUDA's compiler fuses

Every graph serves one layer, type and layout and any batch of two images or more (compile.py). Inductor keeps what it
compiled in its own cache on disk (torch's TORCHINDUCTOR_CACHE_DIR), so only the first run on a machine waits.

Layout: convolution, same-map norm, pool and block work on channels-last tensors and return such; the response norm and
the pointwise pairs keep the layout they are given.

Non-finite values: as in the reference, whose files have tables of them, but for two. Among several NaNs of a pooling
window the first wins here, the last in the reference. On CUDA, a bfloat16 convolution of at most 4 channels at a stride
turns an infinity also into NaNs of windows that end just before it (conv2d.py).
"""

import shutil
import sysconfig
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alexnet.errors import UserError
from alexnet.layers.pair import PAIRS, Pair, pair_of

POINTWISE = ("relu", "tanh", "dropout", "cross_entropy", "linear")  # in one module; the others have their own


def load(operation: str) -> Pair:
    """The compiled pair of an operation; compiling itself waits for the first call.

    Raises UserError when this machine has no C++ compiler or no Python.h, which Inductor needs.
    """
    missing = missing_tool()
    if missing:
        raise UserError(
            f"backend.{operation}=compiled cannot be used here: {missing}. Install it, or set backend=reference"
        )
    module = "pointwise" if operation in POINTWISE else operation
    pair = pair_of(import_module(f"alexnet.layers.compiled.{module}"), operation)
    on_cuda = import_module("alexnet.layers.compiled.on_cuda").ON_CUDA.get(operation, pair)
    return by_tensor(PAIRS[operation, "reference"], pair, on_cuda)


def by_tensor(reference: Pair, on_cpu: Pair, on_cuda: Pair) -> Pair:
    """The pair for a tensor: `on_cuda` on a CUDA device; `reference` where there is nothing to compute: no elements,
    or a meta tensor, which has a shape and no data; else `on_cpu`."""

    def pair_for(x: Tensor) -> Pair:
        if x.is_cuda and x.numel():
            return on_cuda
        return reference if x.is_meta or not x.numel() else on_cpu

    def forward(x: Tensor, *arguments: Any) -> Any:
        y, *saved = pair_for(x).forward(x, *arguments)
        if torch.compiler.is_compiling():
            return y, *saved
        own = y.data  # y may be a view of what was computed, and autograd refuses to change a view in place
        return own, *[own if s is y else s for s in saved]

    def backward(dy: Tensor, *arguments: Any) -> Any:
        saved = next(a for a in arguments if isinstance(a, Tensor))  # the loss is a number: dy says nothing
        return pair_for(saved).backward(dy, *arguments)

    return on_cpu._replace(forward=forward, backward=backward)


def missing_tool() -> str | None:
    """What Inductor would miss: a C++ compiler, Python's own header, or on a GPU triton."""
    from torch._inductor import config

    compilers = [name for name in config.cpp.cxx if name]
    if not any(shutil.which(name) for name in compilers):
        return f"there is no C++ compiler ({', '.join(compilers)})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"there is no {header} (package python3-dev)"
    if torch.cuda.is_available() and find_spec("triton") is None:
        return "there is no triton (package triton), which writes the kernels of a GPU"
    return None
