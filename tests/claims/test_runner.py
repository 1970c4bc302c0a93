"""Jobs, checks, estimates, resume: what happens around the training of a hundred runs."""

import contextlib
import csv
import dataclasses
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from tests.claims.conftest import REDUCED, directory, reduced

from alexnet.claims import jobs, runner
from alexnet.claims.config import Reproduce, Scale
from alexnet.claims.jobs import State, check, choose, claims_of, jobs_of, train_commands
from alexnet.claims.measures import Want
from alexnet.claims.report import training_seconds
from alexnet.claims.runner import Progress, Sizes, Speed, measure_speed, reproduce, seconds_left
from alexnet.cli import CONF
from alexnet.errors import UserError
from alexnet.system import git_state, write_json
from alexnet.training import assemble
from alexnet.training.config import compose_train
from alexnet.training.metrics import CLOCK_COLUMNS, Metrics, Row
from alexnet.training.record import RunRecord, read_record


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(runner, "train", refuse)


# Jobs


def test_kept_records_are_finished_runs_without_weights_and_pictures(finished, tmp_path, no_training, capsys):
    reproduce(dataclasses.replace(finished, keep=str(tmp_path)))
    assert "kept      4 finished runs" in capsys.readouterr().out
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"run.json", "metrics.csv", "measures.json", "val_1view.npz", "nearest_hidden.npz"} <= names
    assert not names & {"last.ckpt", "best.ckpt", "figure4.npz", "lock"}
    there = dataclasses.replace(finished, output_dir=str(tmp_path))
    assert {job.state for job in jobs_of(claims_of(there), there)} == {State.finished}


def test_a_run_that_several_claims_share_is_one_job(data_dir, tmp_path):
    settings = reduced(data_dir, tmp_path, "s4_2_dropout", "s5_decay", "s4_1_ten_views", seeds=2)
    those = jobs_of(claims_of(settings), settings)
    assert [(job.run.name, job.run.seed) for job in those] == [
        *(
            ("smoke/base", 1),
            ("smoke/s4_2_dropout/none", 1),
            ("smoke/base", 2),
            ("smoke/s4_2_dropout/none", 2),
        ),
        *(("smoke/s5_decay/none", 1), ("smoke/s5_decay/none", 2)),
    ]
    assert {Want.one_view, Want.ten_views} <= those[0].wants
    assert Want.ten_views not in those[1].wants
    assert those[1].config.model.dropout == 0
    assert those[2].config.seed == 2


def test_a_figure_draws_the_runs_of_its_claim(data_dir, tmp_path):
    one, both = (
        jobs_of(claims_of(settings), settings)
        for settings in (
            reduced(data_dir, tmp_path, "figure1"),
            reduced(data_dir, tmp_path, "s3_1_relu", "figure1"),
        )
    )
    assert [job.run.name for job in one] == [job.run.name for job in both]
    assert len(one) == 4 + 2


def test_the_full_smoke_scale_is_over_a_hundred_distinct_runs():
    claims = claims_of(Reproduce())
    runs = [run for c in claims for run in c.runs("smoke", 3)] + [
        r for c in claims for *_, r in c.tuning_runs("smoke")
    ]
    distinct = {(run.name, run.seed): run.overrides for run in runs}
    assert len(distinct) > 100
    assert all(distinct[run.name, run.seed] == run.overrides for run in runs)  # one name, one configuration


