"""conv2d with the library's gradient kernel for the weights: what `fastest` takes where ours loses."""

from alexnet.errors import UserError
from alexnet.layers import compiled
from alexnet.layers.pair import PAIRS, Pair


def load(operation: str) -> Pair:
    """The pair of an operation that the library has a gradient kernel for. Raises UserError for all others."""
    if operation != "conv2d":
        raise UserError(f"backend.{operation}=library: only conv2d has it. Set backend.{operation}=compiled")
    compiled.load(operation)  # raises UserError where a tool is missing
    from alexnet.layers.compiled.conv2d import conv2d_forward, library_backward

    reference = PAIRS[operation, "reference"]
    pair = reference._replace(forward=conv2d_forward, backward=library_backward)
    return compiled.by_tensor(reference, pair, pair)
