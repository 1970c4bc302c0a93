"""Which pair of functions serves an operation.

What a pair is: pair.py. Every backend has one for each operation, or says that it has none:

    reference   readable torch, derived in the layer's docstring; any device, float64 included
    compiled    the same mathematics through torch.compile
    library     conv2d only: as compiled, with the library's gradient kernel for the weights
    triton      hand-written kernels, CUDA only
    native      not a pair: torch.nn.functional under autograd; oracle, baseline and export path
    fast        the fastest pairs known whose gradients are all ours: compiled
    fastest     the same, with the library's gradient kernel for each convolution in which ours is slower
    auto        fast on a GPU, reference elsewhere
    <path>.py   the reader's own pair, from a file (from_file.py), for one operation

`auto`, `fast` and `fastest` are resolved once, by `Backends.resolve`, when a network is built. Nothing here reads the
environment, and nothing falls back in silence.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from importlib import import_module

import torch

from alexnet.errors import UserError
from alexnet.layers.from_file import import_file, is_file
from alexnet.layers.pair import PAIRS, Pair


class Backend(StrEnum):
    reference = "reference"
    compiled = "compiled"
    library = "library"
    triton = "triton"
    native = "native"
    fast = "fast"
    fastest = "fastest"
    auto = "auto"


# What `auto` stands for by device; reference elsewhere, which needs no compiler.
AUTO = {"cuda": Backend.fast}

# What a module stores: the others are choices for a whole network, resolved when it is built.
BY_NAME = tuple(b for b in Backend if b not in (Backend.auto, Backend.fast, Backend.fastest))


@dataclass
class Backends:
    """One backend per operation: a name, or a path to a file; an operation left empty takes `default`."""

    default: str = Backend.reference
    linear: str | None = None
    relu: str | None = None
    tanh: str | None = None
    dropout: str | None = None
    max_pool2d: str | None = None
    local_response_norm: str | None = None
    same_map_norm: str | None = None
    conv2d: str | None = None
    cross_entropy: str | None = None
    relu_lrn_pool: str | None = None

    def __post_init__(self) -> None:
        for name in ("default", *OPERATIONS):
            choice = getattr(self, name)
            if choice not in (None, *Backend) and (name == "default" or not is_file(choice)):
                file = "" if name == "default" else ", or a path to a .py file"
                raise UserError(f"backend.{name}={choice} must be one of {', '.join(Backend)}{file}")

    def resolve(self, device_type: str) -> dict[str, str]:
        """{operation: concrete backend} for one kind of device, e.g. {"conv2d": "library", "relu": "compiled", ...}.

        A kind of convolution that differs from the others has an entry of its own: {"conv2d 5x5 groups": "compiled"}.
        A path is kept, and its file is run: nothing else runs one, so a path out of a checkpoint never is. Raises
        UserError when a chosen backend is not available there; the message says what to set.
        """
        chosen = {name: str(getattr(self, name) or self.default) for name in OPERATIONS}
        concrete = {name: fastest_known(name, choice, device_type) for name, choice in chosen.items()}
        for operation, backend in concrete.items():
            if is_file(backend):
                PAIRS[operation, backend] = pair_from_file(backend, operation)
            pair_for(operation, backend)
        if chosen["conv2d"] == Backend.fastest:
            concrete |= {kind: str(Backend.compiled) for kind in OURS_WINS.get(device_type, ())}
        return concrete

    def check_used(self, operations: Collection[str]) -> None:
        """Raises UserError for a backend that is set for an operation which the network does not have."""
        for name in OPERATIONS:
            if getattr(self, name) is not None and name not in operations:
                raise UserError(
                    f"backend.{name}={getattr(self, name)} has no effect: this network has no {name}. "
                    f"Remove it; its operations are {', '.join(sorted(operations))}"
                )


OPERATIONS = tuple(field.name for field in fields(Backends) if field.name != "default")

# The kinds of convolution whose weight gradient of ours is not slower than the library's, by kind of device; for them
# `fastest` takes ours. Measured on the CPU: none, see the table in compiled/conv2d.py, every entry of which is below 1.
# Not measured on CUDA yet: until it is, `fastest` takes the library's for all of them there.
OURS_WINS: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ()}


def fastest_known(operation: str, choice: str, device_type: str) -> str:
    """The concrete backend of a choice. A triton kernel gets here with a measured row, not before."""
    if choice == Backend.auto:
        choice = AUTO.get(device_type, Backend.reference)
    if choice not in (Backend.fast, Backend.fastest):
        return str(choice)
    library = choice == Backend.fastest and operation == "conv2d" and device_type in OURS_WINS
    return str(Backend.library if library else Backend.compiled)


def convolution_backend(backends: Mapping[str, str], kernel_size: int, groups: int) -> str:
    """The backend of one convolution, from what `Backends.resolve` returned: its kind's entry, else conv2d's."""
    return backends.get(convolution_kind(kernel_size, groups), backends["conv2d"])


def convolution_kind(kernel_size: int, groups: int) -> str:
    """What a row of OURS_WINS is about: "conv2d 5x5 groups", "conv2d 3x3", ..."""
    return f"conv2d {kernel_size}x{kernel_size}{' groups' if groups > 1 else ''}"


def pair_for(operation: str, backend: str) -> Pair | None:
    """The pair that serves an operation; None means native, i.e. torch's own operator under autograd."""
    if backend == Backend.native:
        return None
    pair = PAIRS.get((operation, backend))
    return pair if pair is not None else _load(operation, backend)


def pair_from_file(path: str, operation: str) -> Pair:
    """The pair of an operation that a file defines. Raises UserError, one line, for a file that has none."""
    module, functions = import_file(path), []
    for name in (f"{operation}_forward", f"{operation}_backward"):
        if not callable(getattr(module, name, None)):
            raise UserError(f"{path} must define {name}; exercise={operation} writes a file that does")
        functions.append(getattr(module, name))
    return PAIRS[operation, "reference"]._replace(forward=functions[0], backward=functions[1])


def checked(operation: str, backend: str) -> str:
    """The name as a module stores it. Raises UserError for an unknown one, for one that must be resolved first and for
    a compiled pair where a tool is missing."""
    _check_name(operation, backend)
    if backend in (Backend.compiled, Backend.library):
        pair_for(operation, backend)  # now: inside somebody's torch.compile the import could not be traced
    return str(backend)


def _load(operation: str, backend: str) -> Pair:
    _check_name(operation, backend)
    if torch.compiler.is_compiling():
        raise UserError(
            f"backend={backend} of {operation} must be loaded before torch.compile traces a call of it: use the "
            "module, or call the function once before"
        )
    try:
        module = import_module(f"alexnet.layers.{backend}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"backend.{operation}={backend} cannot be used here: {error}. Set backend.{operation}=reference"
        ) from error
    pair = module.load(operation)
    PAIRS[operation, str(backend)] = pair
    return pair


def _check_name(operation: str, backend: str) -> None:
    if is_file(backend):
        if (operation, backend) not in PAIRS:
            raise UserError(
                f"{backend} is a file, and a file is run only where the command line names it: set "
                f"backend.{operation}={backend}, or another backend"
            )
    elif backend not in BY_NAME:
        remedy = f"must be one of {', '.join(BY_NAME)}"
        if backend in list(Backend):
            remedy += f"; Backends(default={str(backend)!r}).resolve(device_type) chooses one of them"
        raise UserError(f"backend={str(backend)!r} of {operation} {remedy}")
