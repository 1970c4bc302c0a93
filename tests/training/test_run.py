"""A whole run in a second: what it leaves, what it refuses, what its checkpoint is good for."""

import csv
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import pytest
import torch
from tests.conftest import SMALL_NET
from tests.training.test_resume import Crash, crash_at

from alexnet import system
from alexnet.cli import CONF, _quiet
from alexnet.data.prepare import PrepareConfig, prepare
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate, evaluate
from alexnet.layers import Backend, Backends
from alexnet.system import locked
from alexnet.training import assemble
from alexnet.training.callbacks import AveragedWeights, BestCheckpoint, Stalled
from alexnet.training.checkpoint import load, read
from alexnet.training.config import Train, compose_train
from alexnet.training.metrics import read_metrics
from alexnet.training.record import open_record
from alexnet.training.run import train


@pytest.fixture(scope="module")
def run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run."""
    import hydra

    from alexnet.cli import load as typed_config

    where = [f"data_dir={data_dir}", f"output_dir={tmp_path_factory.mktemp('runs')}", "name=done"]
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = typed_config(hydra.compose("train", [*where, *SMALL_NET]))
    train(config)
    return assemble.run_directory(config)


def test_a_run_leaves_its_record_metrics_checkpoints_and_picture(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["results"].keys() == {"holdout", "val"}
    assert record["results"]["val"]["n"] == 40
    assert record["resolved"]["precision"] == "32-true"
    assert set(record["resolved"]["backend"].values()) == {"reference"}
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["seconds"] > 0
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (run / "training.png").read_bytes()[:4] == b"\x89PNG"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["holdout/loss"]] == [7, 14]
    assert [int(row["step"]) for row in rows if not row["holdout/loss"]] == [2, 4, 6, 8, 10, 12, 14]


def test_epoch_rows_are_means_over_the_epoch_s_images(run: Path) -> None:
    """Batches 1 to 6 hold 16 images, two to a window, and batch 7 holds 14: its loss is what is left of the mean."""
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    epoch, epoch_2 = (float(row["train/loss"]) for row in rows if row["holdout/loss"])
    windows = [float(row["train/loss"]) for row in rows if not row["holdout/loss"]]
    # Steps 7 and 8 share a window: the last batch of an epoch, 14 images, and the first of the next, 16.
    last_batch = (epoch * 110 - sum(windows[:3]) * 32) / 14
    first_of_next = (windows[3] * 30 - last_batch * 14) / 16
    last_of_all = (epoch_2 * 110 - first_of_next * 16 - sum(windows[4:6]) * 32) / 30
    assert windows[6] == pytest.approx(last_of_all, rel=1e-5)


def test_a_checkpoint_is_tensors_and_plain_data(run: Path) -> None:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["model"]["width"] == 0.125
    assert "augment.mean" in content["state_dict"]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = tmp_path / "evil.ckpt"
    torch.save({"hyper_parameters": Evil(), "state_dict": {}}, path)
    with pytest.raises(UserError, match="is refused: it holds more than tensors"):
        read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError):
        read(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"nonsense", "cannot be read"), (b"{}", "cannot be read")],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "x.ckpt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_what_is_damaged_in_a_run_is_said_in_one_line(
    run: Path, compose: Callable[..., Any], tmp_path: Path
) -> None:
    moved = tmp_path / "train" / "done" / "seed0"
    shutil.copytree(run, moved)
    config = compose("name=done")
    record = json.loads((moved / "run.json").read_text())
    del record["self"]
    (moved / "run.json").write_text(json.dumps({**record, "state": "running"}))
    (moved / "checkpoints" / "last.ckpt").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"last.ckpt cannot be read") as caught:
        train(config)
    assert "\n" not in str(caught.value)
    (moved / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run.json is damaged: it is no JSON .* Restore or delete it"):
        train(config)
    assert assemble.build_run(compose("name=done", "overwrite=true")).record.is_current
    content = read(run)
    del content["state_dict"]["net.fc8.weight"]
    torch.save(content, moved / "lacking.ckpt")
    with pytest.raises(UserError, match="does not hold the weights of its own network"):
        load(moved / "lacking.ckpt")
    (tmp_path / "model.onnx").touch()
    for path in (tmp_path, tmp_path / "model.onnx"):
        with pytest.raises(UserError, match=r"model.onnx is an export for other programs"):
            load(path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(UserError, match=r"holds no checkpoints/best.ckpt"):
        load(tmp_path)


def test_a_checkpoint_of_another_project_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"model": {}, "lr": 0.1}, "state_dict": {}}, tmp_path / "theirs.ckpt")
    with pytest.raises(UserError, match="its hyper_parameters lack augment, classes, optim"):
        load(tmp_path / "theirs.ckpt")


def test_evaluation_needs_a_checkpoint_and_a_val_store_and_nothing_else(
    run: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "moved.ckpt")
    shutil.copytree(data_dir / "synthetic" / "val", tmp_path / "val")
    where = {"store": str(tmp_path / "val"), "output_dir": str(tmp_path), "device": "cpu"}
    config = Evaluate(str(tmp_path / "moved.ckpt"), **where)
    (result,) = evaluate(config)
    assert (
        result.as_dict()["top1_error"]
        == json.loads((run / "run.json").read_text())["results"]["val"]["top1_error"]
    )
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:3])) <= 100
    (record,) = (tmp_path / "evaluate").glob("evaluate-moved-*-val-1view.json")
    assert json.loads(record.read_text())["results"][0]["n"] == 40
    config.store = str(data_dir / "synthetic")  # the data set's directory will do: the split names its part
    assert evaluate(config) == [result]


def test_results_are_kept_in_the_run_s_directory(run: Path, data_dir: Path) -> None:
    evaluate(Evaluate(str(run), views=10, split="holdout", data_dir=str(data_dir)))
    assert json.loads((run / "evaluate-holdout-10view.json").read_text())["results"][0]["views"] == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": []}, "checkpoint is not given"),
        ({"checkpoint": 5}, "checkpoint=5 does not exist"),
        ({"checkpoint": "x", "batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"checkpoint": "x", "views": 3}, "views=3"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(Evaluate(**options))


def test_the_code_of_the_readme_runs(run: Path) -> None:
    readme = (CONF.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    found: dict[str, Any] = {}
    exec(code.replace("outputs/train/quickstart/seed0", str(run)), found)
    assert found["top5"].values.shape == (2, 5)
    assert len(found["names"]) == 5
    assert all(found["names"])


def test_several_checkpoints_are_averaged(run: Path, data_dir: Path, tmp_path: Path) -> None:
    checkpoints = [str(run / "checkpoints" / name) for name in ("best.ckpt", "last.ckpt")]
    results = evaluate(Evaluate(checkpoints, data_dir=str(data_dir), output_dir=str(tmp_path)))
    assert [r.networks for r in results] == [1, 1, 2]


def test_best_ckpt_holds_the_network_alone_and_no_run_goes_on_from_it(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    """With averaged weights, these: last.ckpt has them beside the weights that training goes on with."""
    config = compose("optim.ema_decay=0.9", "optim.epochs=1", "evaluate=false")
    train(config)
    checkpoints = assemble.run_directory(config) / "checkpoints"
    best, last = checkpoints / "best.ckpt", checkpoints / "last.ckpt"
    assert best.stat().st_size < 0.4 * last.stat().st_size
    assert set(read(best)) == {"state_dict", "hyper_parameters", "identity", "epoch", "global_step"}
    weights, whole = read(best)["state_dict"], read(last)
    assert all(torch.equal(weights[name], value) for name, value in whole["state_dict"].items())
    assert not torch.equal(weights["net.fc7.weight"], whole["current_model_state"]["net.fc7.weight"])
    (checkpoints.parent / "run.json").unlink()
    shutil.copy(best, last)
    with pytest.raises(
        UserError, match=r"last.ckpt holds weights alone.*init_from=.*overwrite=true"
    ) as refused:
        train(config)
    assert "\n" not in str(refused.value)


def test_any_backend_loads_any_checkpoint(run: Path) -> None:
    native = load(run, Backends(default=Backend.native).resolve("cpu"))
    x = torch.randn(3, 3, 56, 56) * 50
    with torch.no_grad():
        torch.testing.assert_close(native(x), load(run)(x), rtol=1e-4, atol=1e-5)


def test_classes_that_do_not_match_the_checkpoint_are_refused(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            (tmp_path / "raw" / split / wnid).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "raw" / split / wnid / f"{i}.png")
    root = tmp_path / "other"
    prepare(
        PrepareConfig(name="other", root=str(root), source="folder", path=str(tmp_path / "raw"), workers=0)
    )
    with pytest.raises(UserError, match=r"knows 10 classes .* holds 2"):
        evaluate(Evaluate(str(run), store=str(root / "val")))


def test_one_image_per_class_leaves_no_holdout_and_trains_all_the_same(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    root = tmp_path / "few"
    prepare(PrepareConfig(name="few", root=str(root), n_train=10, n_val=10, workers=0))
    few = ["data.name=few", f"data.root={root}", "data.batch_size=4", "evaluate=false"]
    assert train(compose(*few)) is None
    with pytest.raises(UserError, match=r"optim\.schedule=plateau, but .* holds no holdout images"):
        train(compose(*few, "optim.schedule=plateau", "name=plateau"))


def test_holdout_loss_is_the_mean_over_images_whatever_the_batches(
    run: Path, data_dir: Path, compose: Callable[..., Any]
) -> None:
    """Ten holdout images in batches of 7 and 3, against evaluation of the same weights in one batch."""
    config = compose("data.eval_batch_size=7", "optim.epochs=1", "name=ragged")
    train(config)
    directory = assemble.run_directory(config)
    (result,) = evaluate(
        Evaluate(
            str(directory / "checkpoints/last.ckpt"), split="holdout", data_dir=str(data_dir), device="cpu"
        )
    )
    with (directory / "metrics.csv").open() as file:
        logged = next(float(row["holdout/loss"]) for row in csv.DictReader(file) if row["holdout/loss"])
    assert logged == pytest.approx(result.cross_entropy.value, rel=1e-5)


def test_a_mistake_leaves_nothing_behind(compose: Callable[..., Any], tmp_path: Path) -> None:
    for mistake in ("model.image_px=4", "trainer.precision=fp8", "data.batch_size=0", "model.pool_stride=0"):
        with pytest.raises(Exception):  # noqa: B017, PT011 (ours, or what instantiate makes of lightning's)
            assemble.build_run(compose(mistake))
        assert not (tmp_path / "train").exists(), mistake


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("trainer.max_epochs=3", "set optim.epochs alone"),
        ("trainer.max_steps=3", "set optim.epochs, or trainer.limit_train_batches"),
        ("trainer.max_steps=1", "set optim.epochs, or trainer.limit_train_batches"),
        ("+trainer.fast_dev_run=True", "set trainer=debug"),
        ("+trainer.max_time=00:00:10:00", "the same command resumes"),
        ("+trainer.accumulate_grad_batches=2", "set data.batch_size"),
    ],
)
def test_a_run_is_as_long_as_its_schedule(compose: Callable[..., Any], override: str, remedy: str) -> None:
    with pytest.raises(UserError, match=remedy) as caught:
        assemble.build_run(compose(override))
    assert override.lstrip("+") in str(caught.value)


def test_a_backend_for_an_operation_that_the_network_lacks_is_refused(compose: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"backend\.same_map_norm=native has no effect: this network has no"):
        assemble.build_run(compose("backend.same_map_norm=native"))
    assemble.build_run(compose("backend.cross_entropy=native", "backend.linear=native"))


def test_a_run_is_trained_by_one_process_at_a_time(compose: Callable[..., Any]) -> None:
    config = compose()
    directory = assemble.run_directory(config)
    with locked(directory), pytest.raises(UserError, match="is being trained by another process"):
        train(config)
    assert [path.name for path in directory.iterdir()] == ["lock"]


def test_overwriting_spares_a_run_that_another_process_took_meanwhile(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands of the same second: the other one has the lock by the time that this one is built."""
    config = compose("overwrite=true")
    directory, built = assemble.run_directory(config), assemble.build_run
    with ExitStack() as other:

        def slow(config: Train, *rest: Any) -> assemble.TrainingRun:
            other.enter_context(locked(directory))
            (directory / "metrics.csv").write_text("theirs")
            return built(config, *rest)

        monkeypatch.setattr(assemble, "build_run", slow)
        with pytest.raises(UserError, match="is being trained by another process"):
            train(config)
    assert (directory / "metrics.csv").read_text() == "theirs"


