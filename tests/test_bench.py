"""The benchmark: who is timed when, what is compared with what, and that nothing lost is left out."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from alexnet.bench import alone, ceilings, check, data, gpu, layers, networks, results, steps
from alexnet.bench.config import Benchmark, Suite
from alexnet.bench.results import describe, finish, headlines, markdown, save
from alexnet.bench.timing import Bound, Contestant, Kind, Machine, Row, interleave
from alexnet.cli import typed
from alexnet.data.config import Resident
from alexnet.errors import UserError
from alexnet.gradcheck.mutants_of_compiled import MUTANTS_OF_COMPILED
from alexnet.layers import ReluLrnPool
from alexnet.layers.backend import PAIRS, Pair, pair_for
from alexnet.model import ModelConfig, layer_table
from alexnet.system import keep_freed_memory

SMALL = {
    "image_px": 40,
    "channels": [8, 8, 8, 8, 8],
    "hidden": [16, 16],
    "kernel_size": [7, 5, 3, 3, 3],
    "stride": [2, 1, 1, 1, 1],
}
LIKE_2012 = {**SMALL, "same_map_norm": True, "order1": "lrn_pool_relu", "dropout_mode": "inverted"}
MACHINE = Machine({"copy": 1e9, "float32": 1e9, "bfloat16": 1e9})


@pytest.fixture
def small(monkeypatch):
    small_models(monkeypatch)


def small_models(monkeypatch, **changes):
    models = {"paper": SMALL, "code145": LIKE_2012}
    monkeypatch.setattr(
        networks,
        "model_config",
        lambda name: typed(ModelConfig, {**models[name], "num_classes": 5, **changes}),
    )


def test_contestants_take_turns_and_the_first_call_is_timed_apart():
    calls = []
    contestants = [Contestant(name, Kind.ours, partial(calls.append, name)) for name in "abc"]
    for c in contestants:
        c.run = lambda name=c.name: calls.append(name) or 0.5  # its own clock: half a second
    bound = Bound(MACHINE, "float32", 0.125e9)
    rows = interleave("layers", "row", "float32", contestants, rounds=2, images=10, bound=bound)
    assert "".join(calls) == "abc" + "abc" + "abcabc"  # compile, guess the repeats, two rounds
    assert [(r.ms, r.rounds, r.images_per_second, r.share_of_bound) for r in rows] == [(500, 2, 20, 0.25)] * 3


def test_the_bound_is_measured_before_between_and_after_the_rounds_and_the_best_rate_counts():
    calls, machine = [], Machine({})
    machine.calls["copy"] = [(lambda: calls.append("bound"), 1.0)]
    contestant = Contestant("", Kind.ours, lambda: calls.append("ours") or 0.5)
    (row,) = interleave("layers", "row", "float32", [contestant], 2, bound=Bound(machine, "copy", 1.0))
    assert [name for name, next in zip(calls, [*calls[1:], ""], strict=True) if name != next] == [
        *("ours", "bound", "ours", "bound", "ours", "bound")
    ]
    assert row.bound_ms == pytest.approx(1e3 / machine.rates["copy"])
    assert row.bound_ms < row.ms


def test_one_that_is_faster_than_its_bound_says_so():
    contestant = Contestant("ours", Kind.ours, lambda: 0.1)
    rows = interleave("step", "row", "float32", [contestant], 1, bound=Bound(MACHINE, "float32", 0.12e9))
    assert rows[0].ms == 100
    assert "- row, float32, ours: at 120 % of the bound" in markdown(rows, about())


def test_after_the_deadline_nothing_begins_and_what_has_begun_ends():
    calls = []
    contestants = [Contestant("ours", Kind.ours, lambda: calls.append(1))]
    (row,) = interleave("gpu", "row", "float32", contestants, rounds=2, deadline=0.0)
    assert not calls
    assert row.note == "not run: the time was used up"


def test_ceilings_are_measured_in_several_shapes_and_layouts(monkeypatch):
    monkeypatch.setattr(
        ceilings, "candidates", lambda *_: [(lambda: None, work) for work in (1.0, 1e12, 1e6)]
    )
    machine = ceilings.measured_machine(["float32"], "cpu")
    assert [work for _, work in machine.calls["float32"]] == [1e12, 1e6]  # the best are measured again
    assert machine.rates["copy"] > 0


def test_the_median_counts_and_the_spread_is_kept():
    seconds = iter([9.0, 9.0, 0.3, 0.1, 0.2])
    (row,) = interleave("data", "", "", [Contestant("", Kind.ours, lambda: next(seconds))], rounds=3)
    assert (row.ms, row.ms_low, row.ms_high) == pytest.approx((200, 100, 300))


def test_one_that_refuses_stays_with_what_it_said():
    def refuse():
        raise NotImplementedError("no bfloat16\nsecond line")

    contestants = [Contestant("stock", Kind.baseline, refuse), Contestant("ours", Kind.ours, lambda: 0.1)]
    stock, ours = interleave("layers", "norm", "bfloat16", contestants, rounds=1)
    assert math.isnan(stock.ms)
    assert stock.note == "NotImplementedError: no bfloat16"
    assert ours.ms == 100
    assert "no bfloat16" in markdown([stock, ours], about())


def about():
    return describe(Benchmark(dtypes=["float32"]), MACHINE, tuned=True)


def rows():
    def row(suite, contestant, kind, ms, peak=float("nan")):
        return Row(suite, "row", "float32", contestant, kind, 8, ms, ms, ms, 5, 1.0, 2.0, peak)

    return [
        row("step", "fast", Kind.ours, 10.0),
        row("step", "stock eager", Kind.baseline, 30.0),
        row("step", "stock compiled", Kind.baseline, 5.0),
        row("step", "stock eager", Kind.as_run, 90.0),
        row("step", "copy", Kind.yardstick, 1.0),
        row("memory", "fast", Kind.ours, 10.0, peak=100.0),
        row("memory", "stock eager", Kind.baseline, 1.0, peak=250.0),
    ]


def test_the_headline_is_against_the_best_baseline_and_a_loss_is_shown():
    step, memory = headlines(rows())
    assert (step["ratio"], step["baseline"]) == (0.5, "stock compiled")
    assert (step["ratio_eager"], step["ratio_as_run"]) == (3.0, 9.0)
    assert memory["ratio"] == 2.5  # of memory, not of time
    assert "| 0.50 | stock compiled | 3.00 |" in markdown(rows(), about())


def test_every_form_of_the_results_is_written(tmp_path):
    save(rows(), about(), tmp_path)
    finish(rows(), about(), tmp_path)
    told = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)  # nan is no JSON
    assert len(told["rows"]) == len((tmp_path / "rows.csv").read_text().splitlines()) - 1 == len(rows())
    assert told["about"]["threads"] == torch.get_num_threads()
    assert (tmp_path / "table.md").read_text().startswith(told["about"]["processor"])
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["paper", "code145"])
def test_the_stock_network_is_the_same_network(model):
    assert check.check_network(model, "reference", "cpu") < 1e-5
    config = networks.model_config(model)
    stock = networks.stock_network(config).parameters()
    assert sum(p.numel() for p in stock) == sum(row.parameters for row in layer_table(config))


@pytest.mark.usefixtures("small")
def test_a_wrong_stock_network_stops_the_benchmark(monkeypatch):
    stock_network = networks.stock_network

    def without_norms(config):
        return torch.nn.Sequential(
            *(m for m in stock_network(config) if not isinstance(m, torch.nn.LocalResponseNorm))
        )

    monkeypatch.setattr(check, "stock_network", without_norms)
    with pytest.raises(AssertionError, match="nothing is timed"):
        check.check("paper", "reference", "float32", "cpu")


@pytest.fixture
def uncompiled():
    """The compiled pairs as plain Python: the check is tried here, not the compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("small", "uncompiled")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["paper", "code145"])
