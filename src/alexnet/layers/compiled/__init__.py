"""The pairs through `torch.compile`: the same mathematics in fewer passes over memory.

    local_response_norm   the window as shifted views of flat memory; only x is kept
    max_pool2d            one byte per output is kept (two for ties="all"); the gradient is gathered
    relu_lrn_pool         both in one, for either order; kept are the convolution's output and the winners
    conv2d                library forward convolutions and matrix products on operands we derive
    pointwise             relu, tanh, dropout, cross_entropy: the reference formulas, compiled; linear as it is
    on_cuda               norms, block, pooling gradient and dropout once more, in the form that CUDA's compiler fuses

Every graph serves one layer, type and layout and any batch of two images or more (compile.py). Inductor keeps what it
compiled in its own cache on disk (torch's TORCHINDUCTOR_CACHE_DIR), so only the first run on a machine waits.

Layout: convolution, norms, pool and block work on channels-last tensors and hand them out; the pointwise pairs keep
the layout they are given. An output may be a view of what was computed: torch refuses to change it in place.

Non-finite values: on a CPU, response norm and block read past the last map of a pixel and multiply what they find by 0.
A NaN there, or a value whose square overflows, also makes the neighbouring pixel NaN; the reference and CUDA confine it
to its own pixel. Among several NaNs of a pooling window the first wins here, the last in the reference.
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
from alexnet.layers.backend import Pair

MODULES = {
    "local_response_norm": "local_response_norm",
    "max_pool2d": "max_pool2d",
    "relu_lrn_pool": "relu_lrn_pool",
    "same_map_norm": "same_map_norm",
    "conv2d": "conv2d",
    "relu": "pointwise",
    "tanh": "pointwise",
    "dropout": "pointwise",
    "cross_entropy": "pointwise",
    "linear": "pointwise",
}


def load(operation: str) -> Pair:
    """The compiled pair of an operation; compiling itself waits for the first call.

    Raises UserError when this machine has no C++ compiler or no Python.h, which Inductor needs.
    """
    missing = missing_tool()
    if missing:
        raise UserError(
            f"backend.{operation}=compiled cannot be used here: {missing}. Install it, or set backend=reference"
        )
    module = import_module(f"alexnet.layers.compiled.{MODULES[operation]}")
    pair = Pair(getattr(module, f"{operation}_forward"), getattr(module, f"{operation}_backward"))
    on_cuda = import_module("alexnet.layers.compiled.on_cuda").ON_CUDA.get(operation)
    return pair if on_cuda is None else by_device(pair, on_cuda)


def by_device(pair: Pair, on_cuda: Pair) -> Pair:
    """`on_cuda` for tensors on a CUDA device, `pair` for all others."""

    def forward(x: Tensor, *arguments: Any) -> Any:
        return (on_cuda if x.is_cuda else pair).forward(x, *arguments)

    def backward(dy: Tensor, *arguments: Any) -> Any:
        return (on_cuda if dy.is_cuda else pair).backward(dy, *arguments)

    return Pair(forward, backward)


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
