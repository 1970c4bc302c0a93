"""The HTML page a learner reads: the derivations of the layer files, with this run's measurements and pictures.

Every picture is drawn from what the layers themselves computed, backward included.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet import layers, optim
from alexnet.data import synthetic
from alexnet.gradcheck.cases import Evaluation
from alexnet.gradcheck.checks import Result, Trial, differences
from alexnet.gradcheck.derivation import chapter, title
from alexnet.gradcheck.figures import (
    block_picture,
    convolution_picture,
    cross_entropy_picture,
    differences_picture,
    linear_picture,
    maps_picture,
    masks_picture,
    pool_picture,
    response_norm_picture,
    units_picture,
    update_picture,
)
from alexnet.gradcheck.mathematics import MAP, Idea, glossary, located
from alexnet.gradcheck.mutants import Kill, mutate
from alexnet.gradcheck.operations import ALL, LOCAL_RESPONSE_NORM
from alexnet.gradcheck.rules import RULES
from alexnet.gradcheck.walk import walk
from alexnet.layers.local_response_norm import local_response_norm_backward
from alexnet.layers.pair import PAIRS
from alexnet.model import AlexNet, ModelConfig
from alexnet.optim import Krizhevsky
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
WRONG = "gradient off by 1e-6"
CHECKS = {"differences": "a) differences", "autograd": "b) autograd", "identity": "c) identity"}


def write_lesson(
    path: Path, results: list[Result], kills: list[Kill], verdict: str, made: dict[str, Any]
) -> None:
    """The page, with whatever was measured in this run. `made` says how: command, versions, hardware, git."""
    page = render(
        "gradcheck/gradients.html",
        verdict=verdict,
        survivors=_survivors(kills),
        sections=SECTIONS,
        titles={name: title(module) for name, module in _derived().items()},
        derivations={name: mathematics(chapter(module)) for name, module in _derived().items()},
        plain=lambda caption: caption.replace("$", "").replace("\\", ""),
        measured={name: _worst_rows(_of(results, name)) for name in SECTIONS},
        counts={name: _count(_of(results, name)) for name in SECTIONS},
        kills=_by_place(kills),
        results=_results(results),
        pictures={name: picture(draw()) for name, draw in _pictures(results).items()},
        ideas={branch: [_idea(idea) for idea in ideas] for branch, ideas in MAP.items()},
        terms=glossary(),
        **_walk(),
        command=made["command"],
        provenance=_provenance(made),
        skipped=made["skipped"],
    )
    path.write_text(page, encoding="utf-8")


def _derived() -> dict[str, ModuleType]:
    """The modules whose docstrings are chapters."""
    return {name: import_module(f"alexnet.layers.{name}") for name in SECTIONS} | {"optim": optim}


def _idea(idea: Idea) -> dict[str, str]:
    return {**idea._asdict(), "number": idea.number(), "place": located(idea.place)}


def _walk() -> dict[str, Any]:
    """The steps with their numbers as LaTeX, and the comparison with autograd."""
    steps, compared = walk()
    rows = [
        {
            "name": re.sub(r"([wb])(\d)", r"\1_\2", name),
            "ours": _listed(ours),
            "theirs": _listed(theirs),
            "difference": f"{float((ours - theirs).abs().max()):.0e}",
        }
        for name, ours, theirs in compared
    ]
    shown = [
        {**step._asdict(), "numbers": [(n, _matrix(x)) for n, x in step.numbers.items()]} for step in steps
    ]
    return {"steps": shown, "compared": rows}


def _four_digits(number: float) -> str:
    return f"{number + 0.0:.4g}".replace("-0", "0") if number == 0 else f"{number:.4g}"


def _matrix(x: Tensor) -> str:
    if x.dim() == 0:
        return _four_digits(float(x))
    rows = [" & ".join(map(_four_digits, row)) for row in x.reshape(-1, x.shape[-1]).tolist()]
    return r"\begin{pmatrix} " + r" \\ ".join(rows) + r" \end{pmatrix}"


def _listed(x: Tensor) -> str:
    return ", ".join(map(_four_digits, x.flatten().tolist()))


# ---- tables ---------------------------------------------------------------------------------------------------


def _of(results: list[Result], operation: str) -> list[Result]:
    return [result for result in results if result.operation == operation]


def _worst_rows(results: list[Result]) -> list[dict[str, Any]]:
    """The worst case of each check, type, backend and device."""
    groups: dict[tuple[str, ...], list[Result]] = defaultdict(list)
    for result in results:
        groups[result.check, result.dtype, result.backend, result.device].append(result)
    many = len({(r.backend, r.device) for r in results}) > 1
    rows = []
    for (check, dtype, backend, device), found in sorted(groups.items(), key=_order):
        worst = max(found, key=lambda result: result.share)
        where = f", {backend} on {device}" if many else ""
        rows.append({**_row(worst), "check": CHECKS[check], "dtype": dtype, "where": where})
    return rows


def _order(group: tuple[tuple[str, ...], list[Result]]) -> tuple[Any, ...]:
    check, dtype, backend, device = group[0]
    return backend, device, list(CHECKS).index(check), ("float64", "float32", "bfloat16").index(dtype)


def _row(result: Result) -> dict[str, Any]:
    """A rounding bound is a bound for every element: only the share of it has a meaning."""
    rounded = result.check == "autograd" and result.dtype != "float64"
    slope = result.what.startswith("slope")
    value, bound = f"{result.value:.1e}", f"{result.bound:.0e}" if result.bound else "0"
    if rounded or slope:
        value, bound = ("", "rounding") if rounded else (result.what, "2 ± 0.1")
    share = f"{100 * result.share:.1f} %"
    return {"case": result.case, "value": value, "bound": bound, "share": share, "passed": result.passed}


def _results(results: list[Result]) -> dict[str, list[dict[str, Any]]]:
    """What is checked as a whole; of the gradients of each parameter the worst, and all of them on their own."""
    network = [r for r in results if r.kind == "network" and r.check != "parameters"]
    parameters = [r for r in results if r.check == "parameters"]
    worst = [max(parameters, key=lambda result: result.share)] if parameters else []
    rules = {place: [r for r in results if r.operation == place] for place in RULES}
    chosen = {"network": worst + network, "parameters": parameters, **rules}
    return {place: [{**_row(r), "case": _name(r)} for r in found] for place, found in chosen.items()}


def _name(result: Result) -> str:
    if result.check == "rule":
        return result.case
    what = {"directions": "random directions", "parameters": f"gradient of {result.what}"}
    where = f"{result.backend} on {result.device}"
    return f"{result.operation.removeprefix('network ')}, {where}: {what.get(result.check, result.what)}"


def _count(results: list[Result]) -> str:
    if not results:
        return "Not checked in this run."
    cases = {kind: len({r.case for r in results if r.kind == kind}) for kind in ("ordinary", "awkward")}
    large = len({r.case for r in results if r.kind in ("paper", "large")})
    total = f"{len(results)} checks on {cases['ordinary']} ordinary, {cases['awkward']} awkward"
    return f"{total} and {large} paper-sized cases; the worst of each kind is shown."


def _by_place(kills: list[Kill]) -> dict[str, list[Kill]]:
    places: dict[str, list[Kill]] = {name: [] for name in (*SECTIONS, *RULES)}
    for kill in kills:
        places[kill.where].append(kill)
    return places


def _survivors(kills: list[Kill]) -> str | None:
    if not kills:
        return None
    alive = sum(not kill.killed_by for kill in kills)
    return f"{len(kills)} mutants of the code were checked: {len(kills) - alive} killed, {alive} survived."


def _provenance(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    hardware = made["hardware"]
    machine = f"{hardware['cpu']}, {hardware['threads']} threads"
    machine += "".join(f", {gpu}" for gpu in hardware.get("gpus", []))
    commit = f"; commit {made['git']['commit'][:12]}" if made["git"] else ""
    return f"{machine}; {versions}{commit}; {made['seconds']:.0f} seconds."


# ---- pictures -------------------------------------------------------------------------------------------------


def _pictures(results: list[Result]) -> dict[str, Callable[[], str]]:
    return {
        "differences": lambda: differences_picture(_curves(results), WRONG),
        "linear": _linear,
        "convolution": _convolution,
        "units": _units,
        "pool": _pool,
        "response_norm": _response_norm,
        "same_map": _same_map,
        "block": _block,
        "dropout": _dropout,
        "cross_entropy": _cross_entropy,
        "update": _update,
    }


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).double()


def _curves(results: list[Result]) -> dict[str, list[tuple[float, float]]]:
    """One curve for each curved operation, and one with a wrong gradient."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for operation in ALL:
        if operation.curved:
            key = (operation.name, operation.cases[0].name, "differences")
            found = [r for r in results if (r.operation, r.case, r.check) == key]
            result = found[0] if found else differences(Trial(operation, operation.cases[0], "reference"))
            curves[operation.name] = result.curve
    with mutate(local_response_norm_backward, "return cast(", "return (1 + 1e-6) * cast("):
        trial = Trial(LOCAL_RESPONSE_NORM, LOCAL_RESPONSE_NORM.cases[0], "reference")
        curves[WRONG] = differences(trial).curve
    return curves


