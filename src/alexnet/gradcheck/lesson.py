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
from alexnet.gradcheck.mathematics import MAP, glossary, located, numbers
from alexnet.gradcheck.mutants import Kill
from alexnet.gradcheck.rules import RULES
from alexnet.gradcheck.walk import DECAY, MOMENTUM, RATE, walk
from alexnet.pages.html import mathematics, picture, render

SECTIONS = {
    "linear": "Linear: fc6, fc7, fc8",
    "conv2d": "Convolution",
    "relu": "ReLU",
    "tanh": "Tanh",
    "max_pool2d": "Overlapping max pooling",
    "local_response_norm": "Local response normalisation",
    "same_map_norm": "Normalisation within a map",
    "relu_lrn_pool": "ReLU, norm and pool in one",
    "dropout": "Dropout",
    "cross_entropy": "Softmax and cross-entropy",
}
CHECKS = {"differences": "a) differences", "autograd": "b) autograd", "identity": "c) identity"}
DTYPES = ("float64", "float32", "bfloat16")


def write_lesson(
    path: Path, results: list[Result], kills: list[Kill], verdict: str, made: dict[str, Any]
) -> None:
    """The page, with whatever was measured in this run. `made` says how: command, versions, hardware, git."""
    derived = {name: import_module(f"alexnet.layers.{name}") for name in SECTIONS} | {"optim": optim}
    measured = {name: [r for r in results if r.operation == name] for name in SECTIONS}
    places: dict[str, list[Kill]] = {name: [] for name in (*SECTIONS, *RULES)}
    for kill in kills:
        places[kill.where].append(kill)
    steps, compared = walk()
    page = render(
        "gradcheck/gradients.html",
        verdict=verdict,
        mutants=len(kills),
        alive=sum(not kill.killed_by for kill in kills),
        sections=SECTIONS,
        titles={name: title(module) for name, module in derived.items()},
        derivations={name: mathematics(chapter(module)) for name, module in derived.items()},
        plain=lambda caption: caption.replace("$", "").replace("\\", ""),
        measured={name: _worst_rows(found) for name, found in measured.items()},
        counts={name: _count(found) for name, found in measured.items()},
        kills=places,
        results=_results(results),
        pictures={name: picture(svg) for name, svg in pictures(results).items()},
        ideas=MAP,
        numbers=numbers(),
        located=located,
        terms=glossary(),
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


def _worst_rows(results: list[Result]) -> list[dict[str, Any]]:
    """The worst case of each check, type, backend and device."""
    groups: dict[tuple[Any, ...], list[Result]] = defaultdict(list)
    for r in results:
        place = (list(CHECKS).index(r.check), DTYPES.index(r.dtype))
        groups[r.backend, r.device, *place].append(r)
    many = len({group[:2] for group in groups}) > 1
    rows = []
    for (backend, device, *_), found in sorted(groups.items()):
        worst = max(found, key=lambda result: result.share)
        where = f", {backend} on {device}" if many else ""
        rows.append({**_row(worst), "check": CHECKS[worst.check], "dtype": worst.dtype, "where": where})
    return rows


def _row(result: Result) -> dict[str, Any]:
    value, bound = f"{result.value:.1e}", f"{result.bound:.0e}" if result.bound else "0"
    if result.check == "autograd" and result.dtype != "float64":
        value, bound = "", "rounding"  # a bound for every element: only the share of it has a meaning
    elif result.what.startswith("slope"):
        value, bound = result.what, "2 ± 0.1"
    share = f"{100 * result.share:.1f} %"
    return {"case": result.case, "value": value, "bound": bound, "share": share, "passed": result.passed}


def _count(results: list[Result]) -> str:
    if not results:
        return "Not checked in this run."
    kinds = [kind for kind, _ in {(r.kind, r.case) for r in results}]
    large = kinds.count("paper") + kinds.count("large")
    return (
        f"{len(results)} checks on {kinds.count('ordinary')} ordinary, {kinds.count('awkward')} awkward and {large} "
        "paper-sized cases; the worst of each kind is shown."
    )


def _results(results: list[Result]) -> dict[str, list[dict[str, Any]]]:
    """What is checked as a whole; of the gradients of each parameter the worst, and all of them on their own."""
    parameters = [r for r in results if r.check == "parameters"]
    worst = [max(parameters, key=lambda result: result.share)] if parameters else []
    network = [r for r in results if r.kind == "network" and r.check != "parameters"]
    tables = {place: [r for r in results if r.operation == place] for place in RULES}
    tables |= {"network": worst + network, "parameters": parameters}

    def name(r: Result) -> str:
        if r.check == "rule":
            return r.case
        what = {"directions": "random directions", "parameters": f"gradient of {r.what}"}.get(r.check, r.what)
        return f"{r.operation.removeprefix('network ')}, {r.backend} on {r.device}: {what}"

    return {place: [{**_row(r), "case": name(r)} for r in found] for place, found in tables.items()}


# ---- numbers of the walk --------------------------------------------------------------------------------------


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
