"""The pictures of the gradient lesson, as SVG text, drawn from what the layers themselves computed, backward included.

Style, fonts and colours are those of pages.figures.
"""

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from alexnet import layers
from alexnet.data import synthetic
from alexnet.gradcheck.cases import Evaluation
from alexnet.gradcheck.checks import Result, Trial, differences
from alexnet.gradcheck.mutants import mutate
from alexnet.gradcheck.operations import ALL, LOCAL_RESPONSE_NORM
from alexnet.layers.local_response_norm import local_response_norm_backward
from alexnet.layers.pair import PAIRS
from alexnet.model import AlexNet, ModelConfig
from alexnet.optim import Krizhevsky
from alexnet.pages.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, RED, STYLE

# Text stays text: smaller, searchable, and in the page's own font where DejaVu is missing.
PAGE: Any = {**STYLE, "svg.fonttype": "none", "axes.grid": False}
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
POOLED = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 7, 0], [3, 2, 12, 8, 4, 6, 2], [6, 4, 3, 10, 3, 8, 1],
          [2, 7, 9, 5, 0, 2, 11]]  # fmt: skip
WRONG = "gradient off by 1e-6"


def pictures(results: list[Result]) -> dict[str, str]:
    """{name in the page: SVG}. Curves of differences are those of `results`, drawn anew where they are missing."""
    drawn = {}
    table: dict[str, tuple[Callable[[Figure], None], float, float]] = {
        "differences": (partial(_differences, results=results), 6.2, 3.2),
        "linear": (_linear, 7.2, 1.9),
        "convolution": (_convolution, 6.6, 5.6),
        "units": (_units, 6.2, 2.1),
        "pool": (_pool, 7.4, 2.5),
        "response_norm": (_response_norm, 7.4, 4.6),
        "same_map": (_same_map, 7.4, 3.7),
        "block": (_block, 7.6, 2.3),
        "dropout": (_dropout, 7.2, 1.8),
        "cross_entropy": (_cross_entropy, 7.4, 2.0),
        "update": (_update, 6.2, 2.4),
    }
    for name, (draw, width, height) in table.items():
        with matplotlib.rc_context(PAGE):
            figure, text = Figure(figsize=(width, height), layout="constrained"), io.StringIO()
            draw(figure)
            figure.savefig(text, format="svg", metadata={"Date": None})
            drawn[name] = text.getvalue()
    return drawn


def _differences(figure: Figure, results: list[Result]) -> None:
    """Error against step for each curved operation, dashed with a wrong gradient; a grey line has slope 2."""
    curves = {}
    for operation in ALL:
        if operation.curved:
            key = (operation.name, operation.cases[0].name, "differences")
            found = [r for r in results if (r.operation, r.case, r.check) == key]
            result = found[0] if found else differences(Trial(operation, operation.cases[0], "reference"))
            curves[operation.name] = result.curve
    with mutate(local_response_norm_backward, "return cast(", "return (1 + 1e-6) * cast("):
        trial = Trial(LOCAL_RESPONSE_NORM, LOCAL_RESPONSE_NORM.cases[0], "reference")
        curves[WRONG] = differences(trial).curve
    axes = figure.subplots()
    steps = np.array([1e-4, 1e-2])
    axes.loglog(steps, 3e-1 * steps**2, color=LIGHT, linewidth=5, zorder=0)
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        h, error = zip(*curve, strict=True)
        axes.loglog(h, error, "--" if name == WRONG else "o-", color=colour, markersize=3, label=name)
    axes.set(xlabel="step h", ylabel="error of the quotient")
    figure.legend(loc="outside right upper")


def _linear(figure: Figure) -> None:
    """dW as a sum of outer products: x (N, I), dy (N, O)."""
    products = [torch.outer(dy, x) for x, dy in zip(_normals(3, 7), _normals(3, 5, seed=1), strict=True)]
    shown = {f"image {i}": product for i, product in enumerate(products, start=1)}
    shown["dW = their sum"] = torch.stack(products).sum(0)
    scale = max(float(product.abs().max()) for product in shown.values())
    for axes, (title, product) in zip(figure.subplots(1, 4), shown.items(), strict=True):
        _heat(axes, product, scale, title)