def _linear() -> str:
    return linear_picture(_random(3, 7), _random(3, 5, seed=1))


def _units() -> str:
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    relu, tanh = (Evaluation.of(f, {}, [x], torch.ones_like(x)) for f in (layers.relu, layers.tanh))
    return units_picture(x, (relu.y, relu.dx), (tanh.y, tanh.dx))


def _convolution() -> str:
    w = torch.tensor([[1.0, 2, 3], [4, 5, 6], [0, 0, 9]], dtype=torch.float64)
    dy = torch.zeros(5, 5, dtype=torch.float64)
    dy[1, 1], dy[2, 3] = 1, -1
    strided = _integers(-2, 3, 3, 3, seed=5)
    inputs = [torch.zeros(1, 1, 7, 7, dtype=torch.float64), w[None, None]]
    dx, strided_dx = (
        Evaluation.of(layers.conv2d, {"stride": stride}, inputs, arriving[None, None]).dx[0, 0]
        for stride, arriving in ((1, dy), (2, strided))
    )
    spread = torch.zeros(9, 9, dtype=torch.float64)  # a frame of two zeros: every pixel's window fits
    spread[2:7:2, 2:7:2] = strided
    return convolution_picture(w, dy, dx, spread, strided_dx, pixel=(2, 3))


POOLED = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 7, 0], [3, 2, 12, 8, 4, 6, 2], [6, 4, 3, 10, 3, 8, 1],
          [2, 7, 9, 5, 0, 2, 11]]  # fmt: skip