def test_a_run_that_another_process_began_or_ended_meanwhile_is_not_written_over(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration was never compared with this one's, and it may be finished."""
    config, built = compose(), assemble.build_run

    def slow(config: Train, *rest: Any) -> assemble.TrainingRun:
        run = built(config, *rest)
        built(compose("optim.lr=0.02")).start()
        return run

    monkeypatch.setattr(assemble, "build_run", slow)
    with pytest.raises(UserError, match="was written by another process meanwhile"):
        train(config)
    assert (
        json.loads((assemble.run_directory(config) / "run.json").read_text())["config"]["optim"]["lr"] == 0.02
    )


def test_a_look_at_a_run_keeps_nobody_from_starting_it(tmp_path: Path) -> None:
    looking = filelock.FileLock(tmp_path / "lock", thread_local=False)
    looking.acquire()
    threading.Timer(0.05, looking.release).start()
    with locked(tmp_path) as ours:
        assert ours


def test_where_files_cannot_be_locked_a_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def acquire(*_: Any, **__: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with locked(tmp_path) as ours:
        assert ours
    assert f"{tmp_path}: this file system has no locks" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_the_lock_is_held_while_a_run_is_trained_and_no_longer(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    config = compose("overwrite=true")
    directory = assemble.run_directory(config)

    def fit(run: assemble.TrainingRun) -> None:
        assert system.in_progress(directory)
        if fails:
            raise UserError("no space left")

    monkeypatch.setattr(assemble.TrainingRun, "fit", fit)
    monkeypatch.setattr("alexnet.training.run.finish", lambda run, config: 0.5)
    with pytest.raises(UserError, match="no space") if fails else nullcontext():
        assert train(config) == 0.5
    assert not system.in_progress(directory)


def test_a_resume_under_other_code_is_on_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit in "aabc":  # resumed under the same code, then under another, then under a third
        monkeypatch.setattr(system, "git_state", lambda c=commit: {"commit": c, "changed": False})
        resumed = open_record(tmp_path, {}, fresh=False)
        resumed.start({"device": "cpu"})
    assert resumed.content["git"]["commit"] == "c"
    assert [git["commit"] for git in resumed.content["git_before"]] == ["a", "b"]
    assert "versions_before" not in resumed.content


def test_probing_deletes_nothing(run: Path, compose: Callable[..., Any]) -> None:
    train(compose(f"output_dir={run.parents[2]}", "name=done", "probe=true", "overwrite=true"))
    assert (run / "checkpoints" / "best.ckpt").exists()


def test_other_images_under_the_same_name_are_another_run(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    for seed, name in enumerate(("a", "b")):
        root = str(tmp_path / name)
        prepare(PrepareConfig(name="synthetic", root=root, n_train=40, n_val=10, workers=0, seed=seed))
    assemble.build_run(compose(f"data.root={tmp_path / 'a'}")).start()
    with pytest.raises(UserError, match=r"holds a run with another configuration \(store\."):
        assemble.build_run(compose(f"data.root={tmp_path / 'b'}"))


def test_a_missing_val_store_is_found_before_training(
    compose: Callable[..., Any], data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_dir / "synthetic" / "train", tmp_path / "half" / "train")
    with pytest.raises(UserError, match=r"has no val store: set evaluate=false"):
        assemble.build_run(compose("data.name=half", f"data.root={tmp_path / 'half'}"))


def test_a_split_is_read_from_its_own_store(run: Path, data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"holds the train images: give the val store"):
        evaluate(Evaluate(str(run), store=str(data_dir / "synthetic" / "train")))


def test_a_moved_run_remembers_its_best_epoch(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = ["evaluate=false", "optim.epochs=3"]
    here = compose(*overrides, f"output_dir={tmp_path / 'here'}")
    with monkeypatch.context() as patch:
        crash_at(patch, 16)
        with pytest.raises(Crash):
            train(here)
    (tmp_path / "here").rename(tmp_path / "there")
    there = assemble.build_run(compose(*overrides, f"output_dir={tmp_path / 'there'}"))
    there.start()
    there.fit()
    best = next(c for c in there.trainer.callbacks if isinstance(c, BestCheckpoint))
    errors = [row.holdout["top1_error"] for row in read_metrics(there.directory / "metrics.csv").epochs]
    assert float(best.best_model_score) == min(errors)
    assert Path(best.best_model_path).parent == (there.directory / "checkpoints").resolve()


def test_a_subset_is_prepared_under_its_own_name(tmp_path: Path) -> None:
    script = str(CONF.parent / "scripts" / "prepare_data.py")
    command = [
        sys.executable,
        script,
        f"data_dir={tmp_path}",
        "name=few",
        "n_train=20",
        "n_val=10",
        "workers=0",
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"few"}


def test_a_finished_run_is_shown_not_repeated(run: Path, compose: Callable[..., Any]) -> None:
    config = compose(f"output_dir={run.parents[2]}", "name=done")
    before = (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    assert train(config) == json.loads((run / "run.json").read_text())["results"]["holdout"]["top1_error"]
    assert (run / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before


def test_conv1_is_slowed_and_frozen_by_epoch(compose: Callable[..., Any]) -> None:
    config = compose(
        "optim.epochs=3",
        "optim.conv1_frozen_at=0.5",
        "evaluate=false",
        "overwrite=true",
        "optim.schedule=constant",
    )
    run = assemble.build_run(config)
    kernels: list[torch.Tensor] = []
    run.classifier.on_train_epoch_end = lambda: kernels.append(
        run.classifier.net.conv1.weight.detach().clone()
    )
    run.start()
    run.fit()
    assert not torch.equal(kernels[0], kernels[1])  # epochs 0 and 1 train; 2 of 3 begins past one half
    assert torch.equal(kernels[1], kernels[2])


def test_watchdog_explains_a_plateau(compose: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's text at an eighth of the width stands at ln(10); the fan-in rule's weights do not."""
    stalled = [
        "model.init=normal",
        "model.init_std=[1e-4,1e-4,1e-4,1e-4,1e-4,1e-4,1e-4,1e-4]",
        "optim.lr=1e-4",
    ]
    config = compose(*stalled, "watchdog_steps=10", "evaluate=false")
    with pytest.raises(Stalled, match=r"ln\(10\)") as caught:
        train(config)
    assert "conv1" in str(caught.value)
    train(compose(*stalled, "watchdog_steps=10", "evaluate=false", "watchdog=off", "overwrite=true"))
    assert "ln(10)" not in capsys.readouterr().out
    _quiet()  # as every script does
    train(compose(*stalled, "watchdog_steps=10", "evaluate=false", "watchdog=warn", "overwrite=true"))
    assert capsys.readouterr().out.count("ln(10)") == 1


def test_watchdog_explains_nan(compose: Callable[..., Any]) -> None:
    with pytest.raises(Stalled, match=r"is not a number|NaN|nan"):
        train(compose("optim.lr=1e6", "evaluate=false", "optim.epochs=30"))


def test_watchdog_refuses_an_unknown_mode() -> None:
    with pytest.raises(
        UserError, match=r"watchdog: Invalid value 'bark', expected one of \[stop, warn, off\]"
    ):
        compose_train(["watchdog=bark"])


def test_probe_prints_its_verdict_and_leaves_nothing(
    compose: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(compose("probe=true")) is None
    assert "logit signal" in capsys.readouterr().out
    assert not (tmp_path / "train").exists()


DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]


TORCHRUN_SETS = {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}


@pytest.mark.parametrize(
    ("setting", "environment", "message"),
    [
        (
            "trainer.num_nodes=2",
            {},
            "trainer.num_nodes=2 and trainer.devices=1: start it on every node, with torchrun",
        ),
        ("trainer.devices=2", {**TORCHRUN_SETS, "WORLD_SIZE": "4"}, "torchrun starts 4 processes, but"),
    ],
)
def test_a_run_that_would_wait_for_processes_nobody_starts_is_one_line(
    setting: str,
    environment: dict[str, str],
    message: str,
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        assemble.build_run(compose(*DDP, "trainer.devices=1", setting))


def test_auto_is_bfloat16_with_master_weights_on_one_device_where_the_hardware_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled, plain = {"conv2d": "compiled"}, {"conv2d": "reference"}
    one = {"precision": "auto", "devices": 1, "strategy": "auto"}
    two = {"precision": "auto", "devices": 2, "strategy": "ddp"}
    monkeypatch.setattr(system, "has_native_bf16", lambda device: True)
    assert assemble.precision_for(one, "cpu", compiled) == assemble.MASTER_WEIGHTS
    assert assemble.precision_for(one, "cpu", plain) == "bf16-mixed"
    assert assemble.precision_for(two, "cpu", compiled) == "bf16-mixed"
    with pytest.raises(UserError, match="bf16-master-weights is for one device"):
        assemble.precision_for({**two, "precision": "bf16-masters"}, "cpu", compiled)
    monkeypatch.setattr(system, "has_native_bf16", lambda device: False)
    assert assemble.precision_for(one, "cpu", compiled) == "32-true"


def test_the_average_is_kept_where_the_training_is(compose: Callable[..., Any]) -> None:
    """Lightning sets callbacks up before it moves the network: "meta" stands for a GPU here."""
    run = assemble.build_run(compose("optim.ema_decay=0.9"))
    (average,) = (c for c in run.trainer.callbacks if isinstance(c, AveragedWeights))  # type: ignore[attr-defined]
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average.setup(trainer, run.classifier, "fit")  # type: ignore[arg-type]
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}  # type: ignore[union-attr]


@pytest.mark.slow
def test_gradients_of_working_copies_are_clipped(compose: Callable[..., Any]) -> None:
    """A norm of 1e-6 leaves next to nothing of an update; weights decay on, so decay is off."""
    moved = {}
    for clip in ("null", "1e-6"):
        run = [
            "trainer.precision=bf16-master-weights",
            f"trainer.gradient_clip_val={clip}",
            "optim.weight_decay=0",
        ]
        config = compose(f"name=clip{clip}", *run, "optim.epochs=1", "evaluate=false")
        before = assemble.build_run(config).classifier.net.fc7.weight.detach().clone()
        train(config)
        after = load(assemble.run_directory(config) / "checkpoints" / "last.ckpt").net.fc7.weight
        moved[clip] = float((after.detach() - before).norm())
    assert 0 < moved["1e-6"] < 1e-3 * moved["null"]
