"""The map of the mathematics: what a course teaches, and where it works here. And the glossary.

Every number is computed when the page is made. A place is a file and a name; its line is looked up in the source, so a
name that moved is still found, and one that is gone is an error (and a failing test).
"""

import ast
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

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


class Idea(NamedTuple):
    """One idea of a course, and the place in this project that uses it."""

    name: str
    sentence: str
    formula: str
    place: str  # file below src/alexnet :: function or class
    number: Callable[[], str]


# ---- places ---------------------------------------------------------------------------------------------------


def located(place: str) -> str:
    """'layers/relu.py::relu_forward' -> 'src/alexnet/layers/relu.py:35'. Raises LookupError for a name that is gone."""
    file, _, name = place.partition("::")
    lines = _lines(file)
    if name not in lines:
        raise LookupError(f"{place}: {file} defines no {name}")
    return f"src/alexnet/{file}:{lines[name]}"


@cache
def _lines(file: str) -> dict[str, int]:
    """{qualified name: line} of every function and class of a file."""
    found: dict[str, int] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                found[prefix + child.name] = child.lineno
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((SOURCE / file).read_text(encoding="utf-8")), "")
    return found


# ---- numbers --------------------------------------------------------------------------------------------------

PAPER = ModelConfig()


def _row(name: str) -> int:
    return next(row.parameters for row in layer_table(PAPER) if row.name == name)


def _jacobian() -> str:
    before, after = (next(r for r in layer_table(PAPER) if r.name == name) for name in ("pool1", "conv2"))
    entries = after.channels * after.px**2 * before.channels * before.px**2
    return f"conv2's Jacobian for one image has {entries:,} entries, {entries * 4 / 1e9:.0f} GB in float32"


def _adjoint_error() -> str:
    case = CONV2D.cases[0]
    worst = max(result.value for result in identities(Trial(CONV2D, case, "reference")))
    return f"the two sides of conv2d differ by {worst:.0e} of their size"


def _euler_error() -> str:
    (result,) = identities(Trial(RELU, RELU.cases[0], "reference"))
    return f"the two sides of ReLU differ by {result.value:.0e} of their size"


def _rank() -> str:
    g = torch.Generator().manual_seed(0)
    at = Evaluation.of(layers.linear, {}, [torch.randn(*s, generator=g).double() for s in ((3, 7), (5, 7))])
    return f"3 images, a 5 x 7 weight: rank {int(torch.linalg.matrix_rank(at.gradients[1]))}"


