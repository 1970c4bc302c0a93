"""Suites `step` and `memory`: one training step of a whole network, its time and its peak of memory."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

from alexnet.bench.check import check
from alexnet.bench.config import Benchmark
from alexnet.bench.networks import STOCK, TUNED, contestant_named, multiply_adds, task
from alexnet.bench.timing import Bound, Kind, Machine, Row, interleave, print_row

OURS = ("fast", "fastest")


def step_rows(config: Benchmark, machine: Machine) -> Iterator[Row]:
    for model, dtype in combinations(config, "step"):
        for backend in OURS if config.check else ():
            worst = check(model, backend, dtype, config.device)
            print(f"  {model}, {dtype}, {backend}: right, to {worst:.1e}")
        batch = config.batch_of(model)
        given, name = task(model, batch, dtype, config.device), row_name("step", model, batch)
        names = [*OURS, *STOCK[given.dtype][: 2 if config.quick else None]]
        if model == "paper" and dtype != "float32":
            names += [f"torchvision {form}, no norm, {TUNED}" for form in ("eager", "compiled")]
        contestants = [contestant_named(other, given) for other in names]
        bound = Bound(machine, dtype, 2 * multiply_adds(given.config) * batch)
        yield from interleave("step", name, dtype, contestants, config.interleaved_rounds, batch, bound)
        if config.device == "cpu" and not config.quick:
            yield alone(config, model, Row("step", name, dtype, AS_RUN[dtype], Kind.as_run, batch))


def combinations(config: Benchmark, suite: str) -> list[tuple[str, str]]:
    """Which networks in which types; quick leaves the small one to bfloat16."""
    named = [m for m in config.models if config.only in row_name(suite, m, config.batch_of(m))]
    both = [(model, dtype) for model in named for dtype in config.dtypes]
    return [pair for pair in both if not config.quick or pair != ("mini", "float32")]


def row_name(suite: str, model: str, batch: int) -> str:
    return f"{suite}, {model}, batch {batch}"


# How people run it: nothing tuned. In a type of its own process, since the allocator cannot be set back.
AS_RUN = {"float32": "stock eager", "tf32": "stock eager", "bfloat16": "stock eager, autocast"}


def memory_rows(config: Benchmark) -> Iterator[Row]:
    """Peak minus what the process held before its first step, with the default allocator."""
    chosen = combinations(config, "memory")
    for model, dtype in chosen[-1:] if config.quick else chosen:
        batch = config.batch_of(model)
        compiled = "stock compiled, " + ("bf16 weights, " if dtype == "bfloat16" else "") + TUNED
        kinds = {"fast": Kind.ours, AS_RUN[dtype]: Kind.baseline}
        if not config.quick:
            kinds |= {"fastest": Kind.ours, compiled: Kind.baseline}
        for contestant, kind in kinds.items():
            name = row_name("memory", model, batch)
            yield alone(config, model, Row("memory", name, dtype, contestant, kind, batch))


def alone(config: Benchmark, model: str, row: Row, tuned_allocator: bool = False) -> Row:
    """The row with the times of its contestant's step in a fresh process (bench/alone.py)."""
    order = {
        "model": model,
        "batch": row.images,
        "dtype": row.dtype,
        "contestant": row.contestant,
        "rounds": config.interleaved_rounds,
        "threads": config.threads,
        "device": config.device,
        "tuned_allocator": tuned_allocator,
    }
    call = [sys.executable, "-m", "alexnet.bench.alone", json.dumps(order)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        row.note = [f"ended with {done.returncode}", *done.stderr.strip().splitlines()][-1]
    else:
        told = json.loads(done.stdout.splitlines()[-1])
        row = replace(row, rounds=config.interleaved_rounds, **told)
    print_row(row)
    return row
