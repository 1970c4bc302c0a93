"""run.json: what was run, where, with which versions, and what came out.

A run directory is named by what is run, never by the clock, so the same command finds its own run again: it resumes,
or says that it is finished. Another configuration in the same directory is an error that shows the difference.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alexnet.data.store import self_hash
from alexnet.errors import UserError
from alexnet.system import command_line, environment, full_precision_name, read_json, write_json


@dataclass
class RunRecord:
    """One run directory and its run.json."""

    directory: Path
    content: dict[str, Any]
    opened: bytes | None = None  # what lay there when it was opened

    @property
    def finished(self) -> bool:
        return self.content["state"] == "finished"

    @property
    def is_current(self) -> bool:
        """Whether no other process has written the record since it was opened here."""
        return _content(self.directory / "run.json") == self.opened

    def update(self, **values: Any) -> None:
        self.content.update(values)
        write_json(self.directory / "run.json", self.content | {"self": self_hash(self.content)})

    def start(self, resolved: dict[str, Any], **more: Any) -> None:
        """Written when all else of the run could be built. A run that goes on elsewhere says what it was.

        `resolved` is what the configuration came to on this machine (backends, precision).
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        now = {"resolved": resolved, **environment()}
        for key, value in now.items():
            before = self.content.get(key, value)
            if before != value:
                self.content.setdefault(f"{key}_before", []).append(before)
        started = self.content.get("started", time.strftime("%Y-%m-%d %H:%M:%S"))
        self.update(**now, started=started, state="running", **more)


def open_record(directory: Path, config: dict[str, Any], fresh: bool) -> RunRecord:
    """The record of this run directory: the one that lies there if it is the same run, else a new one.

    `config` decides whether two runs are the same. Raises UserError if the directory holds a run with another
    configuration, unless it is to be `fresh`. Nothing is written yet.
    """
    text = _content(directory / "run.json")
    if text is None or fresh:
        return RunRecord(directory, {"state": "running", "command": command_line(), "config": config}, text)
    content = read_record(directory)
    refuse_other(f"{directory} holds a run", content["config"], config)
    return RunRecord(directory, content, text)


def _content(path: Path) -> bytes | None:
    """None if there is none, or no more: the first process of a run may be deleting it."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_record(directory: Path) -> dict[str, Any]:
    """The content of run.json. Raises UserError, which names the file, if it is damaged."""
    path = directory / "run.json"
    content = read_json(path)
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("state"), str):
        raise UserError(f"{path} is damaged: it lacks config or state. Restore it, or overwrite=true")
    if "self" in content and content["self"] != self_hash(content):  # older records have none
        raise UserError(
            f"{path} was changed after it was written: restore it, or delete it (the same command writes it anew from "
            "the last checkpoint)"
        )
    trainer = content["config"].get("trainer")
    if isinstance(trainer, dict) and "precision" in trainer:
        trainer["precision"] = full_precision_name(trainer["precision"])
    return content


def refuse_other(what: str, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError, which shows the difference, unless both configurations are the same run."""
    if changed := differences(there, now):
        raise UserError(
            f"{what} with another configuration ({'; '.join(changed[:4])}). "
            "Choose another name=..., or overwrite=true"
        )


def differences(there: Any, now: Any, key: str = "") -> list[str]:
    """Every leaf in which two nested dicts differ, as 'optim.lr: 0.01 there, 0.02 now'."""
    if isinstance(there, dict) and isinstance(now, dict):
        keys = [*there, *(k for k in now if k not in there)]
        below = (differences(there.get(k), now.get(k), f"{key}.{k}" if key else str(k)) for k in keys)
        return [difference for part in below for difference in part]
    return [] if there == now else [f"{key}: {there} there, {now} now"]