@cache
def _pixels() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Covariance of the colours of 20 embedded images, its eigenvalues and eigenvectors, largest first."""
    images = torch.from_numpy(synthetic.draw(np.arange(20) % 10, 64, np.random.default_rng(0)))
    covariance = torch.cov(images.reshape(-1, 3).double().T)
    values, vectors = principal_colours(covariance)
    return covariance, values.double(), vectors.double()


def _first_component() -> str:
    _, values, _ = _pixels()
    share = float(values[0] / values.sum())
    return f"embedded set: the first of three directions carries {100 * share:.0f} % of the variance"


def _orthonormal() -> str:
    _, _, vectors = _pixels()
    return f"largest entry of V'V - 1: {float((vectors.T @ vectors - torch.eye(3)).abs().max()):.0e}"


def _colour_covariance() -> str:
    covariance, values, vectors = _pixels()
    made = vectors @ values.diag() @ vectors.T
    return f"V diag(l) V' and S differ by {float((made - covariance).abs().max() / covariance.abs().max()):.0e} of S"


def _along_a_direction() -> str:
    result = next(network_results("", STEPS_NET, Backends().resolve("cpu"), "cpu"))
    return f"whole small network: quotient and gradient differ by {result.value:.0e}"


def _slope() -> str:
    curve = differences(Trial(LOCAL_RESPONSE_NORM, LOCAL_RESPONSE_NORM.cases[0], "reference")).curve
    return f"slope of the response norm's curve: {slope(curve):.3f}"


def _largest_stable_rate() -> str:
    """On L = w^2 / 2, whose gradient is w, a step is a 2 x 2 matrix: stable while no eigenvalue is larger than 1."""
    momentum = OptimConfig().momentum

    def is_stable(rate: float) -> bool:
        w, v = torch.eye(2, dtype=torch.float64)  # the two columns of the matrix at once
        krizhevsky_update([w], [w.clone()], [v], rate, momentum, 0.0)
        return bool(torch.linalg.eigvals(torch.stack([w, v])).abs().max() <= 1 + 1e-12)

    low, high = 0.1, 10.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if is_stable(middle) else (low, middle)
    return f"with momentum {momentum} and curvature 1 the steps stay bounded up to a rate of {low:.2f}"


def _uniform_loss() -> float:
    return float(layers.cross_entropy(torch.zeros(1, PAPER.classes).double(), torch.tensor([0])))


def _row_sum() -> str:
    x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).double()
    at = Evaluation.of(layers.cross_entropy, {}, [x, torch.arange(4)])
    return f"rows of dx = (p - q)/N sum to {float(at.dx.sum(1).abs().max()):.0e}"


def _kept() -> str:
    mask = layers.dropout_mask((1000, 1000), PAPER.dropout, key=1)
    return f"of a million units {100 * float(mask.double().mean()):.2f} % are kept at p = {PAPER.dropout}"


def _power() -> str:
    """Of the paired t test at 5 %, for a true difference of two standard deviations."""

    def of(n: int) -> float:
        t = stats.t.ppf(0.975, n - 1)
        return float(stats.nct.sf(t, n - 1, 2 * math.sqrt(n)) + stats.nct.cdf(-t, n - 1, 2 * math.sqrt(n)))

    return (
        f"a difference of 2 standard deviations is found with power {of(3):.2f} by 3 seeds, {of(6):.2f} by 6"
    )


MAP: dict[str, tuple[Idea, ...]] = {
    "Linear algebra": (
        Idea("Dot product", "Every output of a convolution is the dot product of one kernel and one window.",
             r"y = \sum_k w_k x_k + b", "layers/conv2d.py::conv2d_forward",
             lambda: f"conv1: {PAPER_FAN_IN[0]} products for each output"),
        Idea("Matrix as a linear map", "A fully connected layer maps every image by the same matrix.",
             r"Y = X W^{\top}", "layers/linear.py::linear_forward",
             lambda: f"fc6: {_row('fc6'):,} of {sum(r.parameters for r in layer_table(PAPER)):,} parameters"),
        Idea("Block matrix",
             "Two towers are a block-diagonal weight matrix: the blocks off the diagonal do not exist.",
             r"W = \begin{pmatrix} W_1 & 0 \\ 0 & W_2 \end{pmatrix}", "layers/conv2d.py::_weight_rows",
             lambda: f"conv2: {_row('conv2') - 256:,} weights instead of {2 * (_row('conv2') - 256):,}"),
        Idea("Transpose as adjoint", "The backward of a linear map is its adjoint: fold is the adjoint of unfold.",
             r"\langle A x, dy \rangle = \langle x, A^{\top} dy \rangle", "layers/conv2d.py::fold", _adjoint_error),
        Idea("Rank-one sums", "A weight gradient is a sum of outer products, one an image: its rank is at most N.",
             r"dW = \sum_n dy_n x_n^{\top}", "layers/linear.py::linear_backward", _rank),
        Idea("Eigenvectors, PCA",
             "Colour noise moves all pixels of an image along the eigenvectors of the colour covariance.",
             r"S v_i = \lambda_i v_i", "data/augment.py::principal_colours", _first_component),
        Idea("Orthogonality",
             "Eigenvectors of a symmetric matrix are orthogonal: noise along one leaves the others alone.",
             r"V^{\top} V = I", "data/augment.py::principal_colours", _orthonormal),
        Idea("Norms",
             "The length of a gradient over the length of its weights is the relative step; the probe prints it.",
             r"\|g\| / \|w\|", "training/probe.py::Layer",
             lambda: f"rate {OptimConfig().lr}: a ratio of 0.1 moves a weight by {OptimConfig().lr * 0.1:.1%} a step"),
    ),
    "Calculus": (
        Idea("Chain rule", "A gradient passes the functions of a network in reverse order.",
             r"dx = J_f^{\top} J_g^{\top} J_h^{\top} dy", "layers/relu_lrn_pool.py::relu_lrn_pool_backward",
             lambda: "three functions, two orders: two different gradients"),
        Idea("Partial derivatives", "An input that reaches the loss on several paths collects one term from each.",
             r"dx_c = \sum_i dy_i \, \partial y_i / \partial x_c",
             "layers/local_response_norm.py::local_response_norm_backward",
             lambda: f"one response stands in {PAPER.lrn_size} denominators"),
        Idea("Gradient", "All partial derivatives of the loss, by every weight, in one backward pass.",
             r"\nabla L", "plain.py::backward", lambda: f"{sum(r.parameters for r in layer_table(PAPER)):,} of them"),
        Idea("Jacobian",
             "The matrix of all partial derivatives of an operation is never built: only its product with dy.",
             r"dx = J^{\top} dy", "layers/conv2d.py::conv2d_backward", _jacobian),
        Idea("Directional derivative",
             "Two forward passes measure the slope along any direction in all parameters at once.",
             r"\langle \nabla L, d \rangle", "gradcheck/network.py::_along", _along_a_direction),
        Idea("Taylor's remainder",
             "The error of a central difference falls with the square of the step: a line of slope 2.",
             r"\tfrac{h^2}{6} L'''", "gradcheck/checks.py::differences", _slope),
        Idea("Euler's homogeneous functions",
             "ReLU and pooling scale with their input, so one equation checks them whole.",
             r"\langle dx, x \rangle = \langle dy, y \rangle", "gradcheck/operations.py::homogeneous", _euler_error),
        Idea("Subgradient",
             "Where there is no derivative a rule decides: 0 for a ReLU at 0, ties in a pooling window.",
             r"[x > 0]", "layers/relu.py::relu_backward",
             lambda: f"slope at 0: {float(Evaluation.of(layers.relu, {}, [torch.zeros(1)], torch.ones(1)).dx):.0f}"),
        Idea("Momentum", "The velocity is a geometric sum of past gradients.",
             r"1 + m + m^2 + \ldots = 1 / (1 - m)", "optim.py::krizhevsky_update",
             lambda: f"m = {OptimConfig().momentum}: {1 / (1 - OptimConfig().momentum):.0f} times one step"),
        Idea("Learning rate and curvature",
             "On a parabola of curvature h, momentum steps stay bounded below a largest rate.",
             r"\epsilon < 2 (1 + m) / h", "optim.py::krizhevsky_update", _largest_stable_rate),
    ),
    "Probability and statistics": (
        Idea("Maximum likelihood", "The loss is minus the mean log probability of the true classes.",
             r"L = -\frac{1}{N} \sum_n \log p_{n t_n}", "layers/cross_entropy.py::cross_entropy_forward",
             lambda: f"knowing nothing of {PAPER.classes} classes: {_uniform_loss():.3f}"),
        Idea("Softmax as a distribution", "p and q both sum to 1, so each row of the gradient sums to 0.",
             r"\sum_k p_{nk} = 1", "layers/cross_entropy.py::cross_entropy_backward", _row_sum),
        Idea("Entropy, nats",
             "The loss is measured in nats, with the natural logarithm; divided by ln 2 it is in bits.",
             r"H = -\sum_k p_k \ln p_k", "layers/cross_entropy.py::cross_entropy",
             lambda: f"{_uniform_loss():.3f} nats are {_uniform_loss() / math.log(2):.3f} bits"),
        Idea("Expectation",
             "Dropout multiplies by c so that the next layer sees the same mean in training and in testing.",
             r"E[c\, m\, x] = c (1-p)\, x", "layers/dropout.py::dropout_forward", _kept),
        Idea("Variance of a sum",
             "Initial weights are as large as keeps the variance of a unit through the layers.",
             r"\operatorname{var} \sum_i w_i x_i = n \operatorname{var}(w)\, \overline{x^2}", "model.py::initial_std",
             lambda: f"fc6: 0.01 in the paper, He {initial_std(ModelConfig(init=Init.he), 5, PAPER_FAN_IN[5]):.4f}"),
        Idea("Covariance",
             "Noise along the eigenvectors, scaled by the roots of the eigenvalues, has the pixels' covariance.",
             r"V \Lambda V^{\top} = S", "data/augment.py::colour_noise", _colour_covariance),
        Idea("Central limit",
             "An error over many images is a mean of zeros and ones: its interval shrinks like 1/root n.",
             r"\hat p \pm 1.96 \sqrt{\hat p (1-\hat p)/n}", "training/scoring.py::_share",
             lambda: f"40 % on 1,000 images: +- {196 * math.sqrt(0.24 / 1000):.1f} points; on 50,000: "
             f"+- {196 * math.sqrt(0.24 / 50000):.1f}"),
        Idea("t interval", "Few seeds: the deviation is estimated too, and the interval is wider.",
             r"\bar d \pm t_{n-1} s / \sqrt n", "claims/statistics.py::_t_effect",
             lambda: f"3 seeds: t = {stats.t.ppf(0.975, 2):.2f} where many would take {stats.norm.ppf(0.975):.2f}"),
        Idea("Paired test",
             "Arms share data order and initial weights, so their difference varies less than each.",
             r"\operatorname{var}(a - b) = \operatorname{var} a + \operatorname{var} b - 2 \operatorname{cov}(a, b)",
             "claims/statistics.py::paired_difference",
             lambda: f"correlation 0.9: the difference deviates {math.sqrt(0.2 / 2):.2f} times as much as unpaired"),
        Idea("Multiple comparisons",
             "Sixteen claims tested at 5 % would give a false one more often than not; Holm's rule corrects.",
             r"p_{(i)} \le \alpha / (m - i + 1)", "claims/statistics.py::holm",
             lambda: f"16 tests at 5 %: a false finding in {100 * (1 - 0.95**16):.0f} % of repetitions"),
        Idea("Power", "How often a true difference is found; too few seeds find nothing, right or wrong.",
             r"P(\text{found} \mid \text{true})", "claims/statistics.py::power", _power),
    ),
}  # fmt: skip


def glossary() -> list[list[str]]:
    """The rows of glossary.md: term, symbol, meaning, other names, trap."""
    lines = (SOURCE / "gradcheck" / "glossary.md").read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