def canned_run(
    settings: Reproduce, name: str, errors: list[float], per_epoch: int = 1, loss: float = 1.0
) -> None:
    """A finished tuning run with these training errors, one a step. Its errors are numbers even if its loss is none."""
    path = directory(settings, name, 1000)
    path.mkdir(parents=True, exist_ok=True)
    record = {"state": "finished", "results": {}, "config": {"model": {"num_classes": 10}}}
    (path / "run.json").write_text(json.dumps(record))
    with (path / "metrics.csv").open("w") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "epoch", "train/loss", "train/top1_error", "holdout/loss"])
        for i, error in enumerate(errors):
            rows.writerow([i + 1, i // per_epoch, 1.0, error, ""])
        rows.writerow([len(errors), (len(errors) - 1) // per_epoch, loss, errors[-1], loss])


def test_the_rate_that_arrives_first_is_taken_and_else_the_one_that_ends_lowest(data_dir, tmp_path):
    settings = reduced(data_dir, tmp_path, "s3_1_relu")
    claims = claims_of(settings)
    canned_run(settings, "s3_1_relu/relu_tune_0.003", [0.5, 0.3, 0.0])
    assert choose(claims[0], settings) == {}
    assert [job.undecided for job in jobs_of(claims, settings)] == [False] * 4 + [True] * 2
    canned_run(settings, "s3_1_relu/relu_tune_0.01", [0.5, 0.2, 0.9])
    canned_run(settings, "s3_1_relu/tanh_tune_0.003", [0.9, 0.7, 0.5])
    canned_run(settings, "s3_1_relu/tanh_tune_0.01", [0.5, 0.2, 0.9], loss=float("nan"))
    assert choose(claims[0], settings) == {"relu": 0.01, "tanh": 0.003}
    relu, tanh = jobs_of(claims, settings)[4:]
    assert (relu.config.optim.lr, tanh.config.optim.lr) == (0.01, 0.003)
    assert not relu.undecided


def test_a_rate_is_not_chosen_for_one_lucky_row_nor_if_it_ends_in_no_number(data_dir, tmp_path):
    settings = reduced(data_dir, tmp_path, "s3_1_relu")
    canned_run(settings, "s3_1_relu/relu_tune_0.003", [0.9, 0.2, 0.9, 0.9], per_epoch=2)
    canned_run(settings, "s3_1_relu/relu_tune_0.01", [0.9, 0.9, 0.24, 0.24], per_epoch=2)
    canned_run(settings, "s3_1_relu/tanh_tune_0.003", [0.9, 0.8, 0.7, 0.6], per_epoch=2)
    canned_run(settings, "s3_1_relu/tanh_tune_0.01", [0.1, 0.1, 0.1, 0.9], per_epoch=2, loss=float("nan"))
    (claim,) = claims_of(settings)
    assert choose(claim, settings) == {"relu": 0.01, "tanh": 0.003}


def test_a_rate_at_the_end_of_its_list_is_said_plainly():
    claim = claims_of(Reproduce(claims=["s3_1_relu"]))[0]
    tune = dataclasses.replace(claim.tune, values={"cpu": [0.001, 0.002, 0.005, 0.01, 0.02]})
    claim = dataclasses.replace(claim, tune=tune)
    settings = Reproduce(scale=Scale.cpu)

    def said(relu: float, tanh: float) -> list[str]:
        return jobs.rates(claim, {"relu": relu, "tanh": tanh}, settings)

    assert said(0.001, 0.02) == [
        "relu: optim.lr = 0.001, of 5 tried (the smallest: a smaller one might be better)",
        "tanh: optim.lr = 0.02, of 5 tried (the largest: a larger one might be better)",
    ]
    assert said(0.005, 0.01) == ["relu: optim.lr = 0.005, of 5 tried", "tanh: optim.lr = 0.01, of 5 tried"]


def test_arms_are_trained_with_the_rates_that_were_just_chosen(data_dir, tmp_path, monkeypatch):
    settings = reduced(data_dir, tmp_path, "s3_1_relu")
    trained = {}

    def pretend(job):
        """The larger rate is better for relu, the smaller for tanh."""
        if jobs.is_tuning(job):
            large = job.config.optim.lr > 0.005
            good = large == (job.run.arm == "relu")
            canned_run(settings, job.run.name.removeprefix("smoke/"), [0.9, 0.1 if good else 0.8])
        else:
            trained[job.run.arm] = job.config.optim.lr
        return ""

    monkeypatch.setattr(runner, "run_job", pretend)
    claims = claims_of(settings)
    those = jobs_of(claims, settings)
    runner.run_all(claims, those, check(those), settings)
    assert trained == {"relu": 0.01, "tanh": 0.003}


def test_training_never_sees_val_and_tuning_is_not_measured(data_dir, tmp_path):
    settings = reduced(data_dir, tmp_path, "s3_1_relu")
    those = jobs_of(claims_of(settings), settings)
    assert not any(job.config.evaluate for job in those)
    assert [Want.basic in job.wants for job in those] == [False] * 4 + [True] * 2
    assert {job.config.seed for job in those[:4]} == {1000}


@pytest.mark.slow
def test_printed_commands_are_the_jobs(data_dir, tmp_path, no_training, capsys):
    settings = reduced(data_dir, tmp_path, "s5_init", "s3_1_relu", print=True)
    reproduce(settings)
    *lines, later, own = capsys.readouterr().out.splitlines()
    assert "2 runs whose rate the tuning runs above decide" in later
    assert "claim=s5_init,s3_1_relu" in own
    those = [job for job in jobs_of(claims_of(settings), settings) if not job.undecided]
    assert len(lines) == len(those) == 6 + 4
    for line, job in zip(lines, those, strict=True):
        python, script, *arguments = shlex.split(line)
        assert (python, script) == ("python", "scripts/train.py")
        assert compose_train(arguments) == job.config
    assert not (tmp_path / "train").exists()


# Runs


def test_every_run_is_finished_and_measured_and_sees_val_at_its_end_only(finished):
    settings = finished
    those = jobs_of(claims_of(settings), settings)
    assert [job.state for job in those] == [State.finished] * 4
    for job in those:
        record = read_record(job.directory)
        assert record["cpu_seconds"] > 0
        assert record["results"].keys() == {"holdout"}
        basic = json.loads((job.directory / Want.basic).read_text())
        assert basic["results"].keys() == {"train", "holdout", "val", "conv1"}
        assert job.steps_done == 3
    assert (directory(settings, "base", 2) / Want.ten_views).exists()
    assert not (directory(settings, "s4_2_dropout/none") / Want.ten_views).exists()


@pytest.mark.slow
def test_a_scheduler_s_run_is_only_measured(data_dir, tmp_path, monkeypatch, capsys):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    those = jobs_of(claims_of(settings), settings)
    for job in those:
        runner.train(job.config)
    assert [job.state for job in those] == [State.unmeasured] * 2
    monkeypatch.setattr(runner, "train", None)
    reproduce(settings)
    assert [job.state for job in those] == [State.finished] * 2
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "train").rglob("*")}
    reproduce(settings)
    assert "runs      2: 2 finished" in capsys.readouterr().out
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "train").rglob("*")}


