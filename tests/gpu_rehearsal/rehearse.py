"""Trains some steps under Lightning on the null CUDA and counts: python rehearse.py <data_dir> <cases>.

Cases are JSON, {name: [key=value, ...]}. So is the last line of the output: for each case the figures that budgets.py
limits and `details` that explain them, or an `error`.
"""

import gc
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from moved import Moved, logged_bytes
from nullcuda import Event, Log

from alexnet.training import assemble
from alexnet.training.config import compose_train

COUNTED = 5  # the step whose events are counted: everything is compiled, and captured
WEIGHED = 6  # the step whose bytes are counted; then the log ends, and the host's time begins to count
LAST = 16
LAUNCHES = ("kernel", "product", "convolution", "copy", "memset", "graph")
SETTINGS = [
    "experiment=none",
    "data=synthetic",
    "name=rehearsal",
    "trainer=gpu",
    "trainer.enable_progress_bar=false",
    "watchdog=warn",
    "checkpoint_every=0",
    "evaluate=false",
]


class Enough(Exception):
    """All that is counted has happened."""


class Counted(pl.Callback):
    """Notes in the log where steps begin and end; weighs one; then takes the host's time from step to step."""

    def __init__(self, log: Log, weigh: bool) -> None:
        self.cuda_log, self.n = log, 0  # (lightning gives callbacks a `log` of its own)
        self.moved = Moved() if weigh else None
        self.clock: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.n += 1
        if self.n <= WEIGHED:
            self.cuda_log.note(f"step {self.n}")
        if self.n == COUNTED:
            torch.cuda.reset_peak_memory_stats()
        if self.n == WEIGHED and self.moved:
            self.moved.__enter__()
        if self.n > WEIGHED:
            self.clock.append(time.process_time())
        if self.n == LAST:
            raise Enough

    def on_train_batch_end(self, *_: Any) -> None:
        if self.n == WEIGHED and self.moved:
            self.moved.__exit__(None, None, None)
        if self.n <= WEIGHED:
            self.cuda_log.note(f"after step {self.n}")
        if self.n == WEIGHED:
            self.cuda_log.__exit__()


def rehearse(data_dir: str, overrides: list[str]) -> dict[str, Any]:
    """The figures of a training with these overrides of conf/train.yaml."""
    with tempfile.TemporaryDirectory() as output:
        config = compose_train([*SETTINGS, f"data_dir={data_dir}", f"output_dir={output}", *overrides])
        run = assemble.build_run(config)
        weigh = "trainer.capture=false" in overrides
        counted = Counted(Log().__enter__(), weigh)
        run.trainer.callbacks.append(counted)
        run.start()
        try:
            run.fit()
        except Enough:
            return figures(counted)
    raise RuntimeError(f"the run ended before step {LAST}")


def figures(counted: Counted) -> dict[str, Any]:
    phases = by_phase(counted.cuda_log.events)
    step, between = phases[f"step {COUNTED}"], phases[f"after step {COUNTED}"]
    products = [event.text.split() for event in step if event.kind == "product"]
    everything = counted.cuda_log.events
    host = [after - before for before, after in itertools.pairwise(counted.clock)]
    found = {
        "launches": sum(event.kind in LAUNCHES for event in step),
        "launches between steps": sum(event.kind in LAUNCHES for event in between),
        "waits in a step": count(step, "sync"),
        "waits between steps": count(between, "sync"),
        "replays": count(step, "graph"),
        "products": len(products),
        "unaligned products": sum(int(p[7]) < 16 for p in products),
        "products of 3 rows": sum("3" in (p[1], p[3]) for p in products),
        "convolutions not NHWC": sum(e.kind == "convolution" and "NCHW" in e.text for e in everything),
        "violations": count(everything, "violation"),
        "impossible grids": count(everything, "bad-grid"),
        "host CPU ms": 1e3 * min(host),
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
        "details": {
            "where it waits": Counter(e.text for e in step + between if e.kind == "where"),
            "kernels": Counter(e.text for e in step if e.kind == "kernel").most_common(20),
            "captured": [e.text for e in everything if e.kind == "capture"],
            "violations": [e.text for e in everything if e.kind == "violation"],
        },
    }
    if counted.moved:
        weighed = phases[f"step {WEIGHED}"]
        moved = counted.moved.bytes + logged_bytes(weighed)
        triton = sum(event.kind == "kernel" and event.text.startswith("triton") for event in weighed)
        found["GB"] = sum(moved.values()) / 1e9
        found["kernels not weighed"] = triton - counted.moved.estimated
        found["details"]["GB"] = {name: size / 1e9 for name, size in moved.most_common(20)}
    return found


def by_phase(events: list[Event]) -> dict[str, list[Event]]:
    phases: dict[str, list[Event]] = {}
    current = phases["before"] = []
    for event in events:
        if event.kind == "note":
            current = phases[event.text] = []
        current.append(event)
    return phases


def count(events: list[Event], kind: str) -> int:
    return sum(event.kind == kind for event in events)


def main(data_dir: str, cases: dict[str, list[str]]) -> dict[str, Any]:
    """One case after the other: what one compiled, the next need not."""
    found = {}
    for name, overrides in cases.items():
        try:
            found[name] = rehearse(data_dir, overrides)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        gc.collect()
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
