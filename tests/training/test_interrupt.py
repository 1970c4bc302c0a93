"""A signal ends a run after its step, saved and said; the same command goes on to the same bits."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import pytest
from tests.conftest import SMALL_NET
from tests.training.test_capture import plain_update  # noqa: F401
from tests.training.test_resume import assert_same_bits, ended

from alexnet.cli import CONF
from alexnet.errors import UserError
from alexnet.training import assemble
from alexnet.training.interrupt import SIGNALS, Interrupted, Signals
from alexnet.training.metrics import MetricsFile
from alexnet.training.run import train


def signal_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """The signal arrives within this step."""
    write = MetricsFile.on_train_batch_end

    def signalled(self: MetricsFile, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == step:
            os.kill(os.getpid(), number)
        write(self, trainer, *rest)

    monkeypatch.setattr(MetricsFile, "on_train_batch_end", signalled)


def interrupted(
    config: Any, monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM
) -> Interrupted:
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, number)
        with pytest.raises(Interrupted) as caught:
            train(config)
    return caught.value


# Steps 3 and 10 are within an epoch, 7 ends the first one; other checkpoints are due after 4, 7, 8, 12.
@pytest.mark.parametrize("precision", ["32-true", "bf16-master-weights"])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    plain_update: None,  # noqa: F811
    precision: str,
) -> None:
    shared = [f"trainer.precision={precision}", "evaluate=false"]
    straight, broken = compose("name=straight", *shared), compose("name=broken", *shared)
    train(straight)
    for step in (3, 7, 10):
        assert interrupted(broken, monkeypatch, step).code == 128 + 15
        said = capsys.readouterr().err
        assert said == f"interrupted by SIGTERM after step {step}, which is saved; the same command goes on\n"
        record = json.loads((assemble.run_directory(broken) / "run.json").read_text())
        assert record["state"] == "interrupted"
    train(broken)
    (a, rows_a), (b, rows_b) = (ended(assemble.run_directory(c)) for c in (straight, broken))
    assert_same_bits(a, b)
    assert rows_a == rows_b
    assert json.loads((assemble.run_directory(broken) / "run.json").read_text())["state"] == "finished"


@pytest.fixture
def none_ignored() -> Iterator[None]:
    """As a terminal starts a process: under nohup and in the background some signals are ignored from the start."""
    inherited = {n: signal.signal(n, signal.SIG_DFL) for n in SIGNALS}
    yield
    for n, handler in inherited.items():
        signal.signal(n, handler)


@pytest.mark.usefixtures("none_ignored")
@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_is_noted_in_a_step_and_leaves_at_once_elsewhere(number: int) -> None:
    before = [signal.getsignal(n) for n in SIGNALS]
    signals = Signals()
    with signals.listening():
        with pytest.raises(Interrupted) as caught:
            os.kill(os.getpid(), number)
        assert caught.value.code == 128 + number
        assert [signal.getsignal(n) for n in SIGNALS] == before  # a second one has its usual effect
        signals.listen()
        signals.waits = True
        os.kill(os.getpid(), number)
        assert signals.received == number
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_a_signal_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().listening():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_steps_there_is_nothing_to_wait_for(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alexnet.training.run.finish", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    config = compose("optim.epochs=1")
    with pytest.raises(Interrupted):
        train(config)
    assert capsys.readouterr().err == "interrupted by SIGTERM; the same command goes on\n"
    monkeypatch.undo()
    monkeypatch.setattr("alexnet.training.run._picture", lambda *_: "not drawn")
    assert train(config) is not None


@pytest.mark.parametrize("there_is_scontrol", [True, False])
def test_a_slurm_job_is_put_back_into_its_queue(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    there_is_scontrol: bool,
) -> None:
    if there_is_scontrol:
        (tmp_path / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/asked"\n')
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    config = compose("evaluate=false", "optim.epochs=1")
    assert interrupted(config, monkeypatch, 3, signal.SIGUSR1).code == 128 + signal.SIGUSR1
    said = capsys.readouterr().err
    if there_is_scontrol:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        assert "SLURM job 77 is in its queue again" in said
    else:
        assert "SLURM job 77 could not be requeued" in said
    files = {path.name for path in assemble.run_directory(config).rglob("*")}
    assert not any("hpc" in name for name in files)  # what Lightning would write there


@pytest.mark.parametrize("rank_zero", [True, False])
def test_each_rank_says_that_another_one_has_ended(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, rank_zero: bool
) -> None:
    def fit(run: Any) -> NoReturn:
        raise RuntimeError(
            "[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:6537: Connection reset by peer"
        )

    monkeypatch.setattr(assemble, "is_rank_zero", lambda: rank_zero)
    monkeypatch.setattr(assemble.TrainingRun, "fit", fit)
    monkeypatch.setattr(pl.Trainer, "world_size", 2)
    with pytest.raises(UserError, match=r"another process of this run has ended .*the same command goes on"):
        train(compose())


class Job:
    """scripts/train.py for 500 epochs, seen until its first epoch is over."""

    def __init__(self, data_dir: Path, output_dir: Path, *more: str) -> None:
        script = str(CONF.parent / "scripts" / "train.py")
        long = [*SMALL_NET, "optim.epochs=500", "name=long", "trainer.enable_progress_bar=true"]
        command = [sys.executable, script, *more, f"data_dir={data_dir}", f"output_dir={output_dir}", *long]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert self.process.stdout is not None
        self.printed = []
        for line in self.process.stdout:
            self.printed.append(line)
            if line.startswith("epoch "):
                break

    def ends(self) -> tuple[int, str]:
        """Exit code and standard error."""
        try:
            _, errors = self.process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing may be left of it
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode, errors


@pytest.mark.slow
def test_a_sweep_stops_as_a_whole(data_dir: Path, tmp_path: Path) -> None:
    job = Job(data_dir, tmp_path, "-m", "seed=0,1")
    job.process.send_signal(signal.SIGTERM)
    code, errors = job.ends()
    assert code == 143
    assert errors.startswith("interrupted by SIGTERM after step ")
    assert errors.count("\n") == 1
    assert [path.name for path in (tmp_path / "train" / "long").iterdir()] == ["seed0"]


@pytest.mark.slow
def test_two_processes_stop_together_and_none_waits_for_a_dead_one(data_dir: Path, tmp_path: Path) -> None:
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    job = Job(data_dir, tmp_path, *two)
    job.process.send_signal(signal.SIGTERM)  # to the first process alone
    code, errors = job.ends()
    assert code == 143, errors
    assert "interrupted by SIGTERM after step " in errors
    job = Job(data_dir, tmp_path, *two)
    assert any("resuming from" in line for line in job.printed)
    (other,) = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
    os.kill(int(other), signal.SIGKILL)
    code, errors = job.ends()
    assert code != 0
    assert "error: another process of this run has ended" in errors
