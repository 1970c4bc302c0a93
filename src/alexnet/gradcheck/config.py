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
    # Every backend on every device, the paper's network in the ten steps; mutants of compiled pairs compiled too.
    full: bool = False
    # Run every mutant and say which check kills it.
    mutants: bool = False
    # Only these operations (and no network); empty: all.
    operations: list[str] = field(default_factory=list)
    # Write the file of an exercise, <exercises>/<name>.py or `into`; list: show them all. With hint=1, 2 or 3: a hint.
    exercise: str | None = None
    hint: int | None = None
    into: str | None = None
    # Prove the functions of this Python file, which the reader wrote.
    mine: str | None = None
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown:
            raise UserError(
                f"operations={self.operations}: {unknown[0]} must be one of {', '.join(OPERATIONS)}"
            )
        for key in ("hint", "into"):
            if getattr(self, key) is not None and self.exercise is None:
                raise UserError(
                    f"{key}={getattr(self, key)} needs an exercise: set exercise=<name>, or exercise=list"
                )
