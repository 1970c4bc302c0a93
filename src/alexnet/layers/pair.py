"""What a pair is, the table of pairs, and the one autograd Function that binds any of them.

An operation of the network is a *pair* of plain functions, tensors and numbers in, tensors out:

    x_forward(*operands, *constants)     -> (y, *saved)
    x_backward(dy, *saved, *constants)   -> the gradient of the first operand

A pair of several operands (x, w, b) also tells its backward which of them need a gradient; it returns one for each,
None for those that need none:

    x_backward(dy, *saved, *constants, needs) -> (dx, dw, db)

A backend is another pair with the same operands, constants, outputs and gradients. Each backward reads what its own
forward saved, so the halves of two pairs are never mixed.

First derivatives only. The backward of a backward is not derived: asked for it, autograd gets an error, not a wrong
number. For this a forward whose gradient depends on x must save x itself or y itself, not only a copy.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alexnet.errors import UserError

Gradients = tuple[Tensor | None, ...]
Arguments = tuple[Any, ...]


class Pair(NamedTuple):
    """A forward and the backward that reads what it saved."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    operands: int = 1  # how many of its tensors get a gradient


# {(operation, backend): pair}. A layer file enters its reference pair; backend.py loads the others when first asked.
PAIRS: dict[tuple[str, str], Pair] = {}


def pair_of(module: ModuleType, operation: str) -> Pair:
    """The functions of a module, x_forward and x_backward, as another pair of an operation."""
    forward, backward = (getattr(module, f"{operation}_{way}") for way in ("forward", "backward"))
    return PAIRS[operation, "reference"]._replace(forward=forward, backward=backward)


def apply_pair(
    pair: Pair,
    operands: Sequence[Tensor | None],
    constants: Arguments = (),
    of_backward: Arguments | None = None,
) -> Tensor:
    """y of a pair, differentiable once. `of_backward`: the backward's constants where they are not the forward's."""
    of_backward = constants if of_backward is None else of_backward
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _BoundForTransforms.apply(pair, constants, of_backward, *operands)[0]
    return _Bound.apply(pair, constants, of_backward, *operands)


class _Bound(torch.autograd.Function):
    """Gives a pair to autograd. No mathematics here."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        # One starred argument: with three names before it, dynamo (torch 2.14) counts two operands as a missing ctx.
        pair, constants, of_backward, *operands = inputs
        with no_autocast(operands[0]):
            y, *saved = pair.forward(*operands, *constants)
        ctx.save_for_backward(*saved)
        ctx.pair, ctx.constants = pair, of_backward
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Gradients:
        several = ctx.pair.operands > 1
        constants = (*ctx.constants, ctx.needs_input_grad[3:]) if several else ctx.constants
        if torch.compiler.is_compiling():
            gradients = _First.forward(ctx.pair, constants, dy, *ctx.saved_tensors)
        else:
            gradients = _first(ctx.pair, constants, dy, ctx.saved_tensors)
        return None, None, None, *gradients, *[None] * (len(ctx.needs_input_grad) - 3 - len(gradients))


class _BoundForTransforms(_Bound):
    """The same for torch.func (grad, vmap, jacrev), which asks for a forward without ctx. It takes 30 us more a call.

    All that is saved must be an input or an output: so the outputs are y and what the pair saved, where a tensor that
    is y or an operand is replaced by its number.
    """

    @staticmethod
    def forward(pair: Pair, constants: Arguments, of_backward: Arguments, *operands: Any) -> Arguments:
        with no_autocast(operands[0]):
            y, *saved = pair.forward(*operands, *constants)
        known = (y, *operands)
        return y, *[_number(tensor, known) for tensor in saved]

    @staticmethod
    def setup_context(ctx: Any, inputs: Arguments, output: Arguments) -> None:
        ctx.pair, _, ctx.constants, *operands = inputs
        known, saved = (output[0], *operands), output[1:]
        ctx.save_for_backward(*[known[s] if isinstance(s, int) else s for s in saved])
        ctx.mark_non_differentiable(*[s for s in saved if isinstance(s, Tensor)])

    @staticmethod
    def vmap(info: Any, in_dims: Arguments, *arguments: Any) -> tuple[Arguments, Arguments]:
        return _one_by_one(_BoundForTransforms, info.batch_size, in_dims, arguments)


class _First(torch.autograd.Function):
    """The backward of a pair where somebody might differentiate or batch it."""

    @staticmethod
    def forward(pair: Pair, constants: Arguments, dy: Tensor, *saved: Any) -> Gradients:
        with no_autocast(dy):
            gradients = pair.backward(dy, *saved, *constants)
        return gradients if pair.operands > 1 else (gradients,)

    @staticmethod
    def setup_context(ctx: Any, inputs: Arguments, output: Arguments) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Gradients:
        raise UserError(
            "second derivatives of the hand-derived gradients are not derived: set backend=native for a Hessian, a "
            "gradient penalty or whatever else differentiates a gradient"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Arguments, *arguments: Any) -> tuple[Arguments, Arguments]:
        return _one_by_one(_First, info.batch_size, in_dims, arguments)


def _first(pair: Pair, constants: Arguments, dy: Tensor, saved: Sequence[Any]) -> Gradients:
    """The gradients of a pair; in a Function of their own in torch.func and where create_graph=True records them."""
    if torch._C._functorch.is_legacy_batchedtensor(dy):
        return _for_every_dy(pair, constants, dy, saved)
    watched = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
    return (_First.apply if watched else _First.forward)(pair, constants, dy, *saved)


def _for_every_dy(pair: Pair, constants: Arguments, batched: Tensor, saved: Sequence[Any]) -> Gradients:
    """The gradients of each dy of is_grads_batched=True, which torch hands out as one tensor that hides its batch."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    every_dy = torch._remove_batch_dim(batched, level, 0, 0)
    columns = zip(*[_first(pair, constants, dy, saved) for dy in every_dy], strict=True)
    return tuple(None if c[0] is None else torch._add_batch_dim(torch.stack(c), 0, level) for c in columns)


