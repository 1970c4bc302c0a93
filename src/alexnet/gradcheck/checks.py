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
   float64: to 1e-10 of the largest element there, and inside the rounding bound derived in `cases` elsewhere, where
   error / bound is reported. The output is compared too: a backward that fits a wrong forward is no use.

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

from alexnet.gradcheck.cases import Case, Evaluation, Operation, Tensors, gapped

STEPS = torch.logspace(-2, -4, 9, dtype=torch.float64).tolist()
SLOPE_TOLERANCE = 0.1
DIFFERENCE_BOUND = 1e-8
FLOAT64_BOUND = 1e-10
DIRECTIONS = 4
MOST_DRAWS = 200


@dataclass
class Result:
    """One error and the bound it must not exceed."""

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
        """error / bound; 0 for an error of 0, inf for NaN and for an error where the bound is 0."""
        if self.bound == 0 or math.isnan(self.value):
            return 0.0 if self.value == 0 else math.inf
        return self.value / self.bound

    def row(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share, "passed": self.passed}


@dataclass(frozen=True)
class Trial:
    """One case of one operation, on one backend, device and type."""

    operation: Operation
    case: Case
    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float64

    def inputs(self) -> Tensors:
        """The case's arguments in the type, on the device, in the layout that it asks for."""
        drawn = self.case.inputs()
        first, *others = (x.to(self.device, self.dtype if x.is_floating_point() else x.dtype) for x in drawn)
        if self.case.layout == "channels_last":
            first = first.contiguous(memory_format=torch.channels_last)
        return [gapped(first) if self.case.layout == "gapped" else first, *others]

    def evaluate(self, inputs: Tensors, dy: Tensor | None = None, backend: str | None = None) -> Evaluation:
        function, options = self.operation.function, self.case.options
        return Evaluation.of(function, options, inputs, dy, backend or self.backend)

    def result(self, check: str, value: float, bound: float, what: str = "") -> Result:
        dtype = str(self.dtype).removeprefix("torch.")
        where = (self.operation.name, self.backend, self.device, dtype, self.case.name, self.case.kind)
        return Result(*where, check, value, bound, what)


def results_of(
    operation: Operation, case: Case, backend: str, device: str, dtypes: tuple[torch.dtype, ...]
) -> Iterator[Result]:
    """Every check of one case: all three in float64, autograd in the other types."""
    for dtype in sorted(dtypes, key=lambda dtype: dtype != torch.float64):
        trial = Trial(operation, case, backend, device, dtype)
        yield autograd(trial)
        if dtype == torch.float64:
            if case.smooth:
                yield differences(trial)
            yield from identities(trial)


def autograd(trial: Trial) -> Result:
    """b) Ours in the trial's type against torch's in float64, on the numbers that the type can hold."""
    inputs = trial.inputs()
    ours = trial.evaluate(inputs)
    exact_inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    exact = trial.evaluate(exact_inputs, ours.dy.double(), "native")
    pairs = list(zip([ours.y, *ours.gradients], [exact.y, *exact.gradients], strict=True))
    if trial.dtype == torch.float64:
        return trial.result("autograd", max(relative(*pair) for pair in pairs), FLOAT64_BOUND)
    bounds = [rounding.bound(trial.dtype) for rounding in trial.operation.rounding(exact)]
    value = max(largest_share(*pair, bound) for pair, bound in zip(pairs, bounds, strict=True))
    return trial.result("autograd", value, 1.0)


