import functools
import html
import importlib
import inspect
import json
import re
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from alexnet import layers
from alexnet.errors import UserError
from alexnet.gradcheck import lesson, network, rules, run
from alexnet.gradcheck.cases import Rounding, cotangent, gapped, separated
from alexnet.gradcheck.checks import Result, largest_share, results_of, slope
from alexnet.gradcheck.config import CheckGradients
from alexnet.gradcheck.derivation import _prose, latex
from alexnet.gradcheck.mutants import Kill, Mutant, mutate, try_to_kill
from alexnet.gradcheck.mutants_of_reference import MUTANTS
from alexnet.gradcheck.operations import ALL, CONV2D, LOCAL_RESPONSE_NORM, RELU
from alexnet.layers import Backends
from alexnet.layers.backend import OPERATIONS
from alexnet.layers.local_response_norm import local_response_norm_backward
from alexnet.layers.pair import PAIRS
from alexnet.layers.relu import relu_backward
from alexnet.system import environment

GOLDEN = Path(__file__).parents[1] / "golden" / "ten_steps.json"
REFERENCE = Backends().resolve("cpu")
TYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _one_thread():
    """Small tensors: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_operation_is_missing():
    assert {operation.name for operation in ALL} == set(OPERATIONS)
    for operation in ALL:
        assert {"ordinary", "awkward", "paper"} <= {case.kind for case in operation.cases}
        assert len({case.name for case in operation.cases}) == len(operation.cases)


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.name)
def test_every_check_of_the_ordinary_cases_holds(operation):
    for case in operation.cases:
        if case.kind == "ordinary":
            results = list(results_of(operation, case, "reference", "cpu", TYPES))
            assert {r.check for r in results} == {"autograd", "differences", "identity"}
            assert [r for r in results if not r.passed] == []


# ---- mutants --------------------------------------------------------------------------------------------------


def one_third():
    return 1 / 3


def test_a_mutant_runs_wherever_the_function_was_imported_and_nowhere_afterwards():
    modules = [importlib.import_module(f"alexnet.layers.{name}") for name in ("relu", "relu_lrn_pool")]
    backwards = [*(module.relu_backward for module in modules), PAIRS["relu", "reference"].backward]
    x = torch.tensor([-1.0, 2.0], requires_grad=True)

    def gradients():
        (by_autograd,) = torch.autograd.grad(layers.relu(x).sum(), x)
        return [by_autograd.tolist(), *(backward(torch.ones(2), x).tolist() for backward in backwards)]

    with mutate(relu_backward, "return dy", "return 5 * dy"):
        assert gradients() == [[0, 5]] * 4
    assert gradients() == [[0, 1]] * 4


def test_the_shipped_code_is_back_after_an_error():
    with pytest.raises(ZeroDivisionError), mutate(one_third, "1 / 3", "1 / 0"):
        one_third()
    assert one_third() == 1 / 3


def test_a_traceback_shows_the_mutated_line():
    with pytest.raises(ZeroDivisionError) as error, mutate(one_third, "1 / 3", "1 / 0"):
        one_third()
    *_, last = traceback.extract_tb(error.value.__traceback__)
    assert last.line == "return 1 / 0"
    assert "test_gradients.one_third: 1 / 3 -> 1 / 0" in last.filename


@pytest.mark.parametrize(("old", "times"), [("1 / 4", 0), ("r", 3)])
def test_a_replacement_must_match_exactly_once(old, times):
    with pytest.raises(ValueError, match=f"'{old}' stands {times} times in test_gradients.one_third"):
        mutate(one_third, old, "0")


def test_the_wrapped_function_of_a_decorator_is_changed():
    @functools.cache
    def doubled(x):
        return 2 * x

    with mutate(doubled, "2 * x", "3 * x"):
        assert doubled(1) == 3


def test_two_changes_of_one_function_go_into_one_mutant():
    both = mutate(one_third, "1 /", "2 /", "3", "4")
    with both:
        assert one_third() == 0.5
        with pytest.raises(RuntimeError, match="one_third is mutated already"):
            both.__enter__()
    assert one_third() == 1 / 3


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.where}: {mutant.name}")
def test_mutant_is_killed(mutant):
    assert try_to_kill(mutant).killed_by
    assert all(change.function.__code__ is change.original for change in mutant.changes)


def test_there_are_mutants_of_every_operation():
    assert {mutant.where for mutant in MUTANTS} == {*OPERATIONS, *rules.RULES}
    assert len({(mutant.where, mutant.name) for mutant in MUTANTS}) == len(MUTANTS) >= 30


def test_a_wrong_gradient_flattens_the_curve():
    case = LOCAL_RESPONSE_NORM.cases[0]
    with mutate(local_response_norm_backward, "return cast(", "return (1 + 1e-6) * cast("):
        (found,) = [
            r
            for r in results_of(LOCAL_RESPONSE_NORM, case, "reference", "cpu", TYPES[:1])
            if r.check == "differences"
        ]
    assert not found.passed
    assert slope(found.curve) < 1.9


def test_slope_of_a_square_is_two():
    assert slope([(h, 3 * h**2) for h in (1e-1, 1e-2, 1e-3)]) == pytest.approx(2)


def test_rounding_bound_is_tight_enough_for_one_wrong_bit():
    """A copy may not be rounded at all; a sum of 100 products in float32 may be off by 100 half-epsilons."""
    one = torch.ones(1, dtype=torch.float64)
    assert Rounding(one * 0, 0, 0).bound(torch.float32).item() == 0
    assert Rounding(one, 100, 0).bound(torch.float32).item() == pytest.approx(100 * 2**-24, rel=1e-4)
    assert Rounding(one, 0, 1).bound(torch.bfloat16).item() == pytest.approx(2**-8, rel=1e-4)
    with mutate(relu_backward, "return dy", "return (1 + 2**-23) * dy"):
        failed = [r for r in results_of(RELU, RELU.cases[0], "reference", "cpu", TYPES) if not r.passed]
    assert "float32" in {r.dtype for r in failed}


def test_nan_fails():
    nan = Result("relu", "reference", "cpu", "float64", "", "", "autograd", float("nan"), 1.0)
    assert not nan.passed
    assert nan.share == float("inf")  # and the worst of any group
    ones = torch.ones(2, dtype=torch.float64)
    assert not largest_share(torch.tensor([float("nan"), 1.0]), ones, ones) <= 1


def test_inputs_are_the_same_every_time_and_cotangents_never_contiguous():
    for case in CONV2D.cases[:2]:
        assert all(torch.equal(a, b) for a, b in zip(case.inputs(), case.inputs(), strict=True))
    dy = cotangent(torch.empty(3, 4))
    assert not dy.is_contiguous()
    assert dy.unique().numel() == 12
    assert torch.equal(gapped(dy), dy)


def test_separated_windows_have_one_clear_winner():
    x = separated(2, 3, 9, 11)(torch.Generator().manual_seed(0))
    top = x.abs().unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).sort(-1, descending=True).values
    assert (top[..., 0] / top[..., 1]).min() > 1.2
    assert x.min() < 0 < x.max()


# ---- the network ----------------------------------------------------------------------------------------------


def test_ten_steps_are_the_native_networks_and_the_stored_ones():
    results = network.step_results("ten steps", network.STEPS_NET, REFERENCE, "cpu", both_types=True)
    losses, weights, float32 = results
    assert losses.passed
    assert weights.passed
    assert 0 < float32.value < 1e-5  # another type, and so another number
    stored = json.loads(GOLDEN.read_text())["losses"]
    torch.testing.assert_close([loss for _, loss in losses.curve], stored, rtol=1e-10, atol=0)


def test_ten_steps_kill_a_mutant_of_a_layer_and_one_of_a_rule():
    wrong = [m for m in MUTANTS if m.name in ("tower boundary ignored in the backward", "decay on biases")]
    assert len(wrong) == 2
    native = network.train_native(network.STEPS_NET, "cpu").losses
    for mutant in wrong:
        with mutant.in_place():
            ours = network.train_ours(network.STEPS_NET, REFERENCE, "cpu", torch.float64).losses
        assert max(abs(a - b) / b for a, b in zip(ours, native, strict=True)) > 1e-8


def test_the_ten_steps_use_every_switch():
    net = network.network(network.STEPS_NET, REFERENCE, "cpu", torch.float64)
    described = repr(net)
    for part in (
        "order=lrn_pool_relu, ",
        "SameMapNorm",
        "LocalResponseNorm",
        "groups=2",
        "ties=all",
        "mask_only",
    ):
        assert part in described


def test_whole_network_along_random_directions_and_every_parameter():
    results = list(network.network_results("small", network.STEPS_NET, REFERENCE, "cpu"))
    assert [r for r in results if not r.passed] == []
    assert {r.what for r in results if r.check == "parameters"} > {"conv1.weight", "fc8.bias", "images"}
    with mutate(relu_backward, "return dy", "return (1 + 1e-4) * dy"):
        failed = {
            r.check
            for r in network.network_results("small", network.STEPS_NET, REFERENCE, "cpu")
            if not r.passed
        }
    assert failed == {"directions", "parameters"}


# ---- the run --------------------------------------------------------------------------------------------------


def proven(tmp_path, **options):
    """What a run finds and prints, without its page: pictures take seconds."""
    lines: list[str] = []
    with mock.patch.dict(sys.modules, {"alexnet.gradcheck.lesson": None}):
        proof = run.prove(CheckGradients(output_dir=str(tmp_path), **options), lines.append)
    return proof, "\n".join(lines)


def test_one_operation_prints_a_narrow_table_and_writes_json(tmp_path):
    proof, text = proven(tmp_path, operations=["relu", "tanh"], mutants=True)
    assert proof.passed
    assert max(len(line) for line in text.splitlines() if str(tmp_path) not in line) <= 100
    assert re.search(r"tanh +reference +cpu +5 +2\.000", text)
    assert "mutants, 0 survived" in text
    # In a place of its own: a part of the proof does not replace the whole.
    content = json.loads((tmp_path / "check_gradients" / "relu+tanh" / "results.json").read_text())
    assert content["passed"]
    assert {row["operation"] for row in content["results"]} == {"relu", "tanh"}
    assert all(row["share"] < 1 for row in content["results"])
    assert all(kill["killed"] and kill["killed_by"] for kill in content["kills"])


def test_the_row_of_every_mutant_fits_a_terminal():
    checks = ["autograd", "differences", "identity"]
    for m in MUTANTS:
        rule = m.where in rules.RULES
        kill = Kill(m.where, m.name, checks[:1] if rule else checks, "section 5 written out, with a drop")
        assert len(run.kill_row(kill)) <= 100
        assert m.name in run.kill_row(kill)


def test_a_failure_is_named_and_fails_the_run(tmp_path):
    with next(m for m in MUTANTS if m.name == "a leak in the backward only").in_place():
        proof, text = proven(tmp_path, operations=["relu"])
    assert not proof.passed
    assert "FAILED   relu, reference on cpu, float64, maps: differences" in text


def test_a_survivor_fails_the_run(tmp_path):
    harmless = Mutant("relu", "nothing changed", (mutate(relu_backward, "y <= 0", "y <= 0.0"),))
    with mock.patch.object(run, "MUTANTS", (harmless,)):
        proof, text = proven(tmp_path, operations=["relu"], mutants=True)
    assert not proof.failures
    assert not proof.passed
    assert re.search(r"relu: nothing changed +SURVIVED", text)


def test_what_cannot_be_checked_is_said_and_nothing_checked_is_no_proof(tmp_path):
    mixed = Backends(relu="native")
    _, text = proven(tmp_path, operations=["relu", "tanh"], backend=mixed)
    assert "skipped  relu, native" in text
    with pytest.raises(UserError, match="there is nothing to check: skipped  relu, native"):
        proven(tmp_path, operations=["relu"], backend=mixed)


def test_an_unknown_operation_is_refused():
    with pytest.raises(UserError, match=r"operations=\['foo'\]: foo must be one of linear, relu"):
        CheckGradients(operations=["foo"])


def test_full_asks_for_every_pair(monkeypatch):
    monkeypatch.setitem(PAIRS, ("relu", "compiled"), PAIRS["relu", "reference"])
    skipped: list[str] = []
    config = CheckGradients(full=True)
    assert run.backends_for("relu", config, "cpu", skipped)[:2] == ["reference", "compiled"]
    assert run.backends_for("relu", replace(config, full=False), "cpu", skipped) == ["reference"]


def test_rows_of_networks_and_rules_fit_a_terminal():
    mixed = REFERENCE | {"conv2d": "compiled"}
    rows = [run.result_row(r) for r in network.step_results("ten steps", network.STEPS_NET, REFERENCE, "cpu")]
    rows += [run.result_row(r) for r in rules.rule_results()]
    rows.append(run.result_row(network._result("code145, 224 px", mixed, "cuda", "directions", 1e-3, 1e-6)))
    assert max(map(len, rows)) <= 100 + len(" FAILED")
    assert rows[-1].endswith("FAILED")


def test_compiled_pairs_are_checked_in_every_type_where_it_matters_most():
    by_kind = {case.kind: case for case in CONV2D.cases}
    assert run._dtypes(by_kind["awkward"], "reference", False) == TYPES
    assert run._dtypes(by_kind["ordinary"], "compiled", False) == TYPES
    assert run._dtypes(by_kind["awkward"], "compiled", False) == TYPES[:1]
    assert run._dtypes(by_kind["paper"], "library", False) == TYPES[2:]
    assert run._dtypes(by_kind["awkward"], "compiled", True) == TYPES


# ---- the lesson -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    directory = tmp_path_factory.mktemp("lesson")
    lines: list[str] = []
    run.prove(
        CheckGradients(operations=["relu", "tanh"], mutants=True, output_dir=str(directory)), lines.append
    )
    path = directory / "check_gradients" / "relu+tanh" / "report.html"
    assert lines[-1] == f"report   {path}"
    return path.read_text()


def test_every_derivation_of_the_layer_files_stands_in_the_lesson(page):
    """The page holds no derivation of its own, and loses none: every line of every docstring, in order."""
    for operation in OPERATIONS:
        section = page.split(f'<h2 id="{operation}">')[1].split("<h2")[0]
        letters = re.sub(r"[^a-z]", "", html.unescape(re.sub(r"<[^>]+>", "", section)).lower())
        module = importlib.import_module(f"alexnet.layers.{operation}")
        for line in inspect.cleandoc(module.__doc__).splitlines()[2:]:
            words = re.findall(r"[a-z]{4,}", re.sub(r"alpha|beta|floor|\w+_", "", line.lower()))
            assert all(word in letters for word in words), line
    template = (Path(lesson.__file__).parent / "gradients.html").read_text()
    sections = template.split('{{ section("linear") }}')[1].split('<h2 id="network">')[0]
    assert "$$" not in sections


def test_a_formula_of_a_docstring_becomes_mathematics():
    assert latex("dw[o,i] = sum_n dy[n,o] x[n,i]") == r"dw_{o,i} = \sum _{n} dy_{n,o} x_{n,i}"
    assert _prose("with t = dy[c] s[c]^-beta and") == r"with t = $dy_{c}$ $s_{c}^{-\beta }$ and"
    assert latex("s[i]^(-beta-1) (2 alpha/n)") == r"s_{i}^{-\beta -1} \frac{2 \alpha }{n}"
    assert latex("∂y[c]/∂x[c] = dX' W*(c), else 0") == (
        r"\frac{\partial y_{c}}{\partial x_{c}} = dX^{\top} W^{*}(c), \text{ else } 0"
    )


def test_lesson_has_every_operation_with_its_formulas_and_pictures(page):
    for operation in OPERATIONS:
        section = page.split(f'<h2 id="{operation}">')[1].split("<h2")[0]
        assert "<math" in section
        assert "Not checked in this run" in section or "checks on" in section
    assert page.count("<svg") == 11
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.DOTALL)


def test_lesson_shows_what_was_measured_and_which_mutants_were_killed(page):
    section = page.split('<h2 id="tanh">')[1].split("<h2")[0]
    assert "slope 2.000" in section
    assert "1 - y for 1 - y^2" in section
    assert "0 survived" in page


def test_lesson_needs_no_network(page):
    assert not re.search(r"<(script|link|img|iframe)\b", page)
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert not re.search(r"url\((?!#)", page)


def test_a_failure_stands_in_the_lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(lesson, "pictures", lambda results: dict.fromkeys(figures, "<svg/>"))
    figures = re.findall(r'figure\("(\w+)"', (Path(lesson.__file__).parent / "gradients.html").read_text())
    missed = Result("relu", "reference", "cpu", "float64", "maps", "ordinary", "autograd", 1.0, 1e-10)
    results, survivor = [missed, replace(missed, value=0.0)], Kill("relu", "nothing changed", [], "")
    made = {"command": "", **environment(), "seconds": 1.0, "skipped": []}
    lesson.write_lesson(tmp_path / "page.html", results, [survivor], "", made)
    page = (tmp_path / "page.html").read_text()
    assert "1 mutants of the code were checked: 0 killed, 1 survived." in page
    section = page.split('<h2 id="relu">')[1].split("<h2")[0]
    assert re.search(r'<td>maps</td><td class="number">1.0e\+00</td>.*"number failed"', section)
    assert '<td>nothing changed</td><td><span class="failed">survived</span></td>' in section


def test_checks_need_no_extras(tmp_path):
    proof, text = proven(tmp_path, operations=["relu"])
    assert proof.passed
    assert "skipped  report.html" in text
    assert not list(tmp_path.rglob("report.html"))
