"""Runs side by side: the keys in which they differ and their errors, the lowest first."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet import cli
from alexnet.training.record import read_record
from alexnet.training.scoring import Result, percent

# In the directory's name, or following from another key.
NOT_SHOWN = ("name", "seed", "store", "trainer.max_epochs")
SPLITS = ("holdout", "val")
SHORTEST = 22  # columns of a run's name, which loses its front where the table is wide


def compare(directories: Sequence[Path]) -> list[dict[str, Any]]:
    """A plain dict per run: its directory, what differs between these runs, its state, results and seconds.

    Sorted by the top-1 error on the holdout (where there is none, on val); runs without a result come last.
    """
    records = [read_record(directory) for directory in directories]
    configs = [_leaves(record["config"]) for record in records]
    keys = [key for config in configs for key in config if not key.startswith(NOT_SHOWN)]
    different = [k for k in dict.fromkeys(keys) if len({str(config.get(k)) for config in configs}) > 1]
    rows = [
        {
            "run": str(directory),
            "differs": {key: config.get(key) for key in different},
            "state": record["state"],
            "results": record.get("results", {}),
            "seconds": record.get("seconds"),
        }
        for directory, config, record in zip(directories, configs, records, strict=True)
    ]

    def error(row: dict[str, Any]) -> float:
        there = (row["results"][split]["top1_error"] for split in SPLITS if split in row["results"])
        return next(there, math.inf)

    return sorted(rows, key=error)


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.01, ...}"""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line per run, as `compare` sorts them. Keys that do not fit into the width are named below it."""
    root = os.path.commonpath([Path(row["run"]).parents[1] for row in rows])
    keys = list(rows[0]["differs"])
    lines = []
    for row in rows:
        results = {split: Result.from_dict(values) for split, values in row["results"].items()}
        errors = [percent(results[split].top1_error) if split in results else "-" for split in SPLITS]
        minutes = row["state"] if row["seconds"] is None else f"{row['seconds'] / 60:.1f}"
        different = (str(row["differs"][key]) for key in keys)
        lines.append([os.path.relpath(row["run"], root), *different, *errors, minutes])
    head = ["run", *(key.rpartition(".")[2] for key in keys)]
    head += [*(f"{split} top-1 error %" for split in SPLITS), "minutes"]
    widths = [max(map(len, column)) + 2 for column in zip(head, *lines, strict=True)]
    room = cli.WIDTH + 2 - min(widths[0], SHORTEST) - sum(widths[-3:])
    n = max(i for i in range(len(keys) + 1) if sum(widths[1 : 1 + i]) <= max(room, 0))
    shown = [[*line[: 1 + n], *line[-3:]] for line in (head, *lines)]
    more = [f"they differ also in {', '.join(keys[n:])}"] * (n < len(keys))
    return "\n".join([f"runs below {root}: {len(rows)}", cli.table(shown, right=(n + 3,)), *more])