@pytest.mark.parametrize("backend", ["fast", "fastest"])
def test_right_layers_pass(model, backend, dtype):
    worst = check.check(model, backend, dtype, "cpu")
    assert worst < check.BOUND[dtype] / 2  # the noise is well below what is refused


OPERATIONS = (
    *("conv2d", "relu_lrn_pool", "local_response_norm", "same_map_norm", "max_pool2d"),
    *("relu", "linear", "dropout", "cross_entropy"),
)


@pytest.mark.usefixtures("small", "uncompiled")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_result_off_by_a_thirtieth_is_refused_in_bfloat16(operation, where, monkeypatch):
    right = pair_for(operation, "compiled")

    def off(function):
        def wrong(*operands):
            results = function(*operands)
            if where == "forward" or isinstance(results, tuple):  # y, or every gradient
                first, *rest = results
                rest = rest if where == "forward" else [g if g is None else g * 31 / 30 for g in rest]
                return first if first is None else first * 31 / 30, *rest
            return results * 31 / 30

        return wrong

    wrong = right._replace(**{where: off(getattr(right, where))})
    monkeypatch.setitem(PAIRS, (operation, "compiled"), wrong)
    with pytest.raises(AssertionError, match="nothing is timed"):
        check.check("code145", "fast", "bfloat16", "cpu")


