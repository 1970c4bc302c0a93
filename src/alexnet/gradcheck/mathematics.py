"""The map of the mathematics: what a course teaches, and where it works here. And the glossary.

Their tables are map.md and glossary.md. The map's numbers are computed when the page is made. A place is a file and a
name; its line is looked up in the source, so a name that moved is still found, and one that is gone is an error (and a
failing test).
"""

import ast
import math
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

import alexnet
from alexnet import layers
from alexnet.data import synthetic
from alexnet.data.augment import principal_colours
from alexnet.gradcheck.cases import Evaluation
from alexnet.gradcheck.checks import Trial, differences, identities, slope
from alexnet.gradcheck.network import STEPS_NET, network_results
from alexnet.gradcheck.operations import CONV2D, LOCAL_RESPONSE_NORM, RELU
from alexnet.layers import Backends
from alexnet.model import PAPER_FAN_IN, Init, ModelConfig, initial_std, layer_table
from alexnet.optim import OptimConfig, krizhevsky_update

SOURCE = Path(alexnet.__file__).parent
PAPER, OPTIM = ModelConfig(), OptimConfig()

# ---- tables ---------------------------------------------------------------------------------------------------


def rows_of(file: str) -> dict[str, list[list[str]]]:
    """{heading: rows} of a Markdown file of this folder, without the heads of its tables; \\| is no border."""
    tables: dict[str, list[list[str]]] = {}
    rows = tables.setdefault("", [])
    for line in (SOURCE / "gradcheck" / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            rows = tables.setdefault(line[3:], [])
        elif line.startswith("| "):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return {heading: rows[1:] for heading, rows in tables.items() if rows}


class Idea(NamedTuple):
    """One idea of a course, and the place in this project that uses it."""

    name: str
    sentence: str
    formula: str
    place: str  # file below src/alexnet :: function or class
    number: str  # with names of `numbers` in braces


MAP = {branch: [Idea(*row) for row in rows] for branch, rows in rows_of("map.md").items()}
GLOSSARY = rows_of("glossary.md")[""]  # term, symbol, meaning, other names, trap


def located(place: str) -> str:
    """'layers/relu.py::relu_forward' -> 'src/alexnet/layers/relu.py:35'. Raises LookupError for a name that is gone."""
    file, _, name = place.partition("::")
    for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"src/alexnet/{file}:{node.lineno}"
    raise LookupError(f"{place}: {file} defines no {name}")


# ---- numbers --------------------------------------------------------------------------------------------------


@cache
def numbers() -> dict[str, Any]:
    """Every number of map.md by its name."""
    return {**_network(), **_colours(), **_proofs(), **_update_rule(), **_chances()}


def _network() -> dict[str, Any]:
    rows = {row.name: row for row in layer_table(PAPER)}
    before, after = rows["pool1"], rows["conv2"]
    jacobian = after.channels * after.px**2 * before.channels * before.px**2
    weights = after.parameters - 256
    uniform = float(layers.cross_entropy(torch.zeros(1, PAPER.classes).double(), torch.tensor([0])))
    return {
        "conv1_products": PAPER_FAN_IN[0],
        "fc6": rows["fc6"].parameters,
        "parameters": sum(row.parameters for row in layer_table(PAPER)),
        "towers": weights,
        "dense": 2 * weights,
        "denominators": PAPER.lrn_size,
        "jacobian": jacobian,
        "jacobian_gb": jacobian * 4 / 1e9,
        "classes": PAPER.classes,
        "nats": uniform,
        "bits": uniform / math.log(2),
        "he": initial_std(ModelConfig(init=Init.he), 5, PAPER_FAN_IN[5]),
    }


def _colours() -> dict[str, Any]:
    """Of 20 embedded images: covariance of the colours, its eigenvalues and eigenvectors, largest first."""
    images = torch.from_numpy(synthetic.draw(np.arange(20) % 10, 64, np.random.default_rng(0)))
    covariance = torch.cov(images.reshape(-1, 3).double().T)
    values, vectors = (x.double() for x in principal_colours(covariance))
    made = vectors @ values.diag() @ vectors.T
    return {
        "first_share": 100 * float(values[0] / values.sum()),
        "orthonormal": float((vectors.T @ vectors - torch.eye(3)).abs().max()),
        "covariance": float((made - covariance).abs().max() / covariance.abs().max()),
    }


def _proofs() -> dict[str, Any]:
    """Errors of the checks, and what a backward gives at a few points."""
    conv2d, relu, norm = (Trial(o, o.cases[0], "reference") for o in (CONV2D, RELU, LOCAL_RESPONSE_NORM))
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=g).double() for shape in ((3, 7), (5, 7)))
    logits = torch.randn(4, 10, generator=g.manual_seed(0)).double()
    of_loss = Evaluation.of(layers.cross_entropy, {}, [logits, torch.arange(4)])
    return {
        "adjoint": max(result.value for result in identities(conv2d)),
        "euler": next(identities(relu)).value,
        "along": next(network_results("", STEPS_NET, Backends().resolve("cpu"), "cpu")).value,
        "slope": slope(differences(norm).curve),
        "rank": int(torch.linalg.matrix_rank(Evaluation.of(layers.linear, {}, [x, w]).gradients[1])),
        "slope_at_0": float(Evaluation.of(layers.relu, {}, [torch.zeros(1)], torch.ones(1)).dx),
        "row_sum": float(of_loss.dx.sum(1).abs().max()),
    }


def _update_rule() -> dict[str, Any]:
    """On L = w^2 / 2, whose gradient is w, a step is a 2 x 2 matrix: stable while no eigenvalue is larger than 1."""

    def is_stable(rate: float) -> bool:
        w, v = torch.eye(2, dtype=torch.float64)  # the two columns of the matrix at once
        krizhevsky_update([w], [w.clone()], [v], rate, OPTIM.momentum, 0.0)
        return bool(torch.linalg.eigvals(torch.stack([w, v])).abs().max() <= 1 + 1e-12)

    low, high = 0.1, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return {
        "rate": OPTIM.lr,
        "relative_step": OPTIM.lr * 0.1,
        "momentum": OPTIM.momentum,
        "velocity_steps": 1 / (1 - OPTIM.momentum),
        "largest_rate": low,
    }


def _chances() -> dict[str, Any]:
    def power(n: int) -> float:
        """Of the paired t test at 5 %, for a true difference of two standard deviations."""
        t = stats.t.ppf(0.975, n - 1)
        return float(stats.nct.sf(t, n - 1, 2 * math.sqrt(n)) + stats.nct.cdf(-t, n - 1, 2 * math.sqrt(n)))

    return {
        "p": PAPER.dropout,
        "kept": 100 * float(layers.dropout_mask((1000, 1000), PAPER.dropout, key=1).double().mean()),
        "half_width_1000": 196 * math.sqrt(0.24 / 1000),
        "half_width_50000": 196 * math.sqrt(0.24 / 50000),
        "t_3": stats.t.ppf(0.975, 2),
        "z": stats.norm.ppf(0.975),
        "paired": math.sqrt(0.2 / 2),
        "false_finding": 100 * (1 - 0.95**16),
        "power_3": power(3),
        "power_6": power(6),
    }