def _units(figure: Figure) -> None:
    """The two activations and their slopes over x."""
    x = torch.linspace(-3, 3, 301, dtype=torch.float64)
    activations = {"ReLU": layers.relu, "tanh": layers.tanh}
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, activation) in zip(panels, activations.items(), strict=True):
        at = Evaluation.of(activation, {}, [x], torch.ones_like(x))
        axes.axhline(0, color=LIGHT, linewidth=0.8, zorder=0)
        axes.plot(x, at.y, color=BLUE, label="y")
        axes.plot(x, at.dx, color=ORANGE, label="slope")
        axes.set(title=name, xlabel="x", ylim=(-1.3, 2.2))
        axes.legend(loc="upper left")


def _pool(figure: Figure) -> None:
    """x, dy, dx, and the way from each window's dy to its winner."""
    x = torch.tensor(POOLED, dtype=torch.float64)
    dy = torch.tensor([[2.0, -1, 3], [1, 4, -2]], dtype=torch.float64)
    at = Evaluation.of(layers.max_pool2d, {"kernel_size": 3, "stride": 2}, [x[None, None]], dy[None, None])
    place = PAIRS["max_pool2d", "reference"].forward(at.x, (3, 3), (2, 2), (0, 0), False, "first")[1]
    left, middle, right = figure.subplots(1, 3, width_ratios=[7, 5, 7])
    _cells(left, x, "x", "{:.0f}", shade=False)
    _cells(middle, dy, "dy", "{:+.0f}")
    _cells(right, at.dx[0, 0], "dx", "{:+.0f}")
    for k, won in enumerate(place[0, 0].flatten().tolist()):
        p, q = divmod(k, dy.shape[1])
        i, j = 2 * p + won // 3, 2 * q + won % 3
        colour = COLOURS[k % len(COLOURS)]
        _box(left, 2 * q, 2 * p, 3, colour, inset=0.08 + 0.05 * (k % 3), linewidth=1.1)
        _box(middle, q, p, 1, colour, inset=0.06, linewidth=2)
        _box(left, j, i, 1, "black", inset=0.14, linewidth=1.6)
        arrow = ConnectionPatch(
            (q, p), (j, i), "data", "data", axesA=middle, axesB=right, arrowstyle="-|>", color=colour,
            linewidth=1.0, shrinkA=9, shrinkB=6, alpha=0.65, connectionstyle="arc3,rad=-0.15",
        )  # fmt: skip
        figure.add_artist(arrow)


def _convolution(figure: Figure) -> None:
    """Scatter: kernel, dy, dx at stride 1. Gather: the turned kernel, dy spread out and padded, dx at stride 2, with
    the frame that one pixel of dx reads."""
    w = torch.tensor([[1.0, 2, 3], [4, 5, 6], [0, 0, 9]], dtype=torch.float64)
    dy = torch.zeros(5, 5, dtype=torch.float64)
    dy[1, 1], dy[2, 3] = 1, -1
    strided = torch.randint(-2, 3, (3, 3), generator=torch.Generator().manual_seed(5)).double()
    inputs = [torch.zeros(1, 1, 7, 7, dtype=torch.float64), w[None, None]]
    dx, strided_dx = (
        Evaluation.of(layers.conv2d, {"stride": stride}, inputs, arriving[None, None]).dx[0, 0]
        for stride, arriving in ((1, dy), (2, strided))
    )
    spread = torch.zeros(9, 9, dtype=torch.float64)  # a frame of two zeros: every pixel's window fits
    spread[2:7:2, 2:7:2] = strided
    rows: Any = figure.subfigures(2, 1, height_ratios=[7, 9])
    scatter = {"w": w, "dy, stride 1": dy, "dx": dx}
    gather = {"w turned": w.flip(0, 1), "dy spread out, stride 2": spread, "dx": strided_dx}
    for row, maps in zip(rows, (scatter, gather), strict=True):
        sides = [len(values) for values in maps.values()]
        # Cells of one size in both rows: what is left of the width stays empty.
        panels = row.subplots(1, 4, width_ratios=[*sides, 19.01 - sum(sides)])
        panels[3].axis("off")
        for axes, (title, values) in zip(panels, maps.items(), strict=False):
            _cells(axes, values, title, "{:+.0f}")
    _box(panels[1], 3, 2, len(w), ORANGE, linewidth=2.2)
    _box(panels[2], 3, 2, 1, ORANGE, linewidth=2.2)


