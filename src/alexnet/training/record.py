"""run.json: what was run, where, with which versions, and what came out.

A run directory is named by what is run, never by the clock, so the same command finds its own run again: it resumes,
or says that it is finished. Another configuration in the same directory is an error that shows the difference.
"""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from alexnet.errors import UserError

LOOK = 0.05  # seconds; longer than in_progress takes
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "numpy", "alexnet")


@dataclass
class RunRecord:
    """One run directory and its run.json."""

    directory: Path
    content: dict[str, Any]
    opened: str | None = None  # the text that lay there when it was opened

    @property
    def finished(self) -> bool:
        return self.content["state"] == "finished"

    @property
    def seconds(self) -> float:
        return float(self.content.get("seconds", 0.0))

    @property
    def is_current(self) -> bool:
        """Whether no other process has written the record since it was opened here."""
        path = self.directory / "run.json"
        return (path.read_text() if path.exists() else None) == self.opened

    def update(self, **values: Any) -> None:
        self.content.update(values)
        write_json(self.directory / "run.json", self.content)

    def start(self, resolved: dict[str, Any]) -> None:
        """Written when everything else of the run could be built. A run that goes on elsewhere says what it was."""
        self.directory.mkdir(parents=True, exist_ok=True)
        here = environment()
        now = {"resolved": resolved, **here}
        for key, value in now.items():
            before = self.content.get(key, value)
            if before != value:
                self.content.setdefault(f"{key}_before", []).append(before)
        started = self.content.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.update(**now, started=started)


def open_record(directory: Path, config: dict[str, Any], resolved: dict[str, Any], fresh: bool) -> RunRecord:
    """The record of this run directory: the one that lies there if it is the same run, else a new one.

    `config` decides whether two runs are the same; `resolved` is what it came to on this machine (backends,
    precision). Raises UserError if the directory holds a run with another configuration, unless it is to be
    `fresh`. Nothing is written yet.
    """
    path = directory / "run.json"
    text = path.read_text() if path.exists() else None
    if text is not None and not fresh:
        try:
            record = RunRecord(directory, json.loads(text), text)
        except ValueError as error:
            raise UserError(f"{path} is damaged: overwrite=true starts the run anew") from error
        changed = differences(record.content["config"], config)
        if changed:
            raise UserError(
                f"{directory} holds a run with another configuration ({'; '.join(changed[:4])}). "
                "Choose another name=..., or overwrite=true"
            )
        return record
    content = {"state": "running", "command": command_line(), "config": config, "resolved": resolved}
    return RunRecord(directory, {**content, **environment()}, text)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Whether this process now has the run to itself; a lock ends with its process, however that ends."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a") as file:
        ours = _try_lock(file)
        if not ours:  # somebody may only have looked
            time.sleep(LOOK)
            ours = _try_lock(file)
        if not ours:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # also for a child that inherited the file


def in_progress(directory: Path) -> bool:
    """Whether another process has it. For an instant nobody else can take it: `locked` tries twice."""
    if not (directory / "lock").exists():
        return False
    with (directory / "lock").open() as file:
        return not _try_lock(file, fcntl.LOCK_SH)  # shared: two that look do not see each other


def _try_lock(file: IO[str], kind: int = fcntl.LOCK_EX) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def differences(there: Any, now: Any, key: str = "") -> list[str]:
    """Every leaf in which two nested dicts differ, as 'optim.lr: 0.01 there, 0.02 now'."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(k for k in now if k not in there)]
        below = (differences(there.get(k), now.get(k), f"{key}.{k}" if key else str(k)) for k in keys)
        return [difference for part in below for difference in part]
    return [] if there == now else [f"{key}: {there} there, {now} now"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all: a kill while writing leaves the file that was there."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def command_line() -> str:
    return " ".join(
        ["python", *(argument if " " not in argument else repr(argument) for argument in sys.argv)]
    )


def environment() -> dict[str, Any]:
    """Versions, hardware and the commit: what a stranger needs to repeat a number."""
    return {"versions": versions(), "hardware": hardware(), "git": git_state()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def hardware() -> dict[str, Any]:
    described: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        described["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return described


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout this package lies in and whether it was changed; None without one.

    Read once: a process that trains for hours goes on with the code it has imported, whatever is committed meanwhile.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