def test_a_run_that_diverges_is_a_result_and_is_not_tried_again(data_dir, tmp_path, monkeypatch, capsys):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    settings.overrides += ["optim.lr=1e12"]
    reproduce(settings)
    assert "diverged" in capsys.readouterr().out
    monkeypatch.setattr(runner, "train", None)
    reproduce(settings)
    assert "1 of 1 pairs diverged" in capsys.readouterr().out


def test_a_run_that_goes_on_to_its_end_without_a_loss_is_not_measured(
    data_dir, tmp_path, monkeypatch, finished
):
    settings = reduced(data_dir, tmp_path, "s4_1_ten_views")
    (job,) = jobs_of(claims_of(settings), settings)
    shutil.copytree(directory(finished, "base"), job.directory)
    (job.directory / Want.basic).unlink()
    path = job.directory / "metrics.csv"
    path.write_text(path.read_text().rstrip().rpartition("\n")[0] + "\n3,0,0.01,nan,1,2.3,0.9,0.5,,1.0\n")
    monkeypatch.setattr(runner, "train", None)
    monkeypatch.setattr(runner, "measure", None)
    assert runner.run_job(job) == "diverged (the loss ended in NaN or infinity)"
    assert job.state is State.finished


def test_what_the_report_needs_is_missed_before_the_training(data_dir, tmp_path, no_training, monkeypatch):
    for name in ("alexnet.claims.report", "alexnet.pages.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # import raises ModuleNotFoundError
    with pytest.raises(UserError, match=r"the report needs matplotlib, .*pip install -e '\.\[plots\]'"):
        reproduce(reduced(data_dir, tmp_path, "s5_decay"))


def test_an_interruption_is_no_divergence(data_dir, tmp_path, monkeypatch):
    settings = reduced(data_dir, tmp_path, "s5_decay")

    def full_disk(config, lock):
        assemble.build_run(config).start()
        raise UserError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "train", full_disk)
        with pytest.raises(UserError, match="no space left"):
            reproduce(settings)
    assert jobs_of(claims_of(settings), settings)[0].state is State.interrupted


