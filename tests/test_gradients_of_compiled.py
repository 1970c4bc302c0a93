"""The compiled pairs under the checks of every gradient: their planted bugs are noticed, ten steps are the same."""

import pytest
import torch

from alexnet.gradients import network
from alexnet.gradients.bugs_of_compiled import MUTANTS_OF_COMPILED, PAIRS_OF_CUDA, backward
from alexnet.gradients.checks import results_of
from alexnet.gradients.mutants import hunt
from alexnet.gradients.operations import ALL
from alexnet.layers import Backends
from alexnet.layers.backend import OPERATIONS, PAIRS
from alexnet.layers.compiled.on_cuda import ON_CUDA

# One of each kind that compiles in a second; the others wait for the whole suite.
QUICK = "y >= 0 for y > 0: never closed", "dw with images out of step"


def rows():
    for mutant in MUTANTS_OF_COMPILED:
        name = f"{mutant.where}, {mutant.backend}: {mutant.name}"
        yield pytest.param(mutant, id=name, marks=[] if mutant.name in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("mutant", rows())
def test_planted_bug_is_noticed(mutant):
    assert hunt(mutant).noticed_by


@pytest.mark.parametrize("mutant", [pytest.param(m, id=f"{m.where}, {m.name}") for m in PAIRS_OF_CUDA])
def test_planted_bug_of_a_cuda_pair_is_noticed_uncompiled(mutant):
    with torch.compiler.set_stance("force_eager"):
        assert hunt(mutant).noticed_by


@pytest.mark.parametrize("operation", ON_CUDA)
def test_checks_of_the_small_cases_hold_for_the_cuda_pairs_uncompiled(operation, monkeypatch):
    monkeypatch.setitem(PAIRS, (operation, "compiled"), ON_CUDA[operation])
    (checked,) = (found for found in ALL if found.name == operation)
    with torch.compiler.set_stance("force_eager"):
        for case in checked.cases:
            if case.kind in ("ordinary", "awkward"):
                results = results_of(checked, case, "compiled", "cpu", (torch.float64, torch.bfloat16))
                assert [r for r in results if not r.passed] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("operation", "backend"), sorted({(m.where, m.backend) for m in MUTANTS_OF_COMPILED})
)
def test_every_check_of_the_small_cases_holds(operation, backend):
    """In every type that a bug is planted in: what the checks notice is the bug and nothing else."""
    dtypes = {m.dtype for m in MUTANTS_OF_COMPILED if (m.where, m.backend) == (operation, backend)}
    (checked,) = (found for found in ALL if found.name == operation)
    for case in checked.cases:
        if case.kind in ("ordinary", "awkward"):
            results = results_of(checked, case, backend, "cpu", tuple(dtypes))
            assert [r for r in results if not r.passed] == []


def test_a_bug_that_changes_nothing_survives():
    assert not hunt(backward("linear", "none", lambda right, *arguments: right(*arguments))).noticed_by


def test_there_are_bugs_in_every_compiled_pair():
    planted = {(mutant.where, mutant.backend) for mutant in MUTANTS_OF_COMPILED}
    assert planted == {(operation, "compiled") for operation in OPERATIONS} | {("conv2d", "library")}
    assert len({(m.where, m.backend, m.name) for m in MUTANTS_OF_COMPILED}) == len(MUTANTS_OF_COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fast", "fastest"])
def test_ten_steps_are_those_of_the_reference(backend):
    """Bounds as between reference and torch: LOSS_BOUND, and WEIGHT_BOUND of each tensor's norm."""
    chosen = Backends(default=backend).resolve("cpu")
    ours = network.train_ours(network.STEPS_NET, chosen, "cpu", torch.float64)
    reference = network.train_ours(network.STEPS_NET, Backends().resolve("cpu"), "cpu", torch.float64)
    assert set(chosen.values()) == {"compiled"} | ({"library"} if backend == "fastest" else set())
    assert network._off(ours, reference) < network.LOSS_BOUND
    for name, w in reference.weights.items():
        assert network.relative(ours.weights[name], w) < network.WEIGHT_BOUND