def _pool() -> str:
    x = torch.tensor(POOLED, dtype=torch.float64)
    dy = torch.tensor([[2.0, -1, 3], [1, 4, -2]], dtype=torch.float64)
    at = Evaluation.of(layers.max_pool2d, {"kernel_size": 3, "stride": 2}, [x[None, None]], dy[None, None])
    place = PAIRS["max_pool2d", "reference"].forward(at.x, (3, 3), (2, 2), (0, 0), False, "first")[1]
    winners = [
        (2 * p + int(k) // 3, 2 * q + int(k) % 3)
        for p, row in enumerate(place[0, 0])
        for q, k in enumerate(row)
    ]
    return pool_picture(x, dy, at.dx[0, 0], winners)


def _conv1_responses() -> Tensor:
    """One tower's 48 maps (1, 48, 55, 55): first weights of 2012, an image of the embedded set minus its mean."""
    net = AlexNet(ModelConfig(), seed=0)
    image = torch.from_numpy(synthetic.draw(np.array([9]), 224, np.random.default_rng(0))).double()
    x = (image - image.mean()).permute(0, 3, 1, 2)
    w = net.conv1.weight.detach().double()
    return layers.conv2d(x, w, None, 4, (0, 3, 0, 3))[:, :48]


def _response_norm() -> str:
    responses = _conv1_responses()
    pixel = int(responses.square().sum(1).flatten().argmax())
    x = responses.flatten(2)[:, :, pixel]
    constants = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
    # The strongest s = k + alpha/n sum x^2 is brought to 3 k.
    sums = x.square()[:, None].unfold(2, 5, 1).sum(-1)
    x = x * (2 * constants["k"] / (constants["alpha"] / 5 * sums.max())).sqrt()
    chosen = int(x[0, 2:-2].argmax()) + 2
    one = torch.zeros_like(x)
    one[0, chosen] = 1
    single = Evaluation.of(layers.local_response_norm, constants, [x], one)
    at = Evaluation.of(layers.local_response_norm, constants, [x], _random(*x.shape, seed=3))
    gain = at.dy * at.y / x
    return response_norm_picture(x[0], at.y[0], chosen, single.dx[0], gain[0], (gain - at.dx)[0])


def _same_map() -> str:
    x = _conv1_responses()[:, 5:6, 24:33, 20:29]
    x = x / x.square().mean().sqrt()
    one = torch.zeros_like(x)
    one[0, 0, 4, 4] = 1
    constants = {"size": 5, "alpha": 25 * 0.05, "k": 1.0}
    dx = Evaluation.of(layers.same_map_norm, constants, [x], one).dx
    return maps_picture({"x": x[0, 0], "dx, dy at the centre alone": dx[0, 0]}, figsize=(7.4, 3.7))


def _block() -> str:
    x = _random(1, 6, 7, 7, seed=4)
    dy = _random(1, 6, 3, 3, seed=5)
    constants = {"size": 5, "alpha": 5.0, "k": 1.0}
    gradients = {}
    for panel, order in {"dx, paper": "relu_lrn_pool", "dx, 2012 code": "lrn_pool_relu"}.items():
        at = Evaluation.of(layers.relu_lrn_pool, {**constants, "order": order}, [x], dy)
        gradients[panel] = at.dx[0, 2]
    return block_picture(x[0, 2], dy[0, 2], gradients)


def _dropout() -> str:
    key = layers.dropout_key(0, 0, 6)
    whole = layers.dropout_mask((8, 40), 0.5, key)
    return masks_picture(whole, layers.dropout_mask((4, 40), 0.5, key, first_row=4), 4)


def _cross_entropy() -> str:
    x, target = 1.3 * _random(1, 7, seed=2), torch.tensor([2])
    dx = Evaluation.of(layers.cross_entropy, {}, [x, target], torch.ones((), dtype=torch.float64)).dx
    truth = torch.nn.functional.one_hot(target, 7).double()
    return cross_entropy_picture(x[0], x.softmax(1)[0], truth[0], dx[0])


def _update() -> str:
    paths: dict[str, list[float]] = {}
    for name, rule in {"section 5": Krizhevsky, "torch.optim.SGD": torch.optim.SGD}.items():
        w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = rule([w], lr=0.1, momentum=0.9, weight_decay=0.0)
        paths[name] = [0.0]
        for step in range(40):
            if step == 10:
                optimizer.param_groups[0]["lr"] = 0.01
            w.grad = torch.full_like(w, -1.0 if step < 10 else 0.0)
            optimizer.step()
            paths[name].append(float(w.detach()))
    return update_picture(paths, drop=10)
