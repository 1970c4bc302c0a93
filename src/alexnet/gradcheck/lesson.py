"""The HTML page a learner reads: the derivations of the layer files, with this run's measurements and pictures."""

import re
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from alexnet import optim
from alexnet.gradcheck.checks import Result
from alexnet.gradcheck.derivation import chapter, title
from alexnet.gradcheck.figures import pictures
from alexnet.gradcheck.mathematics import GLOSSARY, MAP, located, numbers
from alexnet.gradcheck.mutants import Kill
from alexnet.gradcheck.walk import DECAY, MOMENTUM, RATE, walk
from alexnet.layers.backend import OPERATIONS
from alexnet.pages.html import mathematics, picture, render

CHECKS = {"differences": "a) differences", "autograd": "b) autograd", "identity": "c) identity"}
DTYPES = ("float64", "float32", "bfloat16")


def write_lesson(
    path: Path, results: list[Result], kills: list[Kill], verdict: str, made: dict[str, Any]
) -> None:
    """The page, with whatever was measured in this run. `made` says how: command, versions, hardware, git."""

    def results_of(name: str) -> list[Result]:
        return [result for result in results if result.operation == name]

    derived = {name: import_module(f"alexnet.layers.{name}") for name in OPERATIONS} | {"optim": optim}
    # What is checked as a whole; of the gradients of each parameter the worst, and all of them on their own.
    network = [r for r in results if r.kind == "network" and r.check != "parameters"]
    parameters = [r for r in results if r.check == "parameters"]
    worst = [max(parameters, key=lambda result: result.share)] if parameters else []
    steps, compared = walk()
    page = render(
        "gradcheck/gradients.html",
        verdict=verdict,
        titles={name: title(module) for name, module in derived.items()},
        derivations={name: mathematics(chapter(module)) for name, module in derived.items()},
        plain=lambda caption: caption.replace("$", "").replace("\\", ""),
        checks=CHECKS,
        results_of=results_of,
        worst_of=lambda name: _worst(results_of(name)),
        network=worst + network,
        parameters=parameters,
        kills=kills,
        pictures={name: picture(svg) for name, svg in pictures(results).items()},
        ideas=MAP,
        numbers=numbers(),
        located=located,
        terms=GLOSSARY,
        steps=[[(name, _matrix(x)) for name, x in step.items()] for step in steps],
        compared=[
            {
                "name": re.sub(r"([wb])(\d)", r"\1_\2", name),
                "ours": _listed(ours),
                "theirs": _listed(theirs),
                "difference": f"{float((ours - theirs).abs().max()):.0e}",
            }
            for name, ours, theirs in compared
        ],
        constants=(RATE, MOMENTUM, DECAY),
        made=made,
    )
    path.write_text(page, encoding="utf-8")


def _worst(results: list[Result]) -> list[tuple[Result, str]]:
    """The worst case of each check, type, backend and device, and where that was if there are several places."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        groups[r.backend, r.device, list(CHECKS).index(r.check), DTYPES.index(r.dtype)].append(r)
    many = len({group[:2] for group in groups}) > 1
    found = [max(groups[group], key=lambda result: result.share) for group in sorted(groups)]
    return [(worst, f", {worst.backend} on {worst.device}" if many else "") for worst in found]


def _four_digits(number: float) -> str:
    return f"{number + 0.0:.4g}"  # + 0.0: no -0


def _matrix(x: Tensor) -> str:
    """As LaTeX."""
    if x.dim() == 0:
        return _four_digits(float(x))
    rows = [" & ".join(map(_four_digits, row)) for row in x.reshape(-1, x.shape[-1]).tolist()]
    return r"\begin{pmatrix} " + r" \\ ".join(rows) + r" \end{pmatrix}"


def _listed(x: Tensor) -> str:
    return ", ".join(map(_four_digits, x.flatten().tolist()))
