"""The reader's own functions under the proofs of ours: what `check_gradients.py mine=<file>` runs.

First the contract of a pair: no exception, right shapes and types, no argument changed in place, nothing remembered
between calls. Then the checks of checks.py on ordinary and awkward cases. Where one fails, the smallest numbers that
show it, and the name of the mistake if it is a known one (diagnosis.py).

float64 and float32 must pass. bfloat16 is only reported: a right gradient may still round too often there.
"""

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from alexnet.errors import UserError
from alexnet.gradcheck.cases import Case, Evaluation, Operation
from alexnet.gradcheck.checks import Result, results_of
from alexnet.gradcheck.diagnosis import Fault, diagnosis, smallest_example
from alexnet.gradcheck.exercises import EXERCISES, Exercise, record_path
from alexnet.gradcheck.operations import by_name
from alexnet.gradcheck.rules import rule_results
from alexnet.layers.backend import pair_from_file
from alexnet.layers.from_file import file_hash, import_file
from alexnet.layers.pair import PAIRS, Pair
from alexnet.system import write_json

MINE = "mine"  # the name under which the reader's pair stands in PAIRS
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@dataclass
class Verdict:
    """What was found about one exercise of a file."""

    exercise: Exercise
    faults: dict[str, str] = field(default_factory=dict)  # {case: what the contract forbids}
    results: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # the example and the diagnosis, line by line

    @property
    def failures(self) -> list[Result]:
        return [result for result in self.results if not result.passed and result.dtype != "bfloat16"]

    @property
    def passed(self) -> bool:
        return bool(self.results) and not self.faults and not self.failures


def prove_mine(path: str, output_dir: str, say: Callable[[str], None] = print) -> bool:
    """Proves every exercise that the file answers, says what was found, and whether all of it holds."""
    module, passed = import_file(path), True
    # A function that the file only imports is not the reader's.
    own = {
        name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
    }
    answered = [exercise for exercise in EXERCISES if exercise.functions[-1] in own]
    if not answered:
        wanted = ", ".join(exercise.functions[-1] for exercise in EXERCISES)
        raise UserError(f"mine={path}: the file must define at least one of {wanted}")
    for exercise in answered:
        verdict = (_proven_operation if exercise.is_operation else _proven_rule)(exercise, module)
        say(report(verdict, path))
        record = record_path(exercise.name, output_dir)
        record.parent.mkdir(parents=True, exist_ok=True)
        rows = [result.row() for result in verdict.results]
        found = {"passed": verdict.passed, "faults": verdict.faults, "results": rows}
        write_json(record, {"file": path, "sha256": file_hash(path), **found})
        passed = passed and verdict.passed
    return passed


def _proven_operation(exercise: Exercise, module: ModuleType) -> Verdict:
    """Contract, checks and diagnosis of a pair."""
    verdict, operation, path = Verdict(exercise), by_name(exercise.name), str(module.__file__)
    pair = guarded(exercise.name, pair_from_file(path, exercise.name), path)
    with mock.patch.dict(PAIRS, {(exercise.name, MINE): pair}):
        for case in (*operation.small_cases, *exercise.examples):
            try:
                _remembers_nothing(operation, case)
                if case in operation.small_cases:
                    verdict.results += results_of(operation, case, MINE, "cpu", DTYPES)
            except Fault as fault:
                verdict.faults[case.name] = str(fault)
        if not verdict.passed:
            verdict.notes = [*smallest_example(exercise, MINE), *diagnosis(exercise, MINE)]
    return verdict


def _proven_rule(exercise: Exercise, module: ModuleType) -> Verdict:
    """The checks of the update rule or the initialisation, run with the reader's function in the place of ours."""
    verdict, name = Verdict(exercise), exercise.functions[-1]

    def watched(*arguments: Any) -> Any:
        return called(getattr(module, name), arguments)

    try:
        with mock.patch.object(exercise.module, name, watched):
            verdict.results += rule_results(exercise.where)
    except Fault as fault:
        verdict.faults["every case"] = str(fault)
    if not verdict.passed:
        verdict.notes = [*smallest_example(exercise, watched), *diagnosis(exercise, watched)]
    return verdict


# ---- the contract of a pair -----------------------------------------------------------------------------------


