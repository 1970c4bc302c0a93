"""Which mistake is it? A wrong gradient is compared with what every known mutant computes on the same inputs.

Two functions that agree on random numbers, on every ordinary and awkward case, are the same function. So a gradient
that equals a mutant's on all of them contains that mutant's mistake, and the mistake has a name. A gradient that equals
none gets facts instead: a constant factor, a sign, a transposition, or which elements are wrong.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

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
NAMES = ("y", "dx", "dw", "db")
ROWS = 12


class Fault(Exception):
    """What a pair must not do, in one line."""


# ---- outcomes -------------------------------------------------------------------------------------------------


def outcomes(exercise: Exercise, subject: Any = "reference") -> list[Outcome]:
    """Output and gradients on every small case and example. `subject`: a backend, for a rule the function itself."""
    if not exercise.is_operation:
        function = getattr(exercise.module, exercise.functions[-1]) if subject == "reference" else subject
        return [_guarded(partial(call, function)) for call in rules.CALLS[exercise.name]]
    operation = by_name(exercise.name)
    cases = (*operation.small_cases, *exercise.examples)
    return [_guarded(partial(_outcome, exercise, case, subject)) for case in cases]


def _guarded(run: Callable[[], dict[str, Tensor]]) -> Outcome:
    try:
        return run()
    except (Fault, RuntimeError, ValueError, IndexError, TypeError) as error:
        return type(error).__name__


def _outcome(exercise: Exercise, case: Case, backend: str) -> dict[str, Tensor]:
    at = evaluation(exercise, case, backend)
    return dict(zip(NAMES, (at.y, *at.gradients), strict=False))


def evaluation(exercise: Exercise, case: Case, backend: str) -> Evaluation:
    """A case in float64; the dy of an example is as short as its inputs."""
    inputs = case.inputs()
    dy = None
    if case in exercise.examples:
        shape = by_name(exercise.name).function(*inputs, **case.options, backend="reference").shape
        dy = torch.randint(1, 4, shape, generator=torch.Generator().manual_seed(1)).double()
        dy = dy * (1 - 2 * (torch.arange(dy.numel()).reshape(shape) % 2)) if shape else dy / dy
    return Evaluation.of(by_name(exercise.name).function, case.options, inputs, dy, backend)


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


# ---- names ----------------------------------------------------------------------------------------------------


def mutants_of(exercise: Exercise) -> list[Mutant]:
    """The known mistakes that a file of this exercise can contain."""
    where = {"update_rule": rules.UPDATE, "initialisation": rules.START}.get(exercise.name, exercise.name)
    found = [mutant for mutant in MUTANTS if mutant.where == where]
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
    tensors = dict.fromkeys(name for outcome in right if not isinstance(outcome, str) for name in outcome)
    left = _changed(mine, right, list(tensors))
    explained: dict[tuple[str, ...], list[str]] = {}
    for mutant, theirs in known(exercise.name):
        changed = _changed(theirs, right, list(tensors))
        if changed and set(changed) <= set(left) and all(_agree(mine, theirs, name) for name in changed):
            explained.setdefault(tuple(changed), []).append(mutant.name)
    lines = []
    for names in sorted(explained, key=len, reverse=True):
        if set(names) <= set(left):
            left = [name for name in left if name not in names]
            mistakes = '" or "'.join(explained[names])
            verb = "equals that" if len(names) == 1 else "equal those"
            lines.append(f'your {" and ".join(names)} {verb} of a known mistake: "{mistakes}"')
    return lines + [
        f"your {name} {fact(mine, right, name)}; it is not one of the known mistakes" for name in left
    ]


def _changed(found: Sequence[Outcome], right: Sequence[Outcome], names: list[str]) -> list[str]:
    """The tensors that differ in some case; a case that ended in an exception says nothing."""
    computed = [(a, b) for a, b in zip(found, right, strict=True) if not isinstance(a, str)]
    return [name for name in names if any(not same(a, b, name) for a, b in computed)]


def _agree(mine: Sequence[Outcome], theirs: Sequence[Outcome], name: str) -> bool:
    return all(same(a, b, name) for a, b in zip(mine, theirs, strict=True))


def fact(mine: Sequence[Outcome], right: Sequence[Outcome], name: str) -> str:
    """What can be said of a wrong tensor by looking at it."""
    both = [
        (a, b) for a, b in zip(mine, right, strict=True) if not isinstance(a, str) and not isinstance(b, str)
    ]
    pairs = [(a[name].double(), b[name].double()) for a, b in both if name in a and name in b]
    if all(not a.any() for a, _ in pairs):
        return "is zero"
    if any(not a.isfinite().all() for a, _ in pairs):
        return "has non-finite values"
    if all(torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max())) for a, b in pairs if b.any()):
        return "is right to six digits only: something in it is computed in float32"
    factors = [float((a * b).sum() / (b * b).sum()) for a, b in pairs if b.any()]
    exact = all(
        torch.allclose(a, f * b, rtol=1e-8, atol=1e-12) for f, (a, b) in zip(factors, pairs, strict=False)
    )
    if exact and max(factors) - min(factors) < 1e-8:
        return f"is {factors[0]:.4g} times the right one"
    if exact:
        return f"is a constant times the right one in each case ({min(factors):.4g} to {max(factors):.4g})"
    a, b = next((a, b) for a, b in pairs if not torch.allclose(a, b, rtol=1e-8, atol=1e-12))
    share = float(((a - b).abs() > 1e-8 * b.abs().max()).double().mean())
    cases = sum(not torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in pairs)
    return f"is wrong in {cases} of {len(pairs)} cases, in the first of them in {100 * share:.0f} % of its elements"


# ---- the smallest example -------------------------------------------------------------------------------------


def smallest_example(exercise: Exercise, subject: Any) -> list[str]:
    """The first example, else the small case with the fewest numbers, on which the subject is wrong: as a table."""
    if not exercise.is_operation:
        return _example_of_rule(exercise, subject)
    cases = sorted(by_name(exercise.name).small_cases, key=lambda case: sum(x.numel() for x in case.inputs()))
    for case in (*exercise.examples, *cases):
        try:
            mine, right = (evaluation(exercise, case, b) for b in (subject, "reference"))
        except Fault:
            continue
        ours, theirs = (
            {"y": at.y, **dict(zip(NAMES[1:], at.gradients, strict=False))} for at in (mine, right)
        )
        wrong = [name for name in ours if not same(ours, theirs, name)]
        if wrong:
            given = [f"{name} = {numbers(x)}" for name, x in zip(("x", "w", "b"), right.inputs, strict=False)]
            options = ", ".join(f"{key}={value!r}" for key, value in case.options.items())
            lines = [
                "",
                f"{case.name}{f' ({options})' if options else ''}",
                *given,
                f"dy = {numbers(right.dy)}",
            ]
            return [*lines, *(line for name in wrong for line in table(name, ours[name], theirs[name])), ""]
    return []


def _example_of_rule(exercise: Exercise, function: Any) -> list[str]:
    for call, mine, right in zip(
        rules.CALLS[exercise.name], outcomes(exercise, function), outcomes(exercise), strict=True
    ):
        if not isinstance(mine, str) and not isinstance(right, str):
            wrong = [name for name in right if not same(mine, right, name)]
            if wrong:
                rows = [row for name in wrong for row in table(name, mine[name], right[name])]
                return ["", str(call.__doc__), *rows, ""]
    return []


def numbers(x: Tensor) -> str:
    """A small tensor in one line; the shape of a large one."""
    return str(x.tolist()) if x.numel() <= 24 else f"random numbers of shape {tuple(x.shape)}"


def table(name: str, mine: Tensor, right: Tensor) -> list[str]:
    """Yours, right and difference for every element, or for the worst where there are many."""
    difference = (mine - right).reshape(-1)
    order = list(range(len(difference)))
    if len(difference) > ROWS:
        order = sorted(difference.abs().nan_to_num(math.inf).topk(ROWS).indices.tolist())
    lines = [f"{name:16} {'yours':>10} {'right':>10} {'difference':>11}"]
    for i in order:
        index = (
            ",".join(str(int(k)) for k in torch.unravel_index(torch.tensor(i), right.shape))
            if right.dim()
            else ""
        )
        values = f"{float(mine.reshape(-1)[i]):10.4f} {float(right.reshape(-1)[i]):10.4f} {float(difference[i]):11.4f}"
        lines.append(f"{f'{name}[{index}]':16} {values}")
    return lines
