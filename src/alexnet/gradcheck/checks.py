"""The argument that a gradient is right, in three independent parts.

Let f be an operation, dy a random cotangent and L(x) = <dy, f(x)>, a number whose gradient the backward claims to
know: dx. It is random, so an error has nothing to hide behind.

a) Central differences (float64). Along a random direction d,

       (L(x + h d) - L(x - h d)) / 2h  =  <dx, d>  +  (h^2/6) L'''(x)[d,d,d]  +  round-off / h

   For a curved f the error must fall like h^2: a straight line of slope 2 in a log-log plot, here from h = 1e-2 to
   1e-4. A wrong dx adds a constant, at which the line goes flat. For a linear or piecewise linear f there is no
   h^2 term: what is left at h = 1e-4 is round-off, below 1e-8. Directions are as large as x, and errors relative
   to the size that <dx, d> has for such a d.

b) Autograd (every type). The same operation built from torch's own functions and differentiated by torch, in
   float64: to 1e-10 of the largest element there, and inside the rounding bound derived in `cases` elsewhere, with
   the share of that bound that was used. Also the output: a backward that fits a wrong forward is no use.

c) Identities (float64). Equations that hold for the true gradient whatever x is: adjoints, Euler's theorem, sums
   that vanish. They need neither a second implementation nor a small h.

Two of the three would do. What all three accept is right beyond what tests can doubt.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from alexnet.gradcheck.cases import Case, Operation, Tensors, arranged, cotangent, evaluate

STEPS = torch.logspace(-2, -4, 9, dtype=torch.float64).tolist()
SLOPE_TOLERANCE = 0.1
DIFFERENCE_BOUND = 1e-8
FLOAT64_BOUND = 1e-10
DIRECTIONS = 4
MOST_DRAWS = 200


@dataclass
class Result:
    """One number and the bound it must not exceed."""

    operation: str
    backend: str
    device: str
    dtype: str
    case: str
    kind: str
    check: str  # differences, autograd, identity, directions, parameters, steps, rule
    value: float
    bound: float
    what: str = ""
    curve: list[tuple[float, float]] = field(default_factory=list)  # differences: step, error

    @property
    def passed(self) -> bool:
        return self.value <= self.bound  # False for NaN

    @property
    def share(self) -> float:
        """Of the bound, used; 0 where nothing may be rounded and nothing was, infinite for what is no number."""
        if self.bound == 0 or math.isnan(self.value):
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.bound

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "passed": self.passed}


def results_of(
    operation: Operation, case: Case, backend: str, device: str, dtypes: tuple[torch.dtype, ...]
) -> Iterator[Result]:
    """Every check of one case: all three in float64, autograd in the other types."""
    if torch.float64 in dtypes:
        yield autograd(operation, case, backend, device, torch.float64)
        if case.smooth:
            yield differences(operation, case, backend, device)
        yield from identities(operation, case, backend, device)
    for dtype in dtypes:
        if dtype != torch.float64:
            yield autograd(operation, case, backend, device, dtype)


def prepared(case: Case, device: str, dtype: torch.dtype = torch.float64) -> Tensors:
    """The case's arguments in a type, on a device, in the layout it asks for."""
    first, *others = (x.to(device, dtype if x.is_floating_point() else x.dtype) for x in case.inputs())
    return [arranged(first, case.layout), *others]


def autograd(operation: Operation, case: Case, backend: str, device: str, dtype: torch.dtype) -> Result:
    """b) Ours in `dtype` against torch's in float64, on the numbers that `dtype` can hold."""
    inputs = prepared(case, device, dtype)
    y, gradients = evaluate(operation.function, case.options, inputs, None, backend)
    dy = cotangent(y).double()
    exact_inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    exact_y, exact = evaluate(operation.function, case.options, exact_inputs, dy, "native")
    pairs = list(zip([y, *gradients], [exact_y, *exact], strict=True))
    if dtype == torch.float64:
        value, bound = max(relative(ours, theirs) for ours, theirs in pairs), FLOAT64_BOUND
    else:
        roundings = operation.rounding(case.options, exact_inputs, dy)
        bounds = [rounding.bound(dtype) for rounding in roundings]
        value, bound = max(used(*pair, limit) for pair, limit in zip(pairs, bounds, strict=True)), 1.0
    return _result(operation, case, backend, device, dtype, "autograd", value, bound)