def guarded(operation: str, pair: Pair, path: str) -> Pair:
    """The pair, which raises Fault where it breaks the contract."""
    reference = PAIRS[operation, "reference"]
    names = [n for n in inspect.signature(reference.forward).parameters if n in ("x", "w", "b")]
    operands: list[Tensor | None] = []

    def forward(*arguments: Any) -> Any:
        operands[:] = arguments[: len(names)]
        outputs = called(pair.forward, arguments, path)
        if not isinstance(outputs, tuple) or not isinstance(outputs[0], Tensor):
            raise Fault(f"{operation}_forward must return (y, *saved), a tuple that begins with a tensor")
        _check_like("y", outputs[0], reference.forward(*arguments)[0])
        return outputs

    def backward(dy: Tensor, *arguments: Any) -> Any:
        returned = called(pair.backward, (dy, *arguments), path)
        gradients = returned if len(names) > 1 else (returned,)
        if not isinstance(gradients, tuple) or len(gradients) != len(names):
            wanted = ", ".join(f"d{name}" for name in names)
            raise Fault(f"{operation}_backward must return {wanted}")
        needs = arguments[-1] if len(names) > 1 else (True,)
        for name, operand, gradient, needed in zip(names, operands, gradients, needs, strict=True):
            if operand is not None and needed:
                _check_like(f"d{name}", gradient, operand)
            elif operand is None and gradient is not None:
                raise Fault(f"d{name} must be None where there is no {name}: `needs` says so")
        return returned

    return pair._replace(forward=forward, backward=backward)


def called(function: Callable[..., Any], arguments: tuple[Any, ...], path: str = "") -> Any:
    """What the function returns. Raises Fault for an exception, with its line in the file `path`, and for a tensor
    among the arguments that it changed in place."""
    before = {i: argument.clone() for i, argument in enumerate(arguments) if isinstance(argument, Tensor)}
    try:
        result = function(*arguments)
    except NotImplementedError as error:
        raise Fault(f"not written yet: {error}") from error
    except Exception as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        message = str(error).splitlines()[0] if str(error) else ""
        raise Fault(f"{where}{type(error).__name__}: {message}") from error
    for i, tensor in before.items():
        if not torch.equal(arguments[i], tensor):
            name = list(inspect.signature(function).parameters)[i]
            raise Fault(
                f"{function.__name__} changes its argument {name} in place: work on a copy, {name}.clone()"
            )
    return result


def _check_like(name: str, found: Any, wanted: Tensor) -> None:
    if not isinstance(found, Tensor):
        raise Fault(f"{name} must be a tensor, not {type(found).__name__}")
    if found.shape != wanted.shape:
        raise Fault(f"{name} has shape {tuple(found.shape)}, must be {tuple(wanted.shape)}")
    if found.dtype != wanted.dtype:
        raise Fault(f"{name} has type {found.dtype}, must be {wanted.dtype}")


def _remembers_nothing(operation: Operation, case: Case) -> None:
    """Raises Fault where the same call gives other bits after, or around, a call with other numbers."""
    inputs = case.inputs()
    others = [x.flip(0) * 0.5 if x.is_floating_point() else x for x in inputs]
    alone = Evaluation.of(operation.function, case.options, inputs, None, MINE)
    leaves, other_leaves = (
        [x.detach().requires_grad_(x.is_floating_point()) for x in each] for each in (inputs, others)
    )
    y = operation.function(*leaves, **case.options, backend=MINE)
    other = operation.function(*other_leaves, **case.options, backend=MINE)  # between forward and backward
    other.backward(torch.ones_like(other))
    y.backward(alone.dy)
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    if not torch.equal(y, alone.y):
        raise Fault("y depends on the call before: the same arguments must give the same output")
    for name, first, second in zip(("dx", "dw", "db"), alone.gradients, gradients, strict=False):
        if not torch.equal(first, second):
            raise Fault(
                f"{name} depends on the call before: keep what the backward needs in what the forward returns"
            )


# ---- what is said ---------------------------------------------------------------------------------------------


def report(verdict: Verdict, path: str) -> str:
    """The whole answer about one exercise."""
    cases = len({result.case for result in verdict.results})
    lines = [f"{verdict.exercise.name}  {path}: {len(verdict.results)} checks on {cases} cases"]
    grouped: dict[str, list[str]] = {}
    for case, fault in verdict.faults.items():
        grouped.setdefault(fault, []).append(case)
    lines += [f"  {fault}  ({_few(cases)})" for fault, cases in grouped.items()]
    for check in dict.fromkeys(result.check for result in verdict.failures):
        failed = [result for result in verdict.failures if result.check == check]
        worst = max(failed, key=lambda result: result.share)
        lines.append(
            f"  {check} failed on {_few(sorted({r.case for r in failed}))}; "
            f"largest error {worst.value:.1e}, bound {worst.bound:.0e} ({worst.dtype}, {worst.case})"
        )
    lines += [f"  {note}" for note in verdict.notes]
    rounded = [r for r in verdict.results if r.dtype == "bfloat16" and not r.passed]
    if verdict.passed and rounded:
        worst = max(rounded, key=lambda result: result.share)
        lines.append(
            f"  note: in bfloat16 the error is {worst.share:.1f} times its rounding bound ({worst.case}): "
            "compute in float32, cast(x, wide(x.dtype)), and round once at the end"
        )
    lines.append("  every check holds: this is the gradient" if verdict.passed else "  not yet")
    if verdict.passed and verdict.exercise.is_operation:
        choice = f"backend.{verdict.exercise.name}={path} name=mine"
        lines.append(f"  train with it: python scripts/train.py {choice}")
    return "\n".join(lines)


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f'"{name}"' for name in names[:3]) + more
