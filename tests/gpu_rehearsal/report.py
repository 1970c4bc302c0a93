"""Counts every case and writes .github/results/gpu_rehearsal: python tests/gpu_rehearsal/report.py [<name>].

<name>.json holds the figures, table.md those of every name beside the budgets; without a name only the table is made.
"""

import json
import subprocess
import sys

import nullcuda
import torch
import triton
from budgets import BUDGETS, CASES, figures

RESULTS = nullcuda.ROOT / ".github/results/gpu_rehearsal"
HEADER = """# A training step on a CUDA that computes nothing

Counted, not measured: launches, bytes, products and waits are those of the code that a GPU would run; times of kernels
are unknown, and the host's are CPU time on a machine without a GPU. `tiny` in batches of 128 for fastest, fast and
captured, a small `mini` for the others. Repeat with `python tests/gpu_rehearsal/report.py <name>`.

"""


def counted() -> dict[str, object]:
    found: dict[str, object] = {}
    for case in CASES:
        try:
            numbers = {key: value for key, value in figures(case).items() if key != "details"}
            found[case] = {key: float(f"{value:.4g}") for key, value in numbers.items()}
        except RuntimeError as error:  # a case that this version of the code does not have
            found[case] = {"error": str(error).splitlines()[-1]}
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=nullcuda.ROOT, check=True, capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "triton": triton.__version__, "cases": found}


def table(names: list[str]) -> str:
    found = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    titles = [f"{name}: {result['commit']}, torch {result['torch']}" for name, result in found.items()]
    lines = [f"| case | figure | budget | {' | '.join(titles)} |", "|---|---|---|" + "---|" * len(titles)]
    for case, figure, most in BUDGETS:
        values = [result["cases"][case].get(figure) for result in found.values()]
        shown = ["-" if value is None else f"{value:.4g}" for value in values]
        lines.append(f"| {case} | {figure} | {most:g} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def main(name: str | None = None) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    if name:
        (RESULTS / f"{name}.json").write_text(json.dumps(counted(), indent=1) + "\n")
    names = sorted((path.stem for path in RESULTS.glob("*.json")), key=lambda stem: (stem != "before", stem))
    (RESULTS / "table.md").write_text(HEADER + table(names))
    print(table(names), f"\n{RESULTS / 'table.md'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
