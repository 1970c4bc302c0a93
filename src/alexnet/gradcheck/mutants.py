"""Mutation testing: does a check fail on a wrong gradient?

A check that has never failed has proven nothing. A mutant is shipped code with one expression changed:

    mutate(fold, "+=", "=")

The mutant is killed if a check fails while it runs, and survives if all of them pass: then the checks have a hole,
and the whole run fails. The mutants themselves are in mutants_of_reference, mutants_of_rules and mutants_of_compiled.
Each is a mistake that somebody made: a second term dropped, `=` for `+=` (invisible where windows do not overlap),
a sum that crosses the border of a tower, a mean taken twice. Many leave every shape right and the loss falling.

`mutate` compiles the function's changed source and exchanges its `__code__`. The function stays the same object, so
every module that imported it and every pair that holds it runs the mutant. No file is edited. torch.compile checks at
each call that the functions of a graph have the `__code__` they were compiled with, so a mutant gets graphs of its own
and the shipped code gets its old ones back.

Compiling takes seconds a case, up to two minutes a mutant, and the mistakes are in the mathematics: so the code of the
compiled pairs runs uncompiled here. `try_to_kill(mutant, compiled=True)` also compiles the case that killed it.
"""

import inspect
import linecache
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from textwrap import dedent
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from unittest import mock

import torch

from alexnet.gradcheck import rules
from alexnet.gradcheck.checks import results_of
from alexnet.gradcheck.operations import by_name
from alexnet.layers.pair import PAIRS, Pair


@dataclass(frozen=True)
class Change:
    """A function and its mutated code: `with change:` runs it. Cannot be nested for one function."""

    function: FunctionType
    original: CodeType
    mutated: CodeType

    def __enter__(self) -> None:
        if self.function.__code__ is not self.original:
            raise RuntimeError(
                f"{self.function.__qualname__} is mutated already: one mutate() takes both changes"
            )
        self.function.__code__ = self.mutated

    def __exit__(self, *exception: object) -> None:
        self.function.__code__ = self.original


def mutate(function: Callable[..., Any], *replacements: str) -> Change:
    """The function with the text old, new[, old, new ...] of its source replaced.

    Each old text must stand in the source exactly once: a mutant must not outlive the code that it changes. Raises
    ValueError otherwise. Decorators are kept: the function that they wrap is changed.
    """
    inner = inspect.unwrap(function)
    source = dedent(inspect.getsource(inner))
    pairs = list(zip(replacements[::2], replacements[1::2], strict=True))
    for old, new in pairs:
        if source.count(old) != 1:
            name = f"{inner.__module__}.{inner.__qualname__}"
            raise ValueError(f"mutate: {old!r} stands {source.count(old)} times in {name}, must be once")
        source = source.replace(old, new)
    changes = ", ".join(f"{old} -> {new}" for old, new in pairs)
    filename = f"<{inner.__module__}.{inner.__qualname__}: {changes}>"
    lines = source.splitlines(keepends=True)
    linecache.cache[filename] = (len(source), None, lines, filename)  # tracebacks show the mutated lines
    module = compile(source, filename, "exec", dont_inherit=True)  # not executed: nothing is decorated twice
    (code,) = (c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == inner.__name__)
    return Change(inner, inner.__code__, code)


class Mutant(NamedTuple):
    where: str  # an operation, or one of rules.RULES
    name: str
    changes: tuple[Change, ...]
    backend: str = "reference"
    dtype: torch.dtype = torch.float64  # in which the changed code runs
    pair: Pair | None = None  # that serves the operation instead of the backend's own

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Runs the mutant instead of the shipped code."""
        pair = {} if self.pair is None else {(self.where, self.backend): self.pair}
        with mock.patch.dict(PAIRS, pair), ExitStack() as stack:
            for change in self.changes:
                stack.enter_context(change)
            yield


def mutants(
    where: str,
    function: Callable[..., Any],
    table: dict[str, tuple[str, ...] | Change | list[Change]],
    backend: str = "reference",
    dtype: torch.dtype = torch.float64,
) -> list[Mutant]:
    """One mutant for each row, {name: (old, new, ...)} in `function`, or the change or changes of other functions."""
    found = []
    for name, row in table.items():
        change = mutate(function, *row) if isinstance(row, tuple) else row
        changes = tuple(change) if isinstance(change, list) else (change,)
        found.append(Mutant(where, name, changes, backend, dtype))
    return found


@dataclass
class Kill:
    """What happened to one mutant: the checks that failed, and on which case. No check: it survived."""

    where: str
    name: str
    killed_by: list[str]
    case: str

    @property
    def letters(self) -> str:
        """a, b, c of `checks`; a rule has only one check."""
        letter = {"differences": "a", "autograd": "b", "identity": "c"}
        return "".join(sorted(letter[check] for check in self.killed_by if check in letter))


def try_to_kill(mutant: Mutant, compiled: bool = False) -> Kill:
    """Runs the small cases, uncompiled, until a check fails on the mutant; `compiled`: that case again, compiled."""
    needs_compiler = mutant.backend != "reference"
    with mutant.in_place():
        with torch.compiler.set_stance("force_eager") if needs_compiler else nullcontext():
            kill = _kill(mutant)
        if compiled and needs_compiler and kill.killed_by:
            kill = _kill(mutant, only=kill.case)
    return kill


def _kill(mutant: Mutant, only: str = "") -> Kill:
    """Case by case, which checks of this operation or rule fail at a small size in one type."""
    if mutant.where in rules.RULES:
        for result in rules.rule_results(mutant.where):
            if not result.passed:
                return Kill(mutant.where, mutant.name, [result.check], result.case)
        return Kill(mutant.where, mutant.name, [], "")
    operation = by_name(mutant.where)
    for case in operation.small_cases:
        if only in ("", case.name):
            results = results_of(operation, case, mutant.backend, "cpu", (mutant.dtype,))
            try:
                failed = sorted({result.check for result in results if not result.passed})
            except RuntimeError:  # torch refuses a gradient, for its shape say
                failed = ["exception"]
            if failed:
                return Kill(mutant.where, mutant.name, failed, case.name)
    return Kill(mutant.where, mutant.name, [], "")