def test_a_run_that_another_process_is_at_comes_last_and_is_not_done_twice(
    data_dir, tmp_path, monkeypatch, capsys
):
    """Locks of two files hold each other off within one process too. The other is killed, then finishes its second."""
    settings = reduced(data_dir, tmp_path, "s5_decay", seeds=2)
    those = jobs_of(claims_of(settings), settings)
    killed, theirs = those[0], those[1]
    done, finished = [], set()
    monkeypatch.setattr(runner, "run_job", lambda job: done.append(job.run.arm + str(job.run.seed)) or "")
    monkeypatch.setattr(
        jobs.Job,
        "state",
        property(lambda job: State.finished if job.directory in finished else State.new),
    )
    with contextlib.ExitStack() as other:
        for job in (killed, theirs):
            assert other.enter_context(runner.locked(job.directory))

        def wait(seconds: float) -> None:
            if seconds == runner.PATIENCE:  # a lock that is taken is tried again much sooner
                finished.add(theirs.directory)
                other.close()

        monkeypatch.setattr("alexnet.claims.runner.time.sleep", wait)
        runner.run_jobs(those, Progress({(job.run.name, job.run.seed): 1.0 for job in those}))
    assert done == ["decay2", "none2", "decay1"]
    assert f"[4/4] {theirs.run.name} seed 1: done by another process" in capsys.readouterr().out


FORKER = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from alexnet.claims.config import Reproduce
from alexnet.claims.runner import reproduce

keys, delays = json.loads(sys.argv[1])
for output, delay in delays:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        reproduce(Reproduce(**{**keys, "output_dir": output}))
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_three_kills_change_no_figure(data_dir, tmp_path):
    """The delays are random but known; what they hit depends on the machine, which is the point."""
    delays = np.random.default_rng(0).uniform(0.3, 3.0, 3).tolist()
    plan = [(str(tmp_path / "straight"), None), *((str(tmp_path / "killed"), d) for d in [*delays, None])]
    keys = {
        "claims": ["s4_2_dropout", "s4_1_ten_views"],
        "seeds": 1,
        "data_dir": str(data_dir),
        "overrides": [*REDUCED, "trainer.limit_train_batches=7", "optim.epochs=2"],
    }
    ended = subprocess.run(
        [sys.executable, "-c", FORKER, json.dumps([keys, plan])],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    codes = [int(line) for line in ended.stdout.splitlines()]
    assert (codes[0], codes[-1]) == (0, 0), ended.stderr
    assert -9 in codes
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    runs = sorted(p.parent.relative_to(straight) for p in straight.rglob("run.json"))
    assert len(runs) == 2
    for run in runs:
        assert figures_of(straight / run) == figures_of(killed / run)
        for file in (straight / run).glob("*.npz"):
            for key, values in np.load(file).items():
                np.testing.assert_array_equal(values, np.load(killed / run / file.name)[key])
    one, other = (
        json.loads(next(d.rglob("results.json")).read_text())["claims"]["s4_2_dropout"]["rows"]
        for d in (straight, killed)
    )
    assert one == other


def figures_of(run: Path) -> tuple:
    """Everything a run says but minutes and images/s."""
    with (run / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in csv.DictReader(file)]
    record, basic = (json.loads((run / name).read_text()) for name in ("run.json", "measures.json"))
    return rows, record["results"], record["train"], basic["results"]


# Refusals: before any training


def claim_file(folder: Path, **change) -> None:
    content = yaml.safe_load((CONF / "claim" / "s5_decay.yaml").read_text())
    (folder / "mine.yaml").write_text(yaml.safe_dump({**content, **change}))


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (
            {"arms": {"decay": [], "none": ["optim.wieght_decay=0"]}},
            {},
            r"mine.yaml, arm none: unknown key optim.wieght_decay: did you mean optim.weight_decay",
        ),
        (
            {"arms": {"decay": [], "none": ["model.image_px=9"]}},
            {},
            r"arm none: model.image_px=9 is too small",
        ),
        (
            {"arms": {"decay": [], "none": ["data.name=nowhere"]}},
            {},
            r"arm none: the store .*nowhere.* does not exist",
        ),
        ({"recipe": {"smoke": "claims_smok", "cpu": "x", "gpu": "x"}}, {}, r"did you mean claims_smoke"),
        ({}, {"budget_minutes": 1e-5}, r"budget_minutes=1e-05, but these runs need about \d+\.\d minutes"),
    ],
)
def test_what_cannot_run_is_refused_before_any_training(
    data_dir, tmp_path, monkeypatch, no_training, change, keys, message
):
    claim_file(tmp_path, **change)
    monkeypatch.setattr(jobs, "CLAIMS", tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        reproduce(reduced(data_dir, tmp_path, "mine", **keys))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "train").exists()