# Mutants that need what the network has not: an even window, padded pools, single losses, ... say so (`shows`).
# Those that show on the shapes of a network; the others need a case of their own. Networks here let all tied maxima
# win, so a mutant of ties="first" shows in none.
OF_TIES_FIRST = ("places counted from 1", "winner's row and column exchanged")
# Mistakes that show only in shapes and options which the benchmark does not time.
OF_OTHER_CASES = (
    "every slice has the first rows' mask", "border of windows on the other side", "the last of the tied maxima wins",
    "nine places to a byte", "the search begins one place late", "tower boundary ignored",
    "even window not reflected", "the ReLU's mask forgotten, paper's order", "towers ignored in the backward",
    "closed windows have a winner, 2012 order", "tap one row off", "no zeros between the rows",
    "no zeros between the images", "blocks' rows and columns exchanged", "added taps kept, first taps dropped",
    "kernel filled up at the wrong end", "the other tower's columns", "smoothing forgotten in the backward",
    "a batch's losses weighed by the first", "logarithm added to the largest logit",
)  # fmt: skip
SHARED = ("linear",)  # the compiled pair's backward is the reference's own, which is the oracle here
PLANTED = [
    m
    for m in MUTANTS_OF_COMPILED
    if m.pair is None
    and m.where in OPERATIONS
    and m.name not in (*OF_TIES_FIRST, *OF_OTHER_CASES)
    and m.where not in SHARED
    and not m.name.startswith("by maps")  # of channels-first tensors; these networks are channels-last
]


@pytest.mark.usefixtures("small", "uncompiled")
@pytest.mark.parametrize("mutant", PLANTED, ids=lambda m: f"{m.where}: {m.name}")
def test_a_planted_mutant_is_refused_in_bfloat16(mutant):
    backend = "fastest" if mutant.backend == "library" else "fast"
    with mutant.in_place(), pytest.raises(AssertionError, match="nothing is timed"):
        check_both(backend)


def check_both(backend):
    """Either order of the block, and the parts that a same-map norm leaves of it."""
    for model in ("paper", "code145"):
        check.check(model, backend, "bfloat16", "cpu")


def test_windows_whose_winner_rounding_could_change_are_left_out():
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 0, 0], x[0, 0, 1, 1] = 100.0, 99.9  # rounded: equal
    x[0, 0, :, 4] = torch.tensor([-100.0, 0.0, 100.0])
    clear = check.clear_windows(ReluLrnPool(1, alpha=0.0, k=1.0), x)
    assert clear.flatten().tolist() == [0.0, 1.0]


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_norm_stops_the_row():
    x, right = torch.randn(2, 8, 9, 9), ReluLrnPool(5, 0.3, backend="native")
    layers._check_norms("block", {"reference": ReluLrnPool(5, 0.3)}, right, x, "bfloat16")
    with pytest.raises(AssertionError, match="block, reference, bfloat16: results differ"):
        layers._check_norms("block", {"reference": ReluLrnPool(5, 0.25)}, right, x, "bfloat16")


def test_only_the_rows_that_are_asked_for():
    config = Benchmark(only="weight gradient", dtypes=["float32"], batch=2, rounds=1)
    assert steps.combinations(config, "step") == steps.combinations(config, "memory") == []
    assert not list(data.data_rows(config)) + list(data.end_to_end_rows(config))
    found = {row.row for row in layers._convolution_rows(config, MACHINE, "float32", "conv5")}
    assert found == {"conv5 weight gradient"}


