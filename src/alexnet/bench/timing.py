"""Contestants in interleaved rounds, and the rates of this machine that bound them."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

NOTHING = float("nan")
SHORTEST_SAMPLE = 0.02  # seconds; a faster contestant is called several times per sample


class Kind(StrEnum):
    ours = "ours"
    baseline = "baseline"
    as_run = "as people run it"  # another process, the default allocator
    yardstick = "yardstick"  # no competitor: a copy, or ours without one of its parts


@dataclass
class Contestant:
    """One way to do the work of a row. `run` may return its seconds, if it has a better clock than its caller."""

    name: str
    kind: Kind
    run: Callable[[], object]


@dataclass
class Row:
    """One line of the results. Times in milliseconds, per call; nan where a contestant refused to run."""

    suite: str
    row: str
    dtype: str
    contestant: str
    kind: str
    images: int  # per call; 0 where images mean nothing
    ms: float = NOTHING
    ms_low: float = NOTHING
    ms_high: float = NOTHING
    rounds: int = 0
    compile_s: float = 0.0  # the first call
    bound_ms: float = NOTHING  # what the machine could do at best, where such a bound is known
    peak_mib: float = NOTHING
    note: str = ""

    @property
    def share_of_bound(self) -> float:
        return self.bound_ms / self.ms

    @property
    def images_per_second(self) -> float:
        return self.images / self.ms * 1e3 if self.images else NOTHING


def interleave(
    suite: str,
    row: str,
    dtype: str,
    contestants: list[Contestant],
    rounds: int,
    images: int = 0,
    bound_ms: float = NOTHING,
    check: Callable[[], object] = lambda: None,
) -> list[Row]:
    """Times all contestants in turn, `rounds` times. One that raises is kept, with what it said.

    `check` raises if ours is wrong; it comes after the first calls, which compile, and before anything is timed.
    """
    started = [(c, *_first_call(c)) for c in contestants]
    check()
    repeats = {c.name: _repeats(c) for c, _, said in started if not said}
    samples: dict[str, list[float]] = {name: [] for name in repeats}
    gc.collect()
    for _ in range(rounds):
        for c, _, said in started:
            if not said:
                samples[c.name].append(_sample(c, repeats[c.name]))
    rows = []
    for c, first, said in started:
        ms = samples.get(c.name) or [NOTHING]
        middle, low, high = statistics.median(ms), min(ms), max(ms)
        bound = NOTHING if c.kind == Kind.yardstick else bound_ms
        rows.append(
            Row(suite, row, dtype, c.name, c.kind, images, middle, low, high, rounds, first, bound, note=said)
        )
        print_row(rows[-1])
    return rows


def print_row(row: Row) -> None:
    spread = row.note or f"{row.ms:10.2f} ms  ({row.ms_low:.2f} to {row.ms_high:.2f})"
    print(f"  {row.row:44s} {row.dtype:9s} {row.contestant:34s} {spread}", flush=True)


def _first_call(contestant: Contestant) -> tuple[float, str]:
    start = time.perf_counter()
    try:
        contestant.run()
        synchronise()
    except (RuntimeError, NotImplementedError) as error:
        return 0.0, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return time.perf_counter() - start, ""


def _repeats(contestant: Contestant) -> int:
    ms = _sample(contestant, 1)
    return max(1, round(SHORTEST_SAMPLE * 1e3 / ms))


def _sample(contestant: Contestant, repeats: int) -> float:
    synchronise()
    start = time.perf_counter()
    told: list[float] = []
    for _ in range(repeats):
        seconds = contestant.run()
        told += [seconds] if isinstance(seconds, float) else []
    synchronise()
    return (sum(told) or time.perf_counter() - start) / repeats * 1e3


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Machine:
    """What this machine did in this run."""

    copy_bytes_per_s: float  # read and written, of a tensor outside the caches
    flops: dict[str, float]  # of large products, by type

    def move_ms(self, moved: float) -> float:
        """Time to read or write so many bytes."""
        return moved / self.copy_bytes_per_s * 1e3

    def multiply_ms(self, multiply_adds: float, dtype: str) -> float:
        return 2 * multiply_adds / self.flops[dtype] * 1e3


def measured_machine(dtypes: list[str], device: str) -> Machine:
    """Rates of a copy outside the caches, and of the best of a matrix product (either way round) and a convolution."""
    big = torch.ones(2**26, device=device)  # 256 MB
    side, images = (2048, 32) if device == "cpu" else (8192, 1024)
    flops = {}
    for name in dtypes:
        a = torch.ones(side, side, dtype=getattr(torch, name), device=device)
        x = torch.ones(images, 256, 13, 13, dtype=a.dtype, device=device).to(
            memory_format=torch.channels_last
        )
        w = torch.ones(384, 256, 3, 3, dtype=a.dtype, device=device).to(memory_format=torch.channels_last)
        work: dict[Callable[[], Tensor], float] = {
            partial(torch.mm, a, a): side**3,
            partial(torch.mm, a, a.T): side**3,
            partial(F.conv2d, x, w, padding=1): images * 13**2 * w.numel(),
        }
        flops[name] = max(2 * multiply_adds / _fastest(run) for run, multiply_adds in work.items())
    return Machine(2 * big.nbytes / _fastest(big.clone), flops)


def _fastest(run: Callable[[], Tensor]) -> float:
    call = Contestant("", Kind.yardstick, run)
    _first_call(call)
    return min(_sample(call, 2) for _ in range(5)) / 1e3