def test_unknown_claims_and_senseless_settings_are_refused():
    with pytest.raises(UserError, match=r"claim=s3_3_lrm is unknown: did you mean s3_3_lrn"):
        reproduce(Reproduce(claims=["s3_3_lrm"]))
    for seeds in (0, 10**22):
        with pytest.raises(UserError, match=f"seeds={seeds} must be in 1 to 1000"):
            Reproduce(seeds=seeds)
    with pytest.raises(UserError, match="budget_minutes=0"):
        Reproduce(budget_minutes=0)


def test_a_directory_with_another_run_is_refused_before_any_training(finished, no_training):
    changed = reduced(Path(finished.data_dir), Path(finished.output_dir), "s5_decay", "s4_2_dropout")
    changed.overrides += ["optim.lr=0.5"]
    with pytest.raises(
        UserError, match=r"holds a run with another configuration \(optim.lr: 0.01 there, 0.5 now"
    ):
        reproduce(changed)


def test_a_page_is_not_rendered_from_runs_of_another_configuration(finished, tmp_path):
    """Also where the store is not there to compare the images with."""
    changed = reduced(tmp_path, Path(finished.output_dir), "s4_2_dropout", report=True)
    changed.overrides += ["optim.lr=0.5"]
    with pytest.raises(
        UserError, match=r"s4_2_dropout.yaml, arm dropout: .* another configuration \(optim.lr"
    ):
        reproduce(changed)
    changed.overrides.pop()
    jobs.refuse_other_runs(jobs_of(claims_of(changed), changed))


def test_an_arm_trained_with_another_rate_than_the_one_just_chosen_is_refused(
    data_dir, tmp_path, monkeypatch
):
    settings = reduced(data_dir, tmp_path, "s3_1_relu")
    claims = claims_of(settings)
    those = jobs_of(claims, settings)

    def pretend(job):
        assert jobs.is_tuning(job), "an arm was trained"
        best = job.config.optim.lr < 0.005
        canned_run(settings, job.run.name.removeprefix("smoke/"), [0.9, 0.1 if best else 0.8])
        return ""

    relu = assemble.identity(those[4].config, assemble.image_data(those[4].config))
    relu["optim"]["lr"] = 0.01
    directory(settings, "s3_1_relu/relu").mkdir(parents=True)
    write_json(
        directory(settings, "s3_1_relu/relu") / "run.json",
        {"state": "finished", "config": {**relu, "model": {**relu["model"], "num_classes": 10}}},
    )
    monkeypatch.setattr(runner, "run_job", pretend)
    with pytest.raises(UserError, match=r"\(optim.lr: 0.01 there, 0.003 now\)"):
        runner.run_all(claims, those, check(those), settings)


