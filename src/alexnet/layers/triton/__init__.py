"""Hand-written kernels for CUDA, in Triton. Not measured yet: chosen by name, never by `fast`.

    local_response_norm   one kernel forward, one backward; only x is kept
    relu_lrn_pool         the whole block, either order, one kernel each way; kept are x and the winners

Two operations, because these two lose most between kernels: everything they do is a few flops on tensors that are
read from memory and written back. Each file opens with its layout: which program owns which numbers, what is
computed twice, and how many bytes move.

Without a GPU the kernels run under Triton's own interpreter (TRITON_INTERPRET=1 before the start), for tests.
"""

from importlib import import_module

import torch
from triton import knobs

from alexnet.errors import UserError
from alexnet.layers.pair import Pair, pair_of

KERNELS = ("local_response_norm", "relu_lrn_pool")


def load(operation: str) -> Pair:
    """The pair of an operation. Raises UserError where there is no kernel for it, or no device to run one on."""
    if operation not in KERNELS:
        raise UserError(
            f"backend.{operation}=triton must be one of the operations with a kernel: {', '.join(KERNELS)}. "
            f"Set backend.{operation}=compiled, or =reference"
        )
    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        raise UserError(
            f"backend.{operation}=triton cannot be used here: torch sees no CUDA device. Set backend=reference"
        )
    return pair_of(import_module(f"alexnet.layers.triton.{operation}"), operation)
