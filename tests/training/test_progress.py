"""What a person sees of a run: lines in a file, the same numbers in a logger."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alexnet.training.callbacks import Lines
from alexnet.training.run import train


def test_a_file_gets_one_line_per_epoch_and_no_carriage_return(
    compose: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(compose("trainer.enable_progress_bar=true", "evaluate=false"))
    printed = capsys.readouterr().out
    assert "\r" not in printed
    lines = [line for line in printed.splitlines() if line.startswith("epoch ")]
    pattern = r"epoch {}/2, step {}, loss \d\.\d+, error [\d.]+%, holdout error [\d.]+%, \d+ images/s, [\d.]+ min left"
    assert len(lines) == 2
    for line, numbers in zip(lines, ((1, 7), (2, 14)), strict=True):
        assert re.fullmatch(pattern.format(*numbers), line), line


@pytest.mark.parametrize(("seconds", "said"), [(0.0, 1), (60.0, 0)])
def test_within_an_epoch_there_is_a_line_a_minute(
    capsys: pytest.CaptureFixture[str], seconds: float, said: int
) -> None:
    lines = Lines(SimpleNamespace(latest=None), seconds)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(
        global_step=3,
        world_size=1,
        is_global_zero=True,
        current_epoch=0,
        max_epochs=2,
        estimated_stepping_batches=14,
    )
    lines.on_train_batch_start(trainer, None, SimpleNamespace(labels=[0] * 16), 2)  # type: ignore[arg-type]
    lines.on_train_batch_end(trainer, None, {}, None, 2)  # type: ignore[arg-type]
    assert capsys.readouterr().out.count("epoch 1/2, step 3\n") == said


@pytest.mark.filterwarnings("ignore")
def test_a_logger_gets_what_metrics_csv_has_and_the_first_kernels(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = compose("logger=tensorboard", "evaluate=false")
    train(config)
    (events,) = (tmp_path / "tensorboard" / "test" / "seed0").glob("events*")
    read = accumulator.EventAccumulator(str(events))
    read.Reload()
    numbers = {"lr", "train/loss", "train/top1_error", "images_per_second", "seconds"}
    assert set(read.Tags()["scalars"]) >= {
        *numbers,
        "holdout/loss",
        "holdout/top1_error",
        "holdout/top5_error",
    }
    assert [event.step for event in read.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12, 14]
    assert [event.step for event in read.Scalars("holdout/loss")] == [7, 14]
    assert [event.step for event in read.Images("conv1")] == [7, 14]


@pytest.mark.filterwarnings("ignore")
def test_the_final_errors_on_val_are_logged_too(compose: Callable[..., Any], tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(compose("logger=tensorboard", "optim.epochs=1"))
    found = {}
    for events in (tmp_path / "tensorboard" / "test" / "seed0").glob("events*"):
        read = accumulator.EventAccumulator(str(events))
        read.Reload()
        found |= {name: read.Scalars(name)[-1] for name in read.Tags()["scalars"]}
    record = json.loads((tmp_path / "train" / "test" / "seed0" / "run.json").read_text())
    assert found["val/top1_error"].value == pytest.approx(record["results"]["val"]["top1_error"])
    assert found["val/top1_error"].step == 7


@pytest.mark.filterwarnings("ignore")
def test_wandb_offline_has_one_run_for_each_of_ours(compose: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for seed in (0, 1):
        train(compose("logger=wandb", "logger.wandb.offline=true", f"seed={seed}", "optim.epochs=1"))
    logs = [file.read_bytes() for file in (tmp_path / "wandb").glob("offline-run-*/*.wandb")]
    named = [{seed for seed in (0, 1) if f"test-seed{seed}".encode() in log} for log in logs]
    assert sorted(named, key=str) == [{0}, {1}]
    assert all(
        name in log for log in logs for name in (b"train/loss", b"holdout/top1_error", b"val/top1_error")
    )
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/images/conv1*.png"))) == 2


@pytest.mark.filterwarnings("ignore")
def test_mlflow_has_one_finished_run_for_each_of_ours(compose: Callable[..., Any], tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    pytest.importorskip("alembic")
    for seed in (0, 1):
        train(compose("logger=mlflow", f"seed={seed}", "optim.epochs=1"))
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("alexnet").experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["test-seed0", "test-seed1"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(
        {"train/loss", "holdout/top1_error", "val/top1_error"} <= run.data.metrics.keys() for run in runs
    )