def test_the_script_reads_its_claims_and_ends_in_one_line(tmp_path, monkeypatch, capsys):
    script = str(CONF.parent / "scripts" / "reproduce.py")
    monkeypatch.setattr(sys, "argv", [script, "claim=s3_3_lrn,nothing", f"output_dir={tmp_path}"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    refused = capsys.readouterr().err
    assert (ended.value.code, refused.count("\n")) == (2, 1)
    assert "claim=nothing is unknown" in refused


# What is written of the code and of time


def test_the_commit_is_that_of_the_code_when_the_process_started(monkeypatch):
    first = git_state()
    monkeypatch.setattr("alexnet.system.subprocess.run", None)
    assert git_state() is first


def test_a_suspended_run_counts_its_training_only():
    record = {"config": {"data": {"batch_size": 64}}}
    speeds = {10: "320.0", 20: "320.0", 30: "0.1", 40: "320.0", 50: "320.0"}
    rows = [{"step": str(step), "epoch": "0", "images_per_second": speed} for step, speed in speeds.items()]
    rows.append({"step": "50", "epoch": "0", "kind": "epoch"})
    metrics = Metrics([Row.of(row) for row in rows])
    assert training_seconds(record, metrics) == 10.0
    of_one_core = {**record, "resolved": {"device": "cpu"}, "hardware": {"threads": 1}, "cpu_seconds": 7.0}
    assert training_seconds(of_one_core, metrics) == 7.0
    assert training_seconds({**of_one_core, "hardware": {"threads": 2}}, metrics) == 10.0


def test_the_cpu_time_of_a_run_is_kept_over_interruptions_and_not_that_of_measuring_alone(
    data_dir, tmp_path, monkeypatch
):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    job = jobs_of(claims_of(settings), settings)[0]
    path = job.directory / "run.json"
    path.parent.mkdir(parents=True)
    config = {"model": {"num_classes": 10}}
    record = RunRecord(path.parent, {"state": "interrupted", "cpu_seconds": 5.0, "config": config})
    record.update()
    monkeypatch.setattr(runner.time, "process_time", iter([10.0, 12.0, 20.0, 24.0]).__next__)
    with contextlib.suppress(KeyboardInterrupt), runner.cpu_time(job):
        raise KeyboardInterrupt
    assert json.loads(path.read_text())["cpu_seconds"] == 7.0
    record.update(state="finished", cpu_seconds=7.0)
    with runner.cpu_time(job):
        pass
    assert json.loads(path.read_text())["cpu_seconds"] == 7.0


def test_the_estimate_counts_steps_and_images(data_dir, tmp_path):
    settings = reduced(data_dir, tmp_path, "s4_1_ten_views")
    (job,) = jobs_of(claims_of(settings), settings)
    sizes = check([job])[job.config.data.root]
    assert sizes == Sizes(train=110, holdout=10, val=40)
    # 3 steps; holdout after the epoch and at the end; then training images and holdout once more, val, ten views.
    images = 10 + 10 + 110 + 10 + 40 + 400
    assert seconds_left(job, sizes, Speed(100.0, 1.0, 0.0)) == 300 + images


def test_on_a_cpu_the_speed_is_that_of_the_process_whatever_else_the_machine_does(
    data_dir, tmp_path, monkeypatch
):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    hours = itertools.count(0, 3600)
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(hours)))
    speed = measure_speed(jobs_of(claims_of(settings), settings)[0].config)
    assert 0 < speed.step < 60
    assert 0 < speed.image < 60
    assert 0 < speed.start < 600


def test_the_time_left_follows_the_time_taken(monkeypatch, data_dir, tmp_path, capsys):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    a, b = jobs_of(claims_of(settings), settings)
    clock = [0.0]
    monkeypatch.setattr("alexnet.claims.runner.time.monotonic", lambda: clock[0])
    progress = Progress({(a.run.name, 1): 60.0, (b.run.name, 1): 180.0})
    clock[0] = 120.0  # twice what was estimated
    progress.report(a, "done")
    assert capsys.readouterr().out == "[1/2] smoke/base seed 1: done; 2.0 min, 6.0 min left\n"


def test_commands_of_finished_runs_are_not_printed(finished):
    assert train_commands(jobs_of(claims_of(finished), finished), finished).count("scripts/train.py") == 0


# Damage

DAMAGE = {
    "run.json": b"",
    "metrics.csv": b"\xff\xfe not UTF-8",
    "measures.json": b"[1, 2]",
    "val_1view.npz": b"PK cut short",
    "nearest_hidden.npz": b"",
    "val_10view.npz": b"",
}


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
def test_a_damaged_run_is_named_and_the_others_go_on(copied, capsys):
    """One of four runs; each of its files in turn does not hold what it should."""
    settings = dataclasses.replace(copied, report=False)
    damaged, sound = directory(settings, "base", 2), directory(settings, "base", 1)
    for name, content in DAMAGE.items():
        whole = (damaged / name).read_bytes()
        (damaged / name).write_bytes(content)
        (sound / Want.basic).unlink()
        with pytest.raises(UserError, match=rf"1 of 4 runs are left out: \S+/{name} is damaged") as caught:
            reproduce(settings)
        assert "\n" not in str(caught.value)
        assert (sound / Want.basic).exists(), "a run that could be measured was not"
        assert f"# {damaged / name} is damaged" in capsys.readouterr().out
        assert (damaged / name).read_bytes() == content
        (damaged / name).write_bytes(whole)


def test_a_run_that_cannot_be_trained_stops_no_other(data_dir, tmp_path, monkeypatch):
    settings = reduced(data_dir, tmp_path, "s5_decay")
    done = []

    def first_fails(job):
        done.append(job.run.name)
        if len(done) == 1:
            raise UserError("its checkpoint is damaged")
        return ""

    monkeypatch.setattr(runner, "run_job", first_fails)
    with pytest.raises(
        UserError, match=r"1 of 2 runs are left out: smoke/base seed 1 failed: its checkpoint"
    ):
        reproduce(settings)
    assert done == ["smoke/base", "smoke/s5_decay/none"]