def _number(tensor: Any, known: Arguments) -> Any:
    """The place of a tensor among the known ones; the tensor itself if it is none of them."""
    for number, other in enumerate(known):
        if tensor is other and tensor is not None:
            return number
    return tensor


def _one_by_one(
    function: type[torch.autograd.Function], count: int, in_dims: Arguments, arguments: Arguments
) -> tuple[Arguments, Arguments]:
    """`function` of each of `count` slices, stacked: a pair is written for one batch of images at a time."""

    def slices(i: int) -> list[Any]:
        pairs = zip(arguments, in_dims, strict=True)
        return [a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a for a, dim in pairs]

    columns = zip(*[function.apply(*slices(i)) for i in range(count)], strict=True)
    stacked = tuple(torch.stack(c) if isinstance(c[0], Tensor) else c[0] for c in columns)
    return stacked, tuple(0 if isinstance(s, Tensor) else None for s in stacked)


# ---- types and layouts ---------------------------------------------------------------------------------------------


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which an elementwise formula is computed: float32 for half types, else the type itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another type; x itself if that is its type.

    x.to(its own type) is an alias of x, which torch 2.11 loses track of when it traces a Function: the gradient
    compiles to zeros.
    """
    return x if x.dtype == dtype else x.to(dtype)


def _autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(
        device_type
    )  # torch knows none for meta tensors


def to_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Operands of a matrix operation in the autocast type, when autocast is on for their device."""
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not _autocast(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(None if tensor is None else _cast(tensor, dtype) for tensor in tensors)


def to_float32(tensor: Tensor) -> Tensor:
    """The operand of a norm or a loss: float32 when autocast is on for its device."""
    if not _autocast(tensor.device.type):
        return tensor
    return _cast(tensor, torch.float32)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # float64 is asked for on purpose (checks, oracles); autocast leaves it alone, and so do we.
    return tensor if tensor.dtype == torch.float64 else cast(tensor, dtype)


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of x for what is computed from it: channels-last in, channels-last out, as torch does."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


AS_IT_IS = nullcontext()


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Inside a pair the types are those of the operands; autocast must not change them again."""
    device_type = tensor.device.type
    return torch.autocast(device_type, enabled=False) if _autocast(device_type) else AS_IT_IS
