"""conv2d with the library's gradient kernel for the weights: what `fastest` takes where ours loses."""

from alexnet.errors import UserError
from alexnet.layers import compiled
from alexnet.layers.backend import Pair


def load(operation: str) -> Pair:
    """The pair of an operation that the library has a gradient kernel for. Raises UserError for all others."""
    if operation != "conv2d":
        raise UserError(f"backend.{operation}=library: only conv2d has it. Set backend.{operation}=compiled")
    ours = compiled.load(operation)
    from alexnet.layers.compiled.conv2d import library_backward

    return Pair(ours.forward, library_backward)
