"""What a run of the benchmark leaves: a table for the terminal, CSV, JSON, Markdown and a picture."""

import csv
import json
import math
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from alexnet import cli
from alexnet.bench.config import Benchmark, Suite
from alexnet.bench.networks import CAPTURED
from alexnet.bench.timing import Kind, Machine, Row
from alexnet.errors import UserError
from alexnet.system import finite

COLUMNS = (
    *("suite", "row", "dtype", "contestant", "kind", "images", "ms", "ms_low", "ms_high", "rounds"),
    *("compile_s", "bound_ms", "share_of_bound", "images_per_second", "peak_mib", "note"),
)


def benchmark(config: Benchmark) -> list[Row]:
    """Runs the suites and writes <output_dir>/benchmark/. Returns every row."""
    from alexnet.bench import data, gpu, layers, steps
    from alexnet.bench.ceilings import measured_machine
    from alexnet.system import keep_freed_memory

    if config.threads:
        torch.set_num_threads(config.threads)
    tuned = config.tuned_allocator and keep_freed_memory()
    machine = measured_machine(config.dtypes, config.device)
    about = describe(config, machine, tuned)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    suites: dict[Suite, Iterable[Row]] = {
        Suite.layers: layers.rows(config, machine),
        Suite.step: steps.step_rows(config, machine),
        Suite.data: data.data_rows(config),
        Suite.end_to_end: data.end_to_end_rows(config),
        Suite.memory: steps.memory_rows(config),
        Suite.gpu: gpu.rows(config, machine),
    }
    directory = Path(config.output_dir) / "benchmark"
    rows: list[Row] = []
    for suite in config.suites:
        if config.device != "cpu" and suite in (Suite.data, Suite.end_to_end):
            print(f"suite {suite} is left out: it measures the CPU (device=cpu)")
            continue
        for row in suites[suite]:
            rows.append(row)
            save(rows, describe(config, machine, tuned), directory)  # what is measured stays, whatever comes
    if not rows and config.only:
        nowhere = f"is in the name of no row of suite={config.suite}"
        raise UserError(f"only={config.only} {nowhere}: give less of a name")
    finish(rows, describe(config, machine, tuned), directory)
    return rows


def describe(config: Benchmark, machine: Machine, tuned: bool) -> dict[str, Any]:
    """The machine, the versions and the best rates so far, which the bounds come from."""
    products = {kind: rate / 1e9 for kind, rate in machine.rates.items() if kind != "copy"}
    return {
        "processor": processor(config.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "allocator": "keeps freed memory" if tuned else "default",
        "copy": f"{machine.rates['copy'] / 1e9:.1f} GB/s, read and written",
        "matrix product": ", ".join(f"{kind} {rate:.0f} GFLOP/s" for kind, rate in products.items()),
        "date": time.strftime("%Y-%m-%d"),
        "quick": config.quick,
        "checked": config.check,
    }


def processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    features = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{len(names)} x {names[0]} ({', '.join(features)})" if names else platform.processor()


def ratio(ours: Row, group: list[Row], kind: Kind, word: str = "") -> tuple[float, str]:
    """How many times faster (or, for memory, smaller) ours is than the best of a kind, and which that is.

    Only those with `word` in their name.
    """
    others = [r for r in group if r.kind == kind and word in r.contestant and not math.isnan(amount(r))]
    if not others:
        return float("nan"), ""
    best = min(others, key=amount)
    return amount(best) / amount(ours), best.contestant


def amount(row: Row) -> float:
    """What the row is about: milliseconds, or MiB in the suite `memory`."""
    return row.peak_mib if row.suite == Suite.memory else row.ms


def headlines(rows: list[Row]) -> list[dict[str, Any]]:
    """One line for each of ours: beside the best baseline, and beside stock as people run it."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.row, row.dtype), []).append(row)
    lines = []
    for row in (row for group in groups.values() for row in group if row.kind == Kind.ours):
        group = groups[row.suite, row.row, row.dtype]
        launched = [r for r in group if CAPTURED not in r.contestant]
        best, against = ratio(row, group, Kind.baseline)
        line = {
            "suite": row.suite,
            "row": row.row,
            "dtype": row.dtype,
            "ours": row.contestant,
            "amount": amount(row),
            "compile_s": row.compile_s,
            "low": row.ms_low,
            "high": row.ms_high,
            "images_per_second": row.images_per_second,
            "share_of_bound": row.share_of_bound,
            "ratio": best,
            "baseline": against,
            "ratio_eager": ratio(row, launched, Kind.baseline, "eager")[0],
            "ratio_torchvision": ratio(row, group, Kind.yardstick, "torchvision")[0],
            "ratio_as_run": ratio(row, group, Kind.as_run)[0],
        }
        lines.append(line)
    return lines


HEAD = (
    *("", "type", "ours", "median (spread)", "images/s", "first call", "of the bound"),
    *("x best baseline", "which", "x eager", "x torchvision", "x as run"),
)


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """The README's table, under the machine and the date."""
    head = [f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, {about['date']}."]
    if about["quick"]:
        head.append("Quick run: it shows that everything runs; its ratios mean nothing.")
    if not about["checked"]:
        head.append(
            "**NOT CHECKED** (check=false): nobody asked whether what was timed computes the right numbers."
        )
    lines = [list(HEAD)]
    for line in headlines(rows):
        memory = line["suite"] == Suite.memory
        spread = "" if memory else f" ({line['low']:.1f}-{line['high']:.1f})"
        value = f"{line['amount']:.1f} {'MiB' if memory else 'ms'}{spread}"
        cells = [
            line["row"],
            line["dtype"],
            line["ours"],
            value,
            _shown("{:,.0f}", line["images_per_second"]),
        ]
        cells += [f"{line['compile_s']:.1f} s", _shown("{:.0f} %", 100 * line["share_of_bound"])]
        cells += [_shown("{:.2f}", line["ratio"]), line["baseline"]]
        cells += [_shown("{:.2f}", line[f"ratio_{other}"]) for other in ("eager", "torchvision", "as_run")]
        lines.append(cells)
    noted = [f"- {r.row}, {r.dtype}, {r.contestant}: {r.note}" for r in rows if r.note]
    return "\n".join([*head, "", cli.markdown(lines), *(["", *noted] if noted else []), ""])


def _shown(form: str, value: float) -> str:
    return "" if math.isnan(value) else form.format(value)


def save(rows: list[Row], about: dict[str, Any], directory: Path) -> None:
    """rows.csv, results.json and table.md."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)
    told = {"about": about, "headlines": headlines(rows), "rows": [asdict(row) for row in rows]}
    (directory / "results.json").write_text(json.dumps(finite(told), indent=1) + "\n")
    (directory / "table.md").write_text(markdown(rows, about))


def finish(rows: list[Row], about: dict[str, Any], directory: Path) -> None:
    """Shows the table, and draws the ratios as bars, if the plotting extra is installed."""
    print(f"\n{markdown(rows, about)}")
    try:
        from alexnet.pages.figures import ratios_figure
    except ModuleNotFoundError:
        print("no picture: matplotlib is missing (pip install 'alexnet[plots]')")
    else:
        lines = [line for line in headlines(rows) if not math.isnan(line["ratio"])]
        names = [f"{line['row']}, {line['dtype']}: {line['ours']}" for line in lines]
        title = f"{about['processor']}, {about['date']}" + (" (quick run)" if about["quick"] else "")
        label = "times as fast as the best baseline (memory: as small)"
        ratios_figure(names, [line["ratio"] for line in lines], directory / "benchmark.png", label, title)
    print(directory)
