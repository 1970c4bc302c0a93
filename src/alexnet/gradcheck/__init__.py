"""Proof that every hand-derived gradient is right: what scripts/check_gradients.py runs.

    cases       what an operation is checked on, and how large its rounding errors can be
    operations  the ten of them, with their cases
    checks      a) central differences  b) autograd of the native operation  c) analytic identities
    network     d) the whole network along random directions, every parameter  e) ten training steps
    rules       the same for the update rule and the data path, which have no backward but can be as wrong
    mutants     the kill table: wrong versions of the shipped functions, and the check that kills each
    run         all of it, as one table and results.json
    lesson      the HTML page a learner reads

Read `checks` first: it is the argument; the rest is what it is applied to.
"""

from dataclasses import dataclass, field

from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.layers.backend import OPERATIONS


@dataclass
class CheckGradients:
    """scripts/check_gradients.py."""

    # The backend to check, as in training: reference, fast, backend.conv2d=compiled, ...
    backend: Backends = field(default_factory=Backends)
    # Every backend that can be had on every device, and the ten steps with the paper's network.
    full: bool = False
    # Run every mutant of the kill table and say which check kills it.
    mutants: bool = False
    # Only these operations (and no network); empty: all.
    operations: list[str] = field(default_factory=list)
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown:
            raise UserError(
                f"operations={self.operations}: {unknown[0]} is none. Choose from {', '.join(OPERATIONS)}"
            )
