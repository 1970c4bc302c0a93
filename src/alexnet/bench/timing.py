"""Contestants in interleaved rounds, and the rates of this machine that bound them."""

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from alexnet.system import set_precision

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
class Machine:
    """The best rates that this machine reached in this run: bytes/s of a copy, FLOP/s of products by type.

    `calls` are what reaches them: by kind ("copy" or a type), functions and the bytes or FLOP of one call.
    """

    rates: dict[str, float]
    calls: dict[str, list[tuple[Callable[[], object], float]]] = field(default_factory=dict)

    def measure(self, kind: str) -> None:
        """Once more; a better rate replaces the old one."""
        for call, work in self.calls.get(kind, []):
            self.rates[kind] = max(self.rates.get(kind, 0.0), work / fastest_of(call, samples=1))


@dataclass
class Bound:
    """What the machine could do at best: so many bytes to move ("copy") or FLOP to do in a type."""

    machine: Machine
    kind: str
    work: float

    @property
    def ms(self) -> float:
        return self.work / self.machine.rates[self.kind] * 1e3


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
    bound: Bound | None = None,
    check: Callable[[], object] | None = None,
    deadline: float = math.inf,
) -> list[Row]:
    """Times all contestants in turn, `rounds` times. One that raises is kept, with what it said.

    All compute in the precision of the row (`set_precision`). `check` raises if ours is wrong; it comes after the
    first calls, which compile, and before anything is timed. The bound is measured before, between and after the
    rounds. After `deadline` (time.monotonic) no contestant and no second round begins.
    """
    set_precision(dtype)
    rows = [Row(suite, row, dtype, c.name, c.kind, images) for c in contestants]
    both = list(zip(contestants, rows, strict=True))
    for c, found in both:
        found.compile_s, found.note = _first_call(c, deadline)
    if check:
        check()
        set_precision(dtype)
    repeats = {c.name: _repeats(c) for c, found in both if not found.note}
    samples: dict[str, list[float]] = {c.name: [] for c in contestants}
    gc.collect()
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            break
        if bound:
            bound.machine.measure(bound.kind)
        for c, found in both:
            if found.note:
                continue
            try:
                samples[c.name].append(sample(c, repeats[c.name]))
            except torch.OutOfMemoryError:
                found.compile_s, found.note = 0.0, "out of memory beside the others"
    if bound:
        bound.machine.measure(bound.kind)
    for c, found in both:
        ms = samples[c.name] or [NOTHING]
        found.ms, found.ms_low, found.ms_high = statistics.median(ms), min(ms), max(ms)
        found.rounds = len(ms)
        if bound and c.kind != Kind.yardstick:
            found.bound_ms = bound.ms
        if found.share_of_bound > 1:
            share = f"at {100 * found.share_of_bound:.0f} % of the bound"
            found.note = f"{share}, which is none: the rate behind it was measured too low"
        print_row(found)
    return rows


def print_row(row: Row) -> None:
    spread = "" if math.isnan(row.ms) else f"{row.ms:10.2f} ms  ({row.ms_low:.2f} to {row.ms_high:.2f}) "
    print(f"  {row.row:44s} {row.dtype:9s} {row.contestant:34s} {spread}{row.note}", flush=True)


def _first_call(contestant: Contestant, deadline: float) -> tuple[float, str]:
    """Its seconds, and what it said if it raised."""
    if time.monotonic() > deadline:
        return 0.0, "not run: the time was used up"
    start = time.perf_counter()
    try:
        contestant.run()
        synchronise()
    except Exception as error:  # whatever it is, the others must still run
        return 0.0, f"{type(error).__name__}: {[*str(error).splitlines(), ''][0]}"
    return time.perf_counter() - start, ""


def _repeats(contestant: Contestant) -> int:
    return max(1, round(SHORTEST_SAMPLE * 1e3 / sample(contestant)))


def sample(contestant: Contestant, repeats: int = 1) -> float:
    """Milliseconds of a call."""
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


def fastest_of(run: Callable[[], object], samples: int) -> float:
    """Seconds of a call."""
    call = Contestant("", Kind.yardstick, run)
    run()
    repeats = _repeats(call)
    return min(sample(call, repeats) for _ in range(samples)) / 1e3
