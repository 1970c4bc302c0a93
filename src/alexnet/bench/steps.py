"""Suites `step` and `memory`: one training step of a whole network, its time and its peak of memory."""

import json
import subprocess
import sys
from collections.abc import Iterator

from alexnet.bench.check import check
from alexnet.bench.config import Benchmark
from alexnet.bench.networks import (
    TUNED,
    multiply_adds,
    ours,
    stock,
    task,
    torchvision_step,
)
from alexnet.bench.timing import Bound, Kind, Machine, Row, interleave, print_row

OURS = ("fast", "fastest")


def step_rows(config: Benchmark, machine: Machine) -> Iterator[Row]:
    for model, dtype in combinations(config, "step"):
        for backend in OURS if config.check else ():
            worst = check(model, backend, dtype, config.device)
            print(f"  {model}, {dtype}, {backend}: right, to {worst:.1e}")
        yield from _step_rows(config, machine, model, dtype)


def combinations(config: Benchmark, suite: str) -> list[tuple[str, str]]:
    """Which networks in which types; quick leaves the small one to bfloat16."""
    both = [(model, dtype) for model in config.models for dtype in config.dtypes]
    both = [pair for pair in both if config.only in row_name(config, suite, pair[0])]
    return [pair for pair in both if not config.quick or pair != ("mini", "float32")]


def row_name(config: Benchmark, suite: str, model: str) -> str:
    return f"{suite}, {model}, batch {config.batch_of(model)}"


def _step_rows(config: Benchmark, machine: Machine, model: str, dtype: str) -> Iterator[Row]:
    given = task(model, config.batch_of(model), dtype, config.device)
    contestants = [ours(given, backend) for backend in OURS] + stock(given, config.quick)
    if model == "paper" and dtype != "float32":
        contestants += [torchvision_step(given, compiled) for compiled in (False, True)]
    images = len(given.images)
    bound = Bound(machine, dtype, 2 * multiply_adds(given.config) * images)
    name = row_name(config, "step", model)
    yield from interleave("step", name, dtype, contestants, config.interleaved_rounds, images, bound)
    if config.device == "cpu" and not config.quick:
        yield alone(config, model, dtype, AS_RUN[dtype], "step", name, Kind.as_run, tuned_allocator=False)


# How people run it: nothing tuned. In a type of its own process, since the allocator cannot be set back.
AS_RUN = {"float32": "stock eager", "tf32": "stock eager", "bfloat16": "stock eager, autocast"}


def memory_rows(config: Benchmark) -> Iterator[Row]:
    """Peak minus what the process held before its first step, with the default allocator."""
    chosen = combinations(config, "memory")
    for model, dtype in chosen[-1:] if config.quick else chosen:
        name = row_name(config, "memory", model)
        compiled = "stock compiled, " + ("bf16 weights, " if dtype == "bfloat16" else "") + TUNED
        kinds = {"fast": Kind.ours, AS_RUN[dtype]: Kind.baseline}
        if not config.quick:
            kinds |= {"fastest": Kind.ours, compiled: Kind.baseline}
        for contestant, kind in kinds.items():
            yield alone(config, model, dtype, contestant, "memory", name, kind, tuned_allocator=False)


def alone(
    config: Benchmark,
    model: str,
    dtype: str,
    contestant: str,
    suite: str,
    row: str,
    kind: Kind,
    tuned_allocator: bool,
    batch: int | None = None,
) -> Row:
    """The step of one contestant in a fresh process (bench/alone.py)."""
    batch, rounds = batch or config.batch_of(model), config.interleaved_rounds
    order = {
        "model": model,
        "batch": batch,
        "dtype": dtype,
        "contestant": contestant,
        "rounds": rounds,
        "threads": config.threads,
        "device": config.device,
        "tuned_allocator": tuned_allocator,
    }
    call = [sys.executable, "-m", "alexnet.bench.alone", json.dumps(order)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [f"ended with {done.returncode}", *done.stderr.strip().splitlines()][-1]
        result = Row(suite, row, dtype, contestant, kind, batch, note=said)
    else:
        told = json.loads(done.stdout.splitlines()[-1])
        result = Row(suite, row, dtype, contestant, kind, batch, rounds=rounds, **told)
    print_row(result)
    return result
