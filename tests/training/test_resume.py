"""A run that was killed and started again ends with the same bits as one that was not."""

import csv
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SMALL_NET

from alexnet.cli import CONF
from alexnet.training import assemble
from alexnet.training.callbacks import LastCheckpoint
from alexnet.training.metrics import CLOCK_COLUMNS
from alexnet.training.run import train

STEPS_PER_EPOCH = 7  # ceil(110 train images / 16): the last batch holds 14


class Crash(Exception):
    pass


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process ends after this step, after whatever a checkpoint was due there."""
    save = LastCheckpoint.on_train_batch_end

    def saved_then_crash(self: Any, trainer: Any, *rest: Any) -> None:
        save(self, trainer, *rest)
        if trainer.global_step == step:
            raise Crash

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_end", saved_then_crash)


def ended(directory: Path) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The last checkpoint and metrics.csv without its clock columns."""
    checkpoint = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    with (directory / "metrics.csv").open() as file:
        rows = [{k: v for k, v in row.items() if k not in CLOCK_COLUMNS} for row in csv.DictReader(file)]
    return checkpoint, rows


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "plateau", "epoch", "global_step"):
        assert_equal_leaves(a[key], b[key], key)


def assert_equal_leaves(a: Any, b: Any, where: str) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal_leaves(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_leaves(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# Checkpoints are written after steps 4, 8, 12 and after each epoch (7, 14).
@pytest.mark.parametrize("step", [2, 4, 5, 7, 8, 11, 13])
def test_a_crash_changes_no_bit(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    overrides = ["optim.schedule=plateau", "optim.patience=0", "augment=code145", "evaluate=false"]
    straight = compose("name=straight", *overrides)
    train(straight)
    broken = compose("name=broken", *overrides)
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(Crash):
            train(broken)
    train(broken)
    (a, rows_a), (b, rows_b) = (ended(assemble.run_directory(c)) for c in (straight, broken))
    assert a["global_step"] == 2 * STEPS_PER_EPOCH
    assert_same_bits(a, b)
    assert rows_a == rows_b
    assert len(rows_a) == 7 + 2  # every second step, and one per epoch


def test_resume_with_a_schedule_per_step_and_the_sgd_rule(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["optim=one_cycle", "optim.rule=sgd", "optim.epochs=2", "evaluate=false"]
    straight, broken = compose("name=straight", *overrides), compose("name=broken", *overrides)
    train(straight)
    with monkeypatch.context() as patch:
        crash_at(patch, 13)
        with pytest.raises(Crash):
            train(broken)
    train(broken)
    (a, rows_a), (b, rows_b) = (ended(assemble.run_directory(c)) for c in (straight, broken))
    assert_same_bits(a, b)
    assert rows_a == rows_b


# No checkpoint holds the working copies. With an average of the weights, which is validated in their place, the copies
# change and must change back.
MASTER_WEIGHTS = ["trainer.precision=bf16-master-weights", "optim.ema_decay=0.9", "evaluate=false"]


def test_resume_with_master_weights(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumed_with_master_weights(compose, monkeypatch, "reference")


def assert_resumed_with_master_weights(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    chosen = [*MASTER_WEIGHTS, f"backend={backend}"]
    straight, broken = (compose(f"name={name}", *chosen) for name in ("straight", "broken"))
    train(straight)
    for step in (4, 9):  # within the first epoch, and after its average was validated
        with monkeypatch.context() as patch:
            crash_at(patch, step)
            with pytest.raises(Crash):
                train(broken)
    train(broken)
    (a, rows_a), (b, rows_b) = (ended(assemble.run_directory(c)) for c in (straight, broken))
    assert_same_bits(a, b)
    assert rows_a == rows_b
    assert {value.dtype for value in a["state_dict"].values()} == {torch.float32}


def test_two_seeds_differ(compose: Callable[..., Any]) -> None:
    """The comparison above can fail."""
    a, b = (
        compose("seed=0", "optim.epochs=1", "evaluate=false"),
        compose("seed=1", "optim.epochs=1", "evaluate=false"),
    )
    train(a)
    train(b)
    (x, _), (y, _) = (ended(assemble.run_directory(c)) for c in (a, b))
    with pytest.raises(AssertionError):
        assert_same_bits(x, y)


KILLER = """
import os, runpy, signal, sys
from alexnet.training.metrics import MetricsFile
write = MetricsFile.on_train_batch_end
def write_then_die(self, trainer, *rest):
    write(self, trainer, *rest)
    if trainer.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsFile.on_train_batch_end = write_then_die
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.slow
def test_kill_9_and_the_same_command_again_change_no_bit(data_dir: Path, tmp_path: Path) -> None:
    script = CONF.parent / "scripts" / "train.py"
    shared = [f"data_dir={data_dir}", f"output_dir={tmp_path}", *SMALL_NET, "evaluate=false"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)

    straight = run(str(script), *shared, "name=straight")
    assert straight.returncode == 0, straight.stderr
    killed = run("-c", KILLER.replace("sys.argv[1]", repr(str(script))), *shared, "name=broken")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run(str(script), *shared, "name=broken")
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stdout
    (a, rows_a), (b, rows_b) = (ended(tmp_path / "train" / n / "seed0") for n in ("straight", "broken"))
    assert_same_bits(a, b)
    assert rows_a == rows_b
    finished = run(str(script), *shared, "name=broken")
    assert "This run is finished" in finished.stdout
