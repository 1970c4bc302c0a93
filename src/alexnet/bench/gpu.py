"""Suite `gpu`: a training step and the norms on one CUDA device, the most informative rows first.

Every step runs as people write it ("eager", launched kernel by kernel) and captured in a CUDA graph, ours and the
baselines alike. `native` is our network and update with torch's own operators. When `budget_s` is nearly used up,
nothing new begins; what is measured is on disk by then.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import torch

from alexnet.bench import networks
from alexnet.bench.check import check
from alexnet.bench.config import Benchmark
from alexnet.bench.layers import SHAPES, norm_rows
from alexnet.bench.networks import CAPTURED, LIBRARY_CHOOSES, TRITON_NORMS, TUNED
from alexnet.bench.steps import alone, row_name
from alexnet.bench.timing import Bound, Contestant, Kind, Machine, Row, interleave, synchronise

OURS = ("fastest", TRITON_NORMS, "fast", "reference")
RESERVE = 15.0  # seconds kept for the rounds of a row that has begun


def rows(config: Benchmark, machine: Machine) -> Iterator[Row]:
    deadline = math.inf if config.budget_s is None else time.monotonic() + config.budget_s - RESERVE
    first_batch = config.batches_on_gpu[0]
    for dtype in config.dtypes:
        for batch in config.batches_on_gpu:
            for i, model in enumerate(config.models):
                found = list(step_rows(config, machine, model, batch, dtype, deadline))
                yield from found
                if i == 0 and batch == first_batch:
                    try:
                        profile_best(config, found, model, batch, dtype)
                    except RuntimeError as error:
                        print(f"  no profile: {error}")
                    for channels, side in SHAPES:
                        if not _over(f"norms of {channels} maps", deadline):
                            yield from norm_rows(config, machine, dtype, channels, side, batch)
    for model in config.models[:2]:
        yield from library_chooses(config, model, first_batch, config.dtypes[0], deadline)


def names(dtype: str, quick: bool) -> list[str]:
    """Contestants of a row, the most informative first."""
    kind = f"bf16 weights, {TUNED}" if dtype == "bfloat16" else TUNED
    eager, compiled, torchvision = f"stock eager, {kind}", f"stock compiled, {kind}", f"no norm, {TUNED}"
    both = ["fastest", compiled, "native", eager, TRITON_NORMS, f"torchvision eager, {torchvision}", "fast"]
    found = [f"{name}{CAPTURED}" for name in both] + both
    found += ["reference", f"{compiled}, reduce-overhead"]
    found += ["stock eager, autocast"] if dtype == "bfloat16" else []
    if quick:
        return found
    # The last takes minutes to compile.
    return [*found, f"torchvision compiled, {torchvision}{CAPTURED}", f"{compiled}, max-autotune"]


def step_rows(
    config: Benchmark, machine: Machine, model: str, batch: int, dtype: str, deadline: float
) -> Iterator[Row]:
    name = row_name("step", model, batch)
    if config.only not in name or _over(name, deadline):
        return
    given = networks.task(model, batch, dtype, config.device)
    contestants = [
        Contestant(n, kind_of(n), late(n, given, model, dtype, config.check))
        for n in names(dtype, config.quick)
    ]
    bound = Bound(machine, dtype, 2 * networks.multiply_adds(given.config) * batch)
    rounds = config.interleaved_rounds
    yield from interleave("gpu", name, dtype, contestants, rounds, batch, bound, deadline=deadline)
    del contestants, given
    gc.collect()
    torch.cuda.empty_cache()


def _over(name: str, deadline: float) -> bool:
    """Whether there is no time to begin a row."""
    over = time.monotonic() > deadline
    if over:
        print(f"  {name}: not begun, budget_s is used up")
    return over


def kind_of(name: str) -> Kind:
    backend = name.removesuffix(CAPTURED)
    return Kind.ours if backend in OURS else Kind.yardstick if "torchvision" in name else Kind.baseline


def late(name: str, given: networks.Task, model: str, dtype: str, checked: bool) -> Callable[[], object]:
    """The step of a contestant that is made, and if it is ours checked, at its first call."""

    @cache
    def step() -> Callable[[], object]:
        if checked and kind_of(name) == Kind.ours:
            right(model, name.removesuffix(CAPTURED), dtype, str(given.images.device))
        return networks.contestant_named(name, given).run

    return lambda: step()()


right = cache(check)  # once for the captured and the eager form; a failure raises for each


def library_chooses(config: Benchmark, model: str, batch: int, dtype: str, deadline: float) -> Iterator[Row]:
    """With `cudnn.benchmark`, in processes of their own: a process keeps the first algorithm it took for a shape."""
    name = row_name("step", model, batch)
    stock = next(n for n in names(dtype, quick=True) if n.startswith("stock eager"))
    for contestant in ("fastest", "native", stock.removesuffix(CAPTURED)):
        if config.only in name and not _over(f"{name}, {contestant}{LIBRARY_CHOOSES}", deadline):
            called = f"{contestant}{CAPTURED}{LIBRARY_CHOOSES}"
            row = Row("gpu", name, dtype, called, kind_of(contestant), batch)
            yield alone(config, model, row, config.tuned_allocator)


def profile_best(config: Benchmark, found: list[Row], model: str, batch: int, dtype: str) -> None:
    """Writes the kernels of the best of ours, launched one by one, with their times."""
    best = min((r for r in found if r.kind == Kind.ours and r.ms > 0), key=lambda r: r.ms, default=None)
    if best is None:
        return
    launched = best.contestant.removesuffix(CAPTURED)
    step = networks.contestant_named(launched, networks.task(model, batch, dtype, config.device)).run
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            step()
        synchronise()
    averages = profile.key_averages()
    table = averages.table(sort_by="self_cuda_time_total", row_limit=60, max_name_column_width=90)
    path = Path(config.output_dir) / "benchmark" / f"profile_{model}_{batch}_{dtype}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{best.contestant}, {model}, batch {batch}, {dtype}: 5 steps\n{table}\n")
