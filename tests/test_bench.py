"""The benchmark: who is timed when, what is compared with what, and that nothing lost is left out."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

from alexnet.allocator import keep_freed_memory
from alexnet.bench import Benchmark, alone, data, layers, networks, results, steps
from alexnet.bench.results import describe, finish, headlines, markdown, save
from alexnet.bench.timing import Contestant, Kind, Machine, Row, interleave
from alexnet.data.module import Resident
from alexnet.errors import UserError
from alexnet.layers import relu
from alexnet.model import layer_table

SMALL = {
    "image_px": 40,
    "channels": [8, 8, 8, 8, 8],
    "hidden": [16, 16],
    "kernel_size": [7, 5, 3, 3, 3],
    "stride": [2, 1, 1, 1, 1],
}
MACHINE = Machine(1e9, {"float32": 1e9, "bfloat16": 1e9})


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(networks.MODELS, "paper", SMALL)
    monkeypatch.setattr(networks, "CLASSES", 5)


def test_contestants_take_turns_and_the_first_call_is_timed_apart():
    calls = []
    contestants = [Contestant(name, Kind.ours, partial(calls.append, name)) for name in "abc"]
    for c in contestants:
        c.run = lambda name=c.name: calls.append(name) or 0.5  # its own clock: half a second
    rows = interleave("layers", "row", "float32", contestants, rounds=2, images=10, bound_ms=125.0)
    assert "".join(calls) == "abc" + "abc" + "abcabc"  # compile, guess the repeats, two rounds
    assert [(r.ms, r.rounds, r.images_per_second, r.share_of_bound) for r in rows] == [(500, 2, 20, 0.25)] * 3


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
def test_the_stock_network_is_the_same_network():
    assert networks.check("paper", "reference", "float32", "cpu") < 1e-5
    assert sum(p.numel() for p in networks.stock_network(networks.model_config("paper")).parameters()) == sum(
        row.parameters for row in layer_table(networks.model_config("paper"))
    )


@pytest.mark.usefixtures("small")
def test_a_wrong_gradient_stops_the_benchmark(monkeypatch):
    stock_network = networks.stock_network

    def without_norms(config):
        return torch.nn.Sequential(
            *(m for m in stock_network(config) if not isinstance(m, torch.nn.LocalResponseNorm))
        )

    monkeypatch.setattr(networks, "stock_network", without_norms)
    with pytest.raises(AssertionError, match="nothing is timed"):
        networks.check("paper", "reference", "float32", "cpu")


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_layer_stops_the_benchmark(monkeypatch):
    def doubled(x, backend):
        y = relu(x, backend=backend)
        return y if backend != "compiled" else y * 1.1

    x = torch.randn(2, 3, 4, 4)
    layers.check_layer("relu", lambda x, backend: relu(x, backend=backend), x)
    with pytest.raises(AssertionError, match="nothing is timed"):
        layers.check_layer("relu", doubled, x)


def test_only_the_rows_that_are_asked_for():
    config = Benchmark(only="weight gradient", dtypes=["float32"], batch=2, rounds=1)
    assert steps.combinations(config, "step") == steps.combinations(config, "memory") == []
    assert not list(data.data_rows(config)) + list(data.end_to_end_rows(config))
    found = {row.row for row in layers._convolution_rows(config, MACHINE, "float32", "conv5")}
    assert found == {"conv5 weight gradient"}


def test_a_name_that_no_row_has_is_refused_and_replaces_no_results(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "measured_machine", lambda *_: MACHINE)
    with pytest.raises(UserError, match="only=nothing is in the name of no row of suite=data"):
        results.benchmark(Benchmark(suite="data", only="nothing", output_dir=str(tmp_path)))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_step_runs_and_learns(dtype, monkeypatch):
    monkeypatch.setattr(networks, "RATE", 1e-3)
    monkeypatch.setitem(networks.MODELS, "paper", {**SMALL, "dropout": 0.0})
    given = networks.task("paper", 4, dtype, "cpu")
    eager = [c for c in networks.stock(given, quick=False) if "compiled" not in c.name]
    assert len(eager) == (2 if dtype == "float32" else 3)
    for contestant in [networks.ours(given, "reference"), *eager]:
        first, *_, last = (float(contestant.run()) for _ in range(5))
        assert last < first


def test_multiply_adds_leave_out_the_gradient_of_the_image():
    config = networks.model_config("paper")
    assert networks.multiply_adds(config) == 3 * 724_406_816 - 105_415_200


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
        ({"dtypes": ["float16"]}, "float32 and bfloat16"),
        ({"models": []}, "paper and mini"),
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