def test_a_name_that_no_row_has_is_refused_and_replaces_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(ceilings, "measured_machine", lambda *_: MACHINE)
    with pytest.raises(UserError, match="only=nothing is in the name of no row of suite=data"):
        results.benchmark(Benchmark(suite="data", only="nothing", output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_step_runs_and_learns(dtype, monkeypatch):
    monkeypatch.setattr(networks, "RATE", 1e-3)
    small_models(monkeypatch, dropout=0.0)
    given = networks.task("paper", 4, dtype, "cpu")
    names = [name for name in networks.STOCK[given.dtype] if "compiled" not in name]
    eager = [networks.stock_named(name, given) for name in names]
    assert len(eager) == (2 if dtype == "float32" else 3)
    for contestant in [networks.ours(given, "reference"), *eager]:
        first, *_, last = (float(contestant.run()) for _ in range(5))
        assert last < first


def test_multiply_adds_leave_out_the_gradient_of_the_image():
    config = networks.model_config("paper")
    assert networks.multiply_adds(config) == 3 * 724_406_816 - 105_415_200


def test_networks_are_those_of_conf():
    assert networks.model_config("mini").hidden == [2048, 2048]
    assert networks.model_config("tiny").same_map_norm
    assert networks.model_config("code145").classes == 1000


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_name_of_the_gpu_suite_is_a_contestant_and_no_name_stands_twice(dtype):
    given = networks.task("paper", 2, dtype, "cpu")
    names = gpu.names(dtype, quick=False)
    assert len(set(names)) == len(names)
    for name in names:
        if networks.TRITON_NORMS in name:  # only on CUDA
            continue
        assert networks.contestant_named(name, given).kind == gpu.kind_of(name), name


@pytest.mark.slow
@pytest.mark.usefixtures("small", "uncompiled")
def test_what_was_not_checked_says_so_and_what_is_wrong_is_not_timed_on_a_gpu(monkeypatch):
    assert "NOT CHECKED" in markdown(rows(), {**about(), "checked": False})
    given = networks.task("paper", 2, "float32", "cpu")
    right = pair_for("relu", "reference")
    monkeypatch.setitem(PAIRS, ("relu", "reference"), Pair(right.forward, lambda dy, y: dy))
    for checked in (True, False):
        step = gpu.late("reference", given, "paper", "float32", checked)
        (row,) = interleave("gpu", "row", "float32", [Contestant("reference", Kind.ours, step)], rounds=1)
        assert ("nothing is timed" in row.note) == checked == math.isnan(row.ms)


@pytest.mark.usefixtures("small")
def test_a_contestant_alone_tells_its_times_and_its_peak():
    order = {"model": "paper", "batch": 4, "dtype": "float32", "contestant": "stock eager"}
    told = alone.measure(**order, rounds=2, device="cpu", threads=None, tuned_allocator=False)
    assert told["ms_low"] <= told["ms"] <= told["ms_high"]
    assert told["peak_mib"] >= 0  # a net this small can fit into memory that building it has freed


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_the_same_images_as_a_store_and_as_files(tmp_path):
    files = data.Files(tmp_path, images=20, px=64)
    epoch = data.our_batches(files, 56, 8, Resident.never)
    assert [x.shape for x, _ in epoch()] == [(8, 3, 56, 56), (8, 3, 56, 56), (4, 3, 56, 56)]
    assert len(data.jpeg_loader(files, 56, 8).dataset) == len(files.store) == 20


def test_convolutions_are_those_of_the_paper():
    table = {row.name: row for row in layer_table(networks.model_config("paper"))}
    for name, (C, O, _, kernel, *_, groups) in layers.CONVOLUTIONS.items():  # noqa: E741
        assert table[name].parameters == O * (C // groups * kernel**2 + 1)


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"batch": 0}, "batch=0"),
        ({"dtypes": ["float16"]}, "must be some of float32, bfloat16, tf32"),
        ({"models": ["vgg"]}, "must be some of caffe, code145"),
        ({"dtypes": ["tf32"]}, "need a GPU"),
        ({"suite": Suite.gpu}, "need a GPU"),
        ({"threads": 100_000}, "threads=100000 must be at most"),
        ({"device": "tpu"}, "device=tpu: there is no such device here"),
    ],
)
def test_a_wrong_setting_is_refused(choice, said):
    with pytest.raises(UserError, match=said):
        Benchmark(**choice)


def test_quick_is_small_and_every_suite_is_in_all():
    assert (Benchmark(quick=True).batch_of("mini"), Benchmark(quick=True).interleaved_rounds) == (16, 3)
    assert (Benchmark().batch_of(), Benchmark().batch_of("mini"), Benchmark().interleaved_rounds) == (
        64,
        256,
        5,
    )
    assert len(Benchmark().suites) == 5


@pytest.mark.skipif(not Path("/lib/x86_64-linux-gnu/libc.so.6").exists(), reason="needs glibc")
def test_glibc_can_keep_freed_memory():
    assert keep_freed_memory()
