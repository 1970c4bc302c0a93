"""What can be asked of scripts/check_gradients.py."""

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
