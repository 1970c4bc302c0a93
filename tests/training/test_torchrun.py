"""Several processes, in one file so that one worker runs them: jobs beside each other must not share a port."""

import contextlib
import csv
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import SMALL_NET

from alexnet.cli import SCRIPTS

TRAIN = str(SCRIPTS / "train.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]


def overwritten(data_dir: Path, output_dir: Path, times: int) -> list[str]:
    """What was wrong with each of the runs that torchrun starts over a finished one."""
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", TRAIN, *DDP, "trainer.devices=2"]
    command += [*SMALL_NET, "optim.epochs=1", "name=two", f"data_dir={data_dir}", f"output_dir={output_dir}"]
    record = output_dir / "train" / "two" / "seed0" / "run.json"
    faults = []
    for k in range(times + 1):
        more = ["overwrite=true"] if k else []
        ended = subprocess.run([*command, *more], capture_output=True, text=True, timeout=240)
        finished = record.exists() and json.loads(record.read_text())["state"] == "finished"
        if ended.returncode or not finished or "resuming from" in ended.stdout:
            faults.append(
                f"run {k}: exit code {ended.returncode}: {ended.stdout[-300:]} {ended.stderr[:9000]}"
            )
    return faults


@pytest.mark.slow
def test_torchrun_with_overwrite_starts_a_finished_run_anew(data_dir: Path, tmp_path: Path) -> None:
    """No rank may look at what another one deletes."""
    assert overwritten(data_dir, tmp_path, times=2) == []


@pytest.mark.slow
def test_two_processes_on_one_node_or_two_have_the_loss_curve_of_one(data_dir: Path, tmp_path: Path) -> None:
    """Same global batches, dropout masks sliced by rank: the curves differ by the order of float32 sums only.

    A sum over 16 images in another order moves a loss of 2.3 by about 1e-6; 14 steps of a network this small
    amplify that by less than a hundred.
    """
    # With the bar, as people run it, and as the first of a sweep.
    two = [TRAIN, "-m", "seed=0,1", *DDP, "trainer.devices=2", "trainer.enable_progress_bar=true"]
    node = ["--nproc_per_node=1", "--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    of_node = [TRAIN, *DDP, "trainer.devices=1", "trainer.num_nodes=2"]
    commands = {
        "one": [[sys.executable, TRAIN, "trainer=cpu"]],
        "two": [[sys.executable, *two]],
        "nodes": [[*TORCHRUN, *node, f"--node_rank={k}", *of_node] for k in range(2)],
    }
    shared = [f"data_dir={data_dir}", f"output_dir={tmp_path}", *SMALL_NET, "evaluate=false"]
    curves = []
    for name, processes in commands.items():
        run_all([[*command, *shared, f"name={name}"] for command in processes], tmp_path)
        with (tmp_path / "train" / name / "seed0" / "metrics.csv").open() as file:
            curves.append(list(csv.DictReader(file)))
    assert json.loads((tmp_path / "train/two/seed1/run.json").read_text())["state"] == "finished"
    columns = "train/loss", "holdout/loss", "holdout/top1_error"
    assert sum(row["holdout/loss"] != "" for row in curves[0]) == 2  # epochs
    for one, *others in zip(*curves, strict=True):
        for several in others:
            assert one["step"] == several["step"]
            for name in columns:
                pair = float(one[name] or 0), float(several[name] or 0)
                assert math.isclose(*pair, rel_tol=1e-4), (one["step"], name)


def free_port() -> int:
    """Below the ports that a system gives away (from 32,768), or another program could be given it meanwhile."""
    for port in random.sample(range(12_000, 32_000), k=100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def run_all(commands: list[list[str]], logs: Path) -> None:
    """At the same time, each to its end; none is left where one fails. Logs are files: a full pipe blocks."""
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    files = [(logs / f"process{k}.log").open("w+") for k in range(len(commands))]
    started = [subprocess.Popen(c, env=alone, stderr=file) for c, file in zip(commands, files, strict=True)]
    try:
        codes = [process.wait(timeout=200) for process in started]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in started]
    finally:
        for process in started:
            process.kill()
        said = []
        for file in files:
            file.seek(0)
            said.append(file.read()[:9000])
            file.close()
    assert codes == [0] * len(commands), "\n\n".join(said)
