"""The compiled pairs under the checks of every gradient: their mutants are killed, ten steps are the same."""

import pytest
import torch

from alexnet.gradcheck import network
from alexnet.gradcheck.checks import results_of
from alexnet.gradcheck.mutants import Mutant, mutate, try_to_kill
from alexnet.gradcheck.mutants_of_compiled import MUTANTS_OF_COMPILED
from alexnet.gradcheck.operations import by_name
from alexnet.layers import Backends
from alexnet.layers.backend import OPERATIONS
from alexnet.layers.compiled import pointwise
from alexnet.layers.compiled.on_cuda import ON_CUDA
from alexnet.layers.pair import PAIRS
from alexnet.layers.relu import relu_backward

# Compiled as well: they take a second.
COMPILED = [m for m in MUTANTS_OF_COMPILED if m.name == "y >= 0 for y > 0: never closed"]


@pytest.mark.parametrize("mutant", MUTANTS_OF_COMPILED, ids=lambda m: f"{m.where}, {m.backend}: {m.name}")
def test_mutant_is_killed(mutant):
    """The code of the compiled pairs, run by torch without its compiler."""
    assert try_to_kill(mutant).killed_by


@pytest.mark.parametrize("mutant", COMPILED, ids=lambda m: f"{m.where}, {m.backend}: {m.name}")
def test_mutant_is_killed_compiled(mutant):
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert try_to_kill(mutant, compiled=True).killed_by
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


@pytest.mark.parametrize("operation", ON_CUDA)
def test_checks_of_the_small_cases_hold_for_the_cuda_pairs_uncompiled(operation, monkeypatch):
    monkeypatch.setitem(PAIRS, (operation, "compiled"), ON_CUDA[operation])
    assert failures(operation, "compiled", (torch.float64, torch.bfloat16)) == []


@pytest.mark.parametrize(
    ("operation", "backend"), sorted({(m.where, m.backend) for m in MUTANTS_OF_COMPILED})
)
def test_every_check_of_the_small_cases_holds(operation, backend):
    """In every type that a mutant runs in, and without the compiler as there: what the checks find is the mutant."""
    dtypes = {m.dtype for m in MUTANTS_OF_COMPILED if (m.where, m.backend) == (operation, backend)}
    assert failures(operation, backend, tuple(dtypes)) == []


def failures(operation, backend, dtypes):
    """Of the small cases, uncompiled."""
    checked = by_name(operation)
    with torch.compiler.set_stance("force_eager"):
        results = [
            r for case in checked.small_cases for r in results_of(checked, case, backend, "cpu", dtypes)
        ]
    assert {r.case for r in results} == {case.name for case in checked.small_cases}
    return [r for r in results if not r.passed]


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", [name for name in OPERATIONS if name != "linear"]
)  # three plain products
def test_every_check_of_an_awkward_case_holds_compiled(operation):
    """One case, since a case costs seconds of compilation: on many others layers/test_compiled.py compares with the
    reference, and scripts/check_gradients.py backend=fast proves all of them."""
    checked = by_name(operation)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = list(results_of(checked, checked.small_cases[-1], "compiled", "cpu", (torch.float64,)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert [r for r in results if not r.passed] == []


def test_a_mutant_that_changes_nothing_survives():
    change = mutate(pointwise.linear_backward, "dy_NO.T", "dy_NO.clone().T")
    assert not try_to_kill(Mutant("linear", "none", (change,), "compiled")).killed_by


@pytest.mark.slow
def test_a_compiled_mutant_runs_and_the_shipped_code_runs_again_afterwards():
    """The compiler keeps what it made of either version: neither may be served for the other."""
    dy, y = torch.ones(2), torch.tensor([-1.0, 2.0])
    change = mutate(pointwise._relu_gradient, "dy.masked_fill(y <= 0, 0)", "dy * (y >= 0) * 5")
    inlined = mutate(relu_backward, "return dy", "return 7 * dy")
    assert pointwise.relu_backward(dy, y).tolist() == [0, 1]
    for changes, slope in (((change,), 5), ((inlined,), 7)):
        with Mutant("relu", "", changes, "compiled").in_place():
            assert pointwise.relu_backward(dy, y).tolist() == [0, slope]
        assert pointwise.relu_backward(dy, y).tolist() == [0, 1]


def test_there_are_mutants_of_every_compiled_pair():
    covered = {(mutant.where, mutant.backend) for mutant in MUTANTS_OF_COMPILED}
    assert covered == {(operation, "compiled") for operation in OPERATIONS} | {("conv2d", "library")}
    assert len({(m.where, m.backend, m.name) for m in MUTANTS_OF_COMPILED}) == len(MUTANTS_OF_COMPILED)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fast", "fastest"])
def test_ten_steps_are_those_of_the_reference(backend):
    """Bounds as between reference and torch: LOSS_BOUND, and WEIGHT_BOUND of each tensor's norm."""
    chosen = Backends(default=backend).resolve("cpu")
    ours = network.train_ours(network.STEPS_NET, chosen, "cpu", torch.float64)
    reference = network.train_ours(network.STEPS_NET, Backends().resolve("cpu"), "cpu", torch.float64)
    assert set(chosen.values()) == {"compiled"} | ({"library"} if backend == "fastest" else set())
    assert network.loss_error(ours, reference) < network.LOSS_BOUND
    for name, w in reference.weights.items():
        assert network.relative(ours.weights[name], w) < network.WEIGHT_BOUND
