"""Which mistake is it? A wrong gradient is compared with what every known mutant computes on the same inputs.

Two functions that agree on random numbers, on every ordinary and awkward case, are the same function. So a gradient
that equals a mutant's on all of them contains that mutant's mistake, and the mistake has a name. A gradient that equals
none gets facts instead: a constant factor, a sign, a transposition, or which elements are wrong.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet.gradcheck import rules
from alexnet.gradcheck.cases import Case, Evaluation
from alexnet.gradcheck.exercises import Exercise, exercise_named
from alexnet.gradcheck.mutants import Mutant
from alexnet.gradcheck.mutants_of_reference import MUTANTS
from alexnet.gradcheck.operations import by_name

SAME = 1e-9  # two float64 computations of one formula agree to this share of the largest element
Outcome = dict[str, Tensor] | str  # {"y": ..., "dx": ..., ...}, or the kind of exception
ROWS = 12


class Fault(Exception):
    """What a pair must not do, in one line."""


ERRORS = (Fault, RuntimeError, ValueError, IndexError, TypeError)


def points_of(exercise: Exercise) -> Sequence[Any]:
    """The small cases and examples of an operation, the calls of a rule."""
    if exercise.is_operation:
        return (*by_name(exercise.name).small_cases, *exercise.examples)
    return rules.CALLS[exercise.name]


def outcomes(exercise: Exercise, subject: Any = "reference") -> list[Outcome]:
    """What comes out at every point. `subject`: a backend, for a rule the function itself."""
    found: list[Outcome] = []
    for point in points_of(exercise):
        try:
            found.append(_computed(exercise, point, subject))
        except ERRORS as error:
            found.append(type(error).__name__)
    return found


def _computed(exercise: Exercise, point: Any, subject: Any) -> dict[str, Tensor]:
    """Output and gradients of a case, or what a rule gives for a call of rules.CALLS."""
    if exercise.is_operation:
        at = evaluation(exercise, point, subject)
        return dict(zip(("y", "dx", "dw", "db"), (at.y, *at.gradients), strict=False))
    _, call = point
    return call(getattr(exercise.module, exercise.functions[-1]) if subject == "reference" else subject)


def evaluation(exercise: Exercise, case: Case, backend: str) -> Evaluation:
    """A case in float64; the dy of an example is as short as its inputs."""
    function, inputs, dy = by_name(exercise.name).function, case.inputs(), None
    if case in exercise.examples:
        shape = function(*inputs, **case.options, backend="reference").shape
        dy = torch.randint(1, 4, shape, generator=torch.Generator().manual_seed(1)).double()
        dy = dy * (1 - 2 * (torch.arange(dy.numel()).reshape(shape) % 2)) if shape else dy / dy
    return Evaluation.of(function, case.options, inputs, dy, backend)


def same(a: Outcome, b: Outcome, name: str) -> bool:
    """Whether two outcomes agree in one tensor, or both are exceptions."""
    if isinstance(a, str) or isinstance(b, str):
        return isinstance(a, str) and isinstance(b, str)
    if name not in a or name not in b:
        return name not in a and name not in b
    size = float(b[name].abs().max()) if b[name].numel() else 0.0
    return a[name].shape == b[name].shape and torch.allclose(
        a[name].double(), b[name].double(), rtol=0, atol=SAME * (size or 1.0), equal_nan=True
    )


def mutants_of(exercise: Exercise) -> list[Mutant]:
    """The known mistakes that a file of this exercise can contain."""
    found = [mutant for mutant in MUTANTS if mutant.where == exercise.where]
    if exercise.is_operation:
        return found
    wanted = getattr(exercise.module, exercise.functions[-1])
    return [mutant for mutant in found if all(change.function is wanted for change in mutant.changes)]


@cache
def known(name: str) -> list[tuple[Mutant, list[Outcome]]]:
    """Every known mistake of an exercise, with what it computes."""
    exercise, found = exercise_named(name), []
    for mutant in mutants_of(exercise):
        with mutant.in_place():
            found.append((mutant, outcomes(exercise)))
    return found


def diagnosis(exercise: Exercise, subject: Any) -> list[str]:
    """One line for each mistake that was recognised, and a fact about every wrong tensor that none explains."""
    right, mine = outcomes(exercise), outcomes(exercise, subject)
    tensors = list(dict.fromkeys(name for each in right if not isinstance(each, str) for name in each))
    left = _changed(mine, right, tensors)
    explained: dict[tuple[str, ...], list[str]] = {}
    for mutant, theirs in known(exercise.name):
        changed = _changed(theirs, right, tensors)
        agree = all(same(a, b, name) for name in changed for a, b in zip(mine, theirs, strict=True))
        if changed and agree and set(changed) <= set(left):
            explained.setdefault(tuple(changed), []).append(mutant.name)
    lines = []
    for names in sorted(explained, key=len, reverse=True):
        if set(names) <= set(left):
            left = [name for name in left if name not in names]
            mistakes = '" or "'.join(explained[names])
            verb = "equals that" if len(names) == 1 else "equal those"
            lines.append(f'your {" and ".join(names)} {verb} of a known mistake: "{mistakes}"')
    end = "it is not one of the known mistakes"
    return [*lines, *(f"your {name} {fact(mine, right, name)}; {end}" for name in left)]


def _changed(found: Sequence[Outcome], right: Sequence[Outcome], names: list[str]) -> list[str]:
    """The tensors that differ in some case; a case that ended in an exception says nothing."""
    computed = [(a, b) for a, b in zip(found, right, strict=True) if not isinstance(a, str)]
    return [name for name in names if any(not same(a, b, name) for a, b in computed)]


def fact(mine: Sequence[Outcome], right: Sequence[Outcome], name: str) -> str:
    """What can be said of a wrong tensor by looking at it."""
    pairs = [
        (a[name].double(), b[name].double())
        for a, b in zip(mine, right, strict=True)
        if not isinstance(a, str) and not isinstance(b, str) and name in a and name in b
    ]
    if all(not a.any() for a, _ in pairs):
        return "is zero"
    if any(not a.isfinite().all() for a, _ in pairs):
        return "has non-finite values"
    if all(torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max())) for a, b in pairs if b.any()):
        return "is right to six digits only: something in it is computed in float32"

    def close(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-8, atol=1e-12)

    # Nothing times a gradient of zero: there both must be zero.
    nonzero = [(a, b) for a, b in pairs if a.any() or b.any()]
    factors = [float((a * b).sum() / (b * b).sum()) if b.any() else math.nan for a, b in nonzero]
    if all(close(a, f * b) for f, (a, b) in zip(factors, nonzero, strict=True)):
        if max(factors) - min(factors) < 1e-8:
            return f"is {factors[0]:.4g} times the right one"
        return f"is a constant times the right one in each case ({min(factors):.4g} to {max(factors):.4g})"
    wrong = [(a, b) for a, b in pairs if not close(a, b)]
    a, b = wrong[0]
    share = 100 * float(((a - b).abs() > 1e-8 * b.abs().max()).double().mean())
    return f"is wrong in {len(wrong)} of {len(pairs)} cases, in the first of them in {share:.0f} % of its elements"


def smallest_example(exercise: Exercise, subject: Any) -> list[str]:
    """The first example, else the small case with the fewest numbers, on which the subject is wrong: as a table."""

    def place(point: Any) -> int:
        """Examples and calls of rules first, as they stand."""
        is_case = exercise.is_operation and point not in exercise.examples
        return sum(x.numel() for x in point.inputs()) if is_case else 0

    for point in sorted(points_of(exercise), key=place):
        try:
            mine, right = (_computed(exercise, point, each) for each in (subject, "reference"))
        except ERRORS:
            continue
        wrong = [name for name in mine if not same(mine, right, name)]
        if wrong:
            rows = [row for name in wrong for row in table(name, mine[name], right[name])]
            return ["", *_given(exercise, point), *rows, ""]
    return []


def _given(exercise: Exercise, point: Any) -> list[str]:
    """A case with its numbers, or how a rule is called."""
    if not exercise.is_operation:
        return [point[0]]
    at = evaluation(exercise, point, "reference")
    options = ", ".join(f"{key}={value!r}" for key, value in point.options.items())
    lines = [f"{point.name}{f' ({options})' if options else ''}"]
    for name, x in {**dict(zip(("x", "w", "b"), at.inputs, strict=False)), "dy": at.dy}.items():
        shown = x.tolist() if x.numel() <= 24 else f"random numbers of shape {tuple(x.shape)}"
        lines.append(f"{name} = {shown}")
    return lines


def table(name: str, mine: Tensor, right: Tensor) -> list[str]:
    """Yours, right and difference for every element, or for the worst where there are many."""
    difference = (mine - right).reshape(-1)
    order = list(range(len(difference)))
    if len(difference) > ROWS:
        order = sorted(difference.abs().nan_to_num(math.inf).topk(ROWS).indices.tolist())
    lines = [f"{name:16} {'yours':>10} {'right':>10} {'difference':>11}"]
    for i in order:
        index = ",".join(map(str, np.unravel_index(i, tuple(right.shape))))
        values = (float(mine.reshape(-1)[i]), float(right.reshape(-1)[i]), float(difference[i]))
        lines.append(f"{f'{name}[{index}]':16} {values[0]:10.4f} {values[1]:10.4f} {values[2]:11.4f}")
    return lines