def _conv1_responses() -> Tensor:
    """One tower's 48 maps (1, 48, 55, 55): first weights of 2012, an image of the embedded set minus its mean."""
    net = AlexNet(ModelConfig(), seed=0)
    image = torch.from_numpy(synthetic.draw(np.array([9]), 224, np.random.default_rng(0))).double()
    x = (image - image.mean()).permute(0, 3, 1, 2)
    w = net.conv1.weight.detach().double()
    return layers.conv2d(x, w, None, 4, (0, 3, 0, 3))[:, :48]


def _response_norm(figure: Figure) -> None:
    """Responses and outputs by map, dx of a dy that is 1 at one map alone, and the two terms for a random dy."""
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
    at = Evaluation.of(layers.local_response_norm, constants, [x], _normals(*x.shape, seed=3))
    gain = at.dy * at.y / x
    competition = gain - at.dx

    above, middle, below = figure.subplots(3, 1, sharex=True)
    c = np.arange(x.shape[1])
    above.bar(c, x[0], color=LIGHT, label="x")
    above.bar(c, at.y[0], width=0.45, color=BLUE, label="y")
    middle.bar(c, single.dx[0], color=np.where(c == chosen, BLUE, RED).tolist())
    middle.axvspan(chosen - 0.5, chosen + 0.5, color=LIGHT, zorder=0)
    middle.set_title(f"dx, dy at map {chosen} alone")
    below.bar(c, gain[0], color=BLUE, width=0.8, label="gain")
    below.bar(c, -competition[0], color=RED, width=0.5, label="- competition")
    below.plot(c, (gain - competition)[0], "_", color="black", markersize=6, label="dx")
    below.set_xlabel("map")
    for axes in (above, middle, below):
        axes.axhline(0, color=GREY, linewidth=0.6)
    above.legend(ncols=2, loc="upper right")
    below.legend(ncols=3, loc="upper right")
    low, high = below.get_ylim()
    below.set_ylim(low, high + 0.35 * (high - low))


def _same_map(figure: Figure) -> None:
    """A piece of a map, and dx of a dy that is 1 at its centre alone; each on its own scale."""
    x = _conv1_responses()[:, 5:6, 24:33, 20:29]
    x = x / x.square().mean().sqrt()
    one = torch.zeros_like(x)
    one[0, 0, 4, 4] = 1
    dx = Evaluation.of(layers.same_map_norm, {"size": 5, "alpha": 25 * 0.05, "k": 1.0}, [x], one).dx
    left, right = figure.subplots(1, 2)
    _cells(left, x[0, 0], "x", "{:.2f}")
    _cells(right, dx[0, 0], "dx, dy at the centre alone", "{:.2f}")


def _block(figure: Figure) -> None:
    """One map: x, dy, and dx under each order; negative inputs are hatched."""
    x, dy = _normals(1, 6, 7, 7, seed=4), _normals(1, 6, 3, 3, seed=5)
    shown = {"x": x, "dy": dy}
    for title, order in {"dx, paper": "relu_lrn_pool", "dx, 2012 code": "lrn_pool_relu"}.items():
        constants = {"size": 5, "alpha": 5.0, "k": 1.0, "order": order}
        shown[title] = Evaluation.of(layers.relu_lrn_pool, constants, [x], dy).dx
    panels = figure.subplots(1, 4, width_ratios=[7, 3.4, 7, 7])
    for axes, (title, maps) in zip(panels, shown.items(), strict=True):
        _heat(axes, maps[0, 2], float(maps[0, 2].abs().max()), title)
        if title != "dy":
            for i, j in (x[0, 2] < 0).nonzero().tolist():
                corner = (j - 0.5, i - 0.5)
                axes.add_patch(Rectangle(corner, 1, 1, fill=False, hatch="////", edgecolor=GREY, linewidth=0))


