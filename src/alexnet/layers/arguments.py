"""What functions and modules check of their arguments: as torch takes them, or one line that says what to give."""

from collections.abc import Collection
from math import isfinite
from operator import index
from typing import Any

from torch import Tensor

from alexnet.errors import UserError

Two = tuple[int, int]  # (rows, columns)


def integers(name: str, value: Any, counts: Collection[int] = (1, 2)) -> tuple[int, ...]:
    """An integer (Python's, NumPy's or a tensor of one) or a sequence of 1 or 2 of them, as a tuple of Python's."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    try:
        numbers = tuple(v if type(v) is int else index(v) for v in values)
    except TypeError:
        numbers = ()
    if len(numbers) not in counts or any(isinstance(v, bool) for v in values):
        raise UserError(
            f"{name}={value!r} must be an integer or a tuple of {' or '.join(map(str, counts))} integers"
        )
    return numbers


def two(value: Any, name: str = "size") -> Two:
    """One number for both axes, (both) or (rows, columns), as everywhere in torch."""
    numbers = integers(name, value)
    return numbers[0], numbers[-1]


def no_longer(stride: Two, image: Two) -> Two:
    """A stride beyond the padded image has the one window of a stride as long as the image."""
    return min(stride[0], image[0]), min(stride[1], image[1])


def check_number(name: str, value: Any, low: float, high: float = float("inf"), above: bool = False) -> None:
    """Raises UserError unless `value` is a number from `low` (or, with `above`, beyond it) to `high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    if not number or not (low < value if above else low <= value) or value > high:
        bounds = f"in [{low}, {high}]" if high < float("inf") else f"a number {'>' if above else '>='} {low}"
        raise UserError(f"{name}={value!r} must be {bounds}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Raises UserError unless `value` is one of the names."""
    if value not in choices:
        raise UserError(f"{name}={value!r} must be one of {', '.join(choices)}")


def check_positive(name: str, value: Any) -> None:
    """Raises UserError unless `value` is a positive integer."""
    if integers(name, value, (1,))[0] < 1:
        raise UserError(f"{name}={value!r} must be a positive integer")


def check_real(name: str, *tensors: Tensor | None) -> None:
    """Raises UserError for operands of an integer, boolean or complex type: no gradient is derived for them."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_floating_point():
            raise UserError(
                f"{name}: input of type {tensor.dtype} must have a real floating-point type, e.g. float32"
            )


def refuse_inplace(name: str, inplace: bool) -> None:
    """Raises UserError: an output is a tensor of its own here, so that every pair can keep what it needs."""
    if inplace:
        raise UserError(
            f"{name}: inplace=True must be False: the backward reads the tensor that it would change"
        )
