"""One contestant's step in a process of its own: python -m alexnet.bench.alone '<order as JSON>'.

Prints its times and its peak of memory as JSON: what the process held at most during steps after the first, less what
it held before the first (CUDA: the peak of allocated memory). The compiler is loaded before, for every contestant:
its modules are no part of a step. What it makes of this step counts.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from alexnet.bench.networks import LIBRARY_CHOOSES, contestant_named, task
from alexnet.bench.timing import sample
from alexnet.system import keep_freed_memory, set_precision

STATUS = Path("/proc/self/status")


def measure(
    model: str,
    batch: int,
    dtype: str,
    contestant: str,
    rounds: int,
    device: str,
    threads: int | None,
    tuned_allocator: bool,
) -> dict[str, Any]:
    """Times (ms), compile_s and peak_mib of a step."""
    if threads:
        torch.set_num_threads(threads)
    if tuned_allocator:
        keep_freed_memory()
    set_precision(dtype)
    torch.backends.cudnn.benchmark = contestant.endswith(LIBRARY_CHOOSES)
    given = task(model, batch, dtype, device)
    step = contestant_named(contestant.removesuffix(LIBRARY_CHOOSES), given)
    torch.compile(torch.neg)(torch.ones(2))
    before = held("VmRSS")
    compile_s = sample(step) / 1e3
    # The peak of compiling is over, that of steps counts from here: VmHWM is set back to VmRSS.
    Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    ms = [sample(step) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else held("VmHWM") - before
    times = {"ms": statistics.median(ms), "ms_low": min(ms), "ms_high": max(ms)}
    return {**times, "compile_s": compile_s, "peak_mib": peak}


def held(key: str) -> float:
    """MiB that the kernel counts for this process now (VmRSS) or at most so far (VmHWM)."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
