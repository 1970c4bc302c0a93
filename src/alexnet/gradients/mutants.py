"""The kill table: realistic bugs, planted one by one, and the check that notices each.

A check that has never failed has proven nothing. Every mutant below is a small function put in place of a right one
while the cheapest checks of `checks` and `rules` run: a wrong forward or backward takes its pair's place in PAIRS,
a wrong part of the convolution, the update rule or the data path that of an attribute. No file is edited. A mutant
that no check notices is a hole in the checks, and counts as a failure of the whole run.

A compiled pair keeps what it compiled, so all of it is dropped before and after: the wrong part is compiled in its
turn, and is what runs.

Each bug was made by somebody: dropped second terms, `=` for `+=` (invisible to windows side by side), towers that
leak into each other, a mean taken twice. Many leave every shape right and the loss falling.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from alexnet.gradients import rules
from alexnet.gradients.checks import Result, results_of
from alexnet.gradients.operations import ALL
from alexnet.layers.backend import PAIRS, Pair

Backward = Callable[..., Any]
Patch = Callable[[], AbstractContextManager[Any]]


class Mutant(NamedTuple):
    where: str  # an operation, "update rule" or "data path"
    name: str
    plant: Patch
    backend: str = "reference"
    dtype: torch.dtype = torch.float64  # in which the code that is wrong runs
    shows: str = ""  # the case to begin with, where each costs seconds; the others follow


@dataclass
class Kill:
    """What happened to one mutant; `noticed_by` is empty if it survived."""

    where: str
    name: str
    noticed_by: list[str]
    case: str

    @property
    def letters(self) -> str:
        """a, b, c of `checks`; a rule has only one check."""
        letter = {"differences": "a", "autograd": "b", "identity": "c"}
        return "".join(sorted(letter[check] for check in self.noticed_by if check in letter))


def hunt(mutant: Mutant) -> Kill:
    """Plants it and runs the small cases until one fails."""
    with _freshly_compiled(mutant.backend), mutant.plant():
        return _hunt(mutant)


@contextmanager
def _freshly_compiled(backend: str) -> Iterator[None]:
    if backend == "reference":
        yield
        return
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def _hunt(mutant: Mutant) -> Kill:
    for name, results in _small_checks(mutant):
        failed = sorted({result.check for result in results if not result.passed})
        if failed:
            return Kill(mutant.where, mutant.name, failed, name)
    return Kill(mutant.where, mutant.name, [], "")


def _small_checks(mutant: Mutant) -> Iterator[tuple[str, list[Result]]]:
    """Case by case, everything that checks this operation or rule at a small size in one type."""
    where = mutant.where
    if where in (rules.UPDATE, rules.DATA):
        for result in rules.rule_results(where):
            yield result.case, [result]
        return
    operation = next(operation for operation in ALL if operation.name == where)
    for case in sorted(operation.cases, key=lambda case: case.name != mutant.shows):
        if case.kind in ("ordinary", "awkward"):
            yield case.name, list(results_of(operation, case, mutant.backend, "cpu", (mutant.dtype,)))


def pair(where: str, name: str, forward: Backward | None = None, backward: Backward | None = None) -> Mutant:
    """A wrong function in place of a reference pair's."""
    right = PAIRS[where, "reference"]
    wrong = Pair(forward or right.forward, backward or right.backward)
    return Mutant(where, name, lambda: mock.patch.dict(PAIRS, {(where, "reference"): wrong}))


def attribute(where: str, name: str, owner: Any, attribute: str, wrong: Any) -> Mutant:
    """A wrong part in place of a module's or a class's own."""
    return Mutant(where, name, lambda: mock.patch.object(owner, attribute, wrong))


def changed(where: str, name: str, which: int, change: Callable[..., Tensor]) -> Mutant:
    """The right backward, one of whose gradients is changed: change(gradient, dy, *saved)."""
    right = PAIRS[where, "reference"].backward

    def backward(*arguments: Any) -> tuple[Tensor | None, ...]:
        gradients = list(right(*arguments))
        if gradients[which] is not None:
            gradients[which] = change(gradients[which], *arguments)
        return tuple(gradients)

    return pair(where, name, backward=backward)