def _dropout(figure: Figure) -> None:
    """Keep-masks (N, U): of a batch of 8, and of its last four rows computed alone."""
    key = layers.dropout_key(0, 0, 6)
    whole = layers.dropout_mask((8, 40), 0.5, key)
    part = layers.dropout_mask((4, 40), 0.5, key, first_row=4)
    shown = {"the batch": (whole, 0), "its second half alone": (part, 4)}
    for axes, (title, (mask, start)) in zip(figure.subplots(1, 2), shown.items(), strict=True):
        axes.imshow(1 - mask.double(), cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
        axes.set_yticks(range(len(mask)), [str(start + i) for i in range(len(mask))])
        axes.set(title=title, xlabel="unit", ylabel="image")


def _cross_entropy(figure: Figure) -> None:
    """One image's logits, what is said and what is true, and the gradient, by class."""
    x, target = 1.3 * _normals(1, 7, seed=2), torch.tensor([2])
    dx = Evaluation.of(layers.cross_entropy, {}, [x, target], torch.ones((), dtype=torch.float64)).dx[0]
    first, second, third = figure.subplots(1, 3)
    k = np.arange(7)
    first.bar(k, x[0], color=GREY)
    second.bar(k - 0.2, x.softmax(1)[0], width=0.4, color=BLUE, label="p")
    second.bar(k + 0.2, (k == 2).astype(float), width=0.4, color=ORANGE, label="q")
    third.bar(k, dx, color=np.where(dx < 0, GREEN, RED).tolist())
    second.legend()
    for axes, title in ((first, "logits x"), (second, "softmax and truth"), (third, "dx = p - q")):
        axes.axhline(0, color=GREY, linewidth=0.6)
        axes.set(title=title, xlabel="class", xticks=k)


def _update(figure: Figure) -> None:
    """A weight over the steps under each rule; the rate falls, and the gradient ends, after step 10."""
    axes = figure.subplots()
    axes.axvline(10, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    rules = {"section 5": Krizhevsky, "torch.optim.SGD": torch.optim.SGD}
    for (name, rule), colour in zip(rules.items(), COLOURS, strict=False):
        w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = rule([w], lr=0.1, momentum=0.9, weight_decay=0.0)
        path = [0.0]
        for step in range(40):
            if step == 10:
                optimizer.param_groups[0]["lr"] = 0.01
            w.grad = torch.full_like(w, -1.0 if step < 10 else 0.0)
            optimizer.step()
            path.append(float(w.detach()))
        axes.plot(range(len(path)), path, "o-", color=colour, markersize=2.5, label=name)
    axes.set(xlabel="step", ylabel="weight")
    axes.legend()


def _normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _heat(axes: Axes, values: Tensor, scale: float, title: str) -> None:
    """Blue is negative, red positive, white zero."""
    axes.imshow(values, cmap="RdBu_r", vmin=-scale, vmax=scale)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, loc="center")
    for spine in axes.spines.values():
        spine.set(visible=True, color=LIGHT)


def _cells(axes: Axes, values: Tensor, title: str, form: str, shade: bool = True) -> None:
    """A map with its numbers; zeros are left out."""
    scale = max(float(values.abs().max()), 1e-12) * 1.6  # pale enough for black figures
    _heat(axes, values if shade else torch.zeros_like(values), scale, title)
    for (i, j), value in np.ndenumerate(values.numpy()):
        if form.format(value).strip("+-0.") or not shade:
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7)


def _box(
    axes: Axes, x: float, y: float, side: float, colour: str, linewidth: float, inset: float = 0.0
) -> None:
    corner, side = (x - 0.5 + inset, y - 0.5 + inset), side - 2 * inset
    box = Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=linewidth, clip_on=False)
    axes.add_patch(box)