def relative(ours: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest element; the difference itself where all is zero."""
    difference, size = largest(ours.detach().double() - exact), largest(exact)
    return difference / size if size else difference


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def used(ours: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest share of an elementwise bound; infinite where a bound of 0 is not met."""
    difference = (ours.double() - exact).abs()
    share = torch.where(difference == 0, 0.0, difference / bound)  # a NaN stays one
    return float(share.max()) if share.numel() else 0.0


def differences(operation: Operation, case: Case, backend: str, device: str) -> Result:
    """a) The curve of errors over steps, or the error at one step where f has no curvature."""
    inputs = prepared(case, device)
    y, gradients = evaluate(operation.function, case.options, inputs, None, backend)
    dy = cotangent(y)
    large = case.kind in ("paper", "large")
    steps = STEPS[:: 4 if large else 1] if operation.curved else [1e-4]
    draws = torch.Generator().manual_seed(1)
    worst = torch.zeros(len(steps), dtype=torch.float64)
    for _ in range(1 if large else DIRECTIONS):
        direction = _direction(operation, case, inputs, max(steps), draws)
        errors = [_error(operation, case, backend, inputs, dy, gradients, direction, h) for h in steps]
        worst = torch.maximum(worst, torch.tensor(errors, dtype=torch.float64))
    curve = list(zip(steps, worst.tolist(), strict=True))
    if operation.curved and largest(gradients[0]):
        value, bound, what = abs(slope(curve) - 2), SLOPE_TOLERANCE, f"slope {slope(curve):.3f}"
    else:
        value, bound, what = float(worst.max()), DIFFERENCE_BOUND, "at h = 1e-4"
    result = _result(operation, case, backend, device, torch.float64, "differences", value, bound)
    result.what, result.curve = what, curve
    return result


def _direction(
    operation: Operation, case: Case, inputs: Tensors, step: float, draws: torch.Generator
) -> Tensors:
    """Normals of each input's size; no unit opens, closes or changes its winner within `step` along them."""
    for _ in range(MOST_DRAWS):
        direction = [torch.randn(x.shape, generator=draws, dtype=torch.float64).to(x.device) for x in inputs]
        direction = [d * _size(x) for d, x in zip(direction, inputs, strict=True)]
        ends = [_moved(inputs, direction, end) for end in (step, -step)]
        if operation.pattern is None:
            return direction
        here, *there = (operation.pattern(case.options, x) for x in (inputs, *ends))
        if all(torch.equal(a, b) for end in there for a, b in zip(here, end, strict=True)):
            return direction
    raise RuntimeError(f"{operation.name}, {case.name}: every direction of length {step} crosses a kink")


def _size(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _moved(inputs: Tensors, direction: Tensors, step: float) -> Tensors:
    return [x + step * d if x.is_floating_point() else x for x, d in zip(inputs, direction, strict=True)]


def _error(
    operation: Operation,
    case: Case,
    backend: str,
    inputs: Tensors,
    dy: Tensor,
    gradients: Tensors,
    direction: Tensors,
    step: float,
) -> float:
    """|difference quotient - <gradient, direction>| over the size of such products."""
    with torch.no_grad():
        ahead, behind = (
            operation.function(*_moved(inputs, direction, end), **case.options, backend=backend)
            for end in (step, -step)
        )
    quotient = (dy * (ahead - behind)).sum() / (2 * step)
    along = [d for x, d in zip(inputs, direction, strict=True) if x.is_floating_point()]
    claimed = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
    size = sum(float((g * d).square().sum()) for g, d in zip(gradients, along, strict=True)) ** 0.5
    return float((quotient - claimed).abs()) / (size or 1.0)


def slope(curve: list[tuple[float, float]]) -> float:
    """Of log error over log step, by least squares; NaN if an error is exactly 0."""
    h, error = torch.tensor(curve, dtype=torch.float64).log().T
    h = h - h.mean()
    return float((h * error).sum() / (h * h).sum())


def identities(operation: Operation, case: Case, backend: str, device: str) -> Iterator[Result]:
    """c) Each equation's two sides, their difference over the size of what was summed."""
    inputs = prepared(case, device)
    y, gradients = evaluate(operation.function, case.options, inputs, None, backend)
    dy = cotangent(y)
    for name, left, right, scale in operation.identities(case.options, inputs, dy, y, gradients):
        value = float(((left - right).abs() / scale.clamp(min=1e-300)).max())
        result = _result(operation, case, backend, device, torch.float64, "identity", value, FLOAT64_BOUND)
        result.what = name
        yield result


def _result(
    operation: Operation,
    case: Case,
    backend: str,
    device: str,
    dtype: torch.dtype,
    check: str,
    value: float,
    bound: float,
) -> Result:
    name = str(dtype).removeprefix("torch.")
    return Result(operation.name, backend, device, name, case.name, case.kind, check, value, bound)
