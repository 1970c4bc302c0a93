"""torchrun over a finished run with overwrite=true: no rank may look at what another one deletes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import SMALL_NET

from alexnet.cli import SCRIPTS

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
ON_CPUS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"]


def overwritten(data_dir: Path, output_dir: Path, times: int) -> list[str]:
    """What was wrong with each of the runs that are started over a finished one."""
    command = [*TORCHRUN, "--nproc_per_node=2", str(SCRIPTS / "train.py"), *ON_CPUS, "trainer.devices=2"]
    command += [*SMALL_NET, "optim.epochs=1", "name=two", f"data_dir={data_dir}", f"output_dir={output_dir}"]
    record = output_dir / "train" / "two" / "seed0" / "run.json"
    faults = []
    for k in range(times + 1):
        more = ["overwrite=true"] if k else []
        ended = subprocess.run([*command, *more], capture_output=True, text=True, timeout=240)
        finished = record.exists() and json.loads(record.read_text())["state"] == "finished"
        if ended.returncode or not finished or "resuming from" in ended.stdout:
            faults.append(
                f"run {k}: exit code {ended.returncode}: {ended.stdout[-300:]} {ended.stderr[-2000:]}"
            )
    return faults


@pytest.mark.slow
def test_torchrun_with_overwrite_starts_a_finished_run_anew(data_dir: Path, tmp_path: Path) -> None:
    assert overwritten(data_dir, tmp_path, times=2) == []
