"""Several processes of one run of which one dies, torchrun over a finished run, and one process for a long time."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from tests.conftest import SMALL_NET
from tests.soak.process import HUNG, Child, number, script, tally
from tests.training.test_interrupt import Job
from tests.training.test_torchrun import DDP, overwritten

from alexnet.errors import UserError
from alexnet.training.checkpoint import read
from alexnet.training.metrics import read_metrics

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.filterwarnings("ignore")]
RANKS = 4
FOUR = [*DDP, f"trainer.devices={RANKS}"]
MESSAGE = "error: another process of this run has ended"


def rank(k: int, port: int, *arguments: str) -> Callable[[], None]:
    """As torchrun starts it."""

    def body() -> None:
        world = {"RANK": k, "LOCAL_RANK": k, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "soak"}
        os.environ.update({name: str(value) for name, value in world.items()})
        rank_zero_only.rank = k  # Lightning reads it when it is imported
        script("train", *arguments)()

    return body


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


def one_of_four_killed(data_dir: Path, place: Path, victim: int, delay: float) -> tuple[str, str, float]:
    """How it ended, what was wrong with that, and the seconds that the other three took."""
    arguments = [
        *SMALL_NET,
        *FOUR,
        "optim.epochs=500",
        "trainer.enable_progress_bar=true",
        "name=four",
        f"data_dir={data_dir}",
        f"output_dir={place}",
    ]
    port = free_port()
    children = [Child(rank(k, port, *arguments), place / f"log{k}") for k in range(RANKS)]
    deadline = time.monotonic() + 60
    while "epoch " not in (place / "log0/out").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(delay)
    children[victim].kill()
    began = time.monotonic()
    # None is waited for twice: the minute is that of the whole job.
    others = [
        c.wait(max(1.0, 60 - (time.monotonic() - began))) for k, c in enumerate(children) if k != victim
    ]
    seconds = time.monotonic() - began
    children[victim].wait()
    codes, said = [ended.code for ended in others], "".join(ended.err for ended in others)
    try:
        read(place / "train/four/seed0/checkpoints/last.ckpt")
    except UserError as error:
        return "crashed", str(error), seconds
    if MESSAGE in said and 0 not in codes and HUNG not in codes:
        return "refused", "", seconds
    return "hung" if HUNG in codes else "crashed", f"exit codes {codes}: {said[-500:]}", seconds


def test_a_killed_rank_of_four_ends_the_job(data_dir: Path, tmp_path: Path) -> None:
    draw = random.Random(int(number("SEED", 0)))
    with tally("ranks") as counted:
        seconds = []
        for k in range(int(number("RANKS", 8))):
            place = tmp_path / str(k)
            place.mkdir()
            outcome, fault, took = one_of_four_killed(data_dir, place, k % RANKS, draw.uniform(0, 3))
            counted.add(outcome, fault and f"rank {k % RANKS}: {fault}")
            seconds.append(took)
        for victim in (1, 3):  # Lightning's own launcher
            job = Job(data_dir, tmp_path / f"job{victim}", *FOUR)
            children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children").read_text().split()
            os.kill(int(children[victim - 1]), signal.SIGKILL)
            outcome, fault = "refused", ""
            try:
                code, errors = job.ends()
                if not code or MESSAGE not in errors:
                    outcome, fault = "crashed", f"exit code {code}: {errors[-500:]}"
            except subprocess.TimeoutExpired:
                outcome, fault = "hung", "still there after a minute"
            left = [child for child in children if _alive(int(child))]
            counted.add(outcome, fault or (f"left processes {left}" if left else ""))
        counted.more["longest_end_in_seconds"] = round(max(seconds), 1)


def _alive(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def test_torchrun_with_overwrite_never_fails(data_dir: Path, tmp_path: Path) -> None:
    times = int(number("TORCHRUN", 20))
    with tally("torchrun_overwrite") as counted:
        faults = overwritten(data_dir, tmp_path, times)
        counted.add("recovered", tried=times - len(faults))
        for fault in faults:
            counted.add("crashed", fault)


class Sample(NamedTuple):
    """What a process holds."""

    resident: int  # bytes
    files: int
    threads: int

    @classmethod
    def of(cls, process: int) -> "Sample":
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        files, threads = (len(os.listdir(f"/proc/{process}/{name}")) for name in ("fd", "task"))
        return cls(pages * os.sysconf("SC_PAGESIZE"), files, threads)


def test_a_long_run_keeps_its_memory_files_and_threads(data_dir: Path, tmp_path: Path) -> None:
    """The second tenth of the time against the last: what grows with the epochs shows."""
    minutes = number("MINUTES", 20)
    long = [*SMALL_NET, "optim.epochs=1000000", "log_every=50", "watchdog=off", "name=long"]
    with tally("endurance") as counted:
        child = Child(
            script("train", *long, f"data_dir={data_dir}", f"output_dir={tmp_path}"), tmp_path / "log"
        )
        samples = []
        while time.monotonic() - child.started < 60 * minutes:
            time.sleep(minutes / 4)
            samples.append(Sample.of(child.pid))
        child.kill(signal.SIGTERM)
        ended = child.wait()
        tenth = len(samples) // 10
        before, after = (
            [median(values) for values in zip(*part, strict=True)]
            for part in (samples[tenth : 2 * tenth], samples[-tenth:])
        )
        epochs = len(read_metrics(tmp_path / "train/long/seed0/metrics.csv").epochs)
        grown = (after[0] - before[0]) / 2**20
        counted.more |= {"minutes": minutes, "epochs": epochs, "resident_mib": round(after[0] / 2**20, 1),
                         "grown_mib": round(grown, 2), "files": after[1], "threads": after[2]}  # fmt: skip
        flat = grown < 4 and after[1:] == before[1:] and ended.code == 128 + signal.SIGTERM
        counted.add(
            "recovered" if flat else "crashed",
            "" if flat else f"{before} -> {after}, {ended.code} {ended.err}",
        )