def relative(ours: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest element; the difference itself where all is zero."""
    difference, size = largest(ours.detach().double() - exact), largest(exact)
    return difference / size if size else difference


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def largest_share(ours: Tensor, exact: Tensor, bound: Tensor) -> float:
    """The largest error / bound over the elements; inf for an error where the bound is 0, NaN for a NaN."""
    error = (ours.double() - exact).abs()
    return largest(torch.where(error == 0, 0.0, error / bound))


def differences(trial: Trial) -> Result:
    """a) The curve of errors over steps, or the error at one step where f has no curvature."""
    operation, case = trial.operation, trial.case
    here = trial.evaluate(trial.inputs())
    large = case.kind in ("paper", "large")
    steps = STEPS[:: 4 if large else 1] if operation.curved else [1e-4]
    draws = torch.Generator().manual_seed(1)
    worst = torch.zeros(len(steps), dtype=torch.float64)
    for _ in range(1 if large else DIRECTIONS):
        direction = _direction(trial, here.inputs, max(steps), draws)
        errors = [_error(trial, here, direction, step) for step in steps]
        worst = torch.maximum(worst, torch.tensor(errors, dtype=torch.float64))
    curve = list(zip(steps, worst.tolist(), strict=True))
    if operation.curved and largest(here.gradients[0]):
        found = slope(curve)
        result = trial.result("differences", abs(found - 2), SLOPE_TOLERANCE, f"slope {found:.3f}")
    else:
        result = trial.result("differences", float(worst.max()), DIFFERENCE_BOUND, "at h = 1e-4")
    result.curve = curve
    return result


def _direction(trial: Trial, inputs: Tensors, step: float, draws: torch.Generator) -> Tensors:
    """Normals of each input's size; no unit opens, closes or changes its winner within `step` along them."""
    pattern, options = trial.operation.pattern, trial.case.options
    for _ in range(MOST_DRAWS):
        direction = [torch.randn(x.shape, generator=draws, dtype=torch.float64).to(x.device) for x in inputs]
        sizes = [float(x.double().square().mean().sqrt()) for x in inputs]
        direction = [size * d for size, d in zip(sizes, direction, strict=True)]
        if pattern is None:
            return direction
        here, *there = (pattern(options, _moved(inputs, direction, end)) for end in (0.0, step, -step))
        if all(torch.equal(a, b) for end in there for a, b in zip(here, end, strict=True)):
            return direction
    where = f"{trial.operation.name}, {trial.case.name}"
    raise RuntimeError(f"{where}: every direction of length {step} crosses a kink")


def _moved(inputs: Tensors, direction: Tensors, step: float) -> Tensors:
    return [x + step * d if x.is_floating_point() else x for x, d in zip(inputs, direction, strict=True)]


def _error(trial: Trial, here: Evaluation, direction: Tensors, step: float) -> float:
    function, options = trial.operation.function, trial.case.options
    with torch.no_grad():
        ahead, behind = (
            function(*_moved(here.inputs, direction, end), **options, backend=trial.backend)
            for end in (step, -step)
        )
    quotient = float((here.dy * (ahead - behind)).sum()) / (2 * step)
    along = [d for x, d in zip(here.inputs, direction, strict=True) if x.is_floating_point()]
    return quotient_error(quotient, [g * d for g, d in zip(here.gradients, along, strict=True)])


def quotient_error(quotient: float, products: list[Tensor]) -> float:
    """|difference quotient - <gradient, direction>| over the size of such products."""
    claimed = sum(float(product.sum()) for product in products)
    size = sum(float(product.square().sum()) for product in products) ** 0.5
    return abs(quotient - claimed) / (size or 1.0)


def slope(curve: list[tuple[float, float]]) -> float:
    """Of log error over log step, by least squares; NaN if an error is exactly 0."""
    h, error = torch.tensor(curve, dtype=torch.float64).log().T
    h = h - h.mean()
    return float((h * error).sum() / (h * h).sum())


def identities(trial: Trial) -> Iterator[Result]:
    """c) Each equation's two sides, their difference over the size of what was summed."""
    for name, left, right, scale in trial.operation.identities(trial.evaluate(trial.inputs())):
        error = float(((left - right).abs() / scale.clamp(min=1e-300)).max())
        yield trial.result("identity", error, FLOAT64_BOUND, name)
