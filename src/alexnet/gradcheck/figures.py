"""The pictures of the gradient lesson, as SVG text: what goes in are the numbers that the layers computed.

Style, fonts and colours are those of pages.figures.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Rectangle
from torch import Tensor

from alexnet.pages.figures import BLUE, GREEN, GREY, LIGHT, ORANGE, PURPLE, RED, STYLE

# Text stays text: smaller, searchable, and in the page's own font where DejaVu is missing.
PAGE: Any = {**STYLE, "svg.fonttype": "none", "axes.grid": False}
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)


def differences_picture(curves: Mapping[str, Sequence[tuple[float, float]]], wrong: str) -> str:
    """Error against step for each operation; `wrong` is drawn dashed, and a grey line has slope 2."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        axes = figure.subplots()
        steps = np.array([1e-4, 1e-2])
        axes.loglog(steps, 3e-1 * steps**2, color=LIGHT, linewidth=5, zorder=0)
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            h, error = zip(*curve, strict=True)
            axes.loglog(h, error, "--" if name == wrong else "o-", color=colour, markersize=3, label=name)
        axes.set(xlabel="step h", ylabel="error of the quotient")
        figure.legend(loc="outside right upper")
        return _svg(figure)


def linear_picture(x: Tensor, dy: Tensor) -> str:
    """dW as a sum of outer products: x (N, I), dy (N, O)."""
    with matplotlib.rc_context(PAGE):
        n = len(x)
        figure = Figure(figsize=(7.2, 1.9), layout="constrained")
        panels = figure.subplots(1, n + 1)
        products = [np.outer(b, a) for a, b in zip(_numbers(x), _numbers(dy), strict=True)]
        total = np.add.reduce(products)
        scale = max(np.abs(p).max() for p in (*products, total))
        for i, (axes, product) in enumerate(zip(panels, [*products, total], strict=True)):
            _heat(axes, product, scale)
            axes.set_title("dW = their sum" if i == n else f"image {i + 1}", loc="center")
        return _svg(figure)


def units_picture(x: Tensor, relu: tuple[Tensor, Tensor], tanh: tuple[Tensor, Tensor]) -> str:
    """(value, slope) of the two activations over x."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(6.2, 2.1), layout="constrained")
        for axes, (name, (value, slope)) in zip(
            figure.subplots(1, 2, sharey=True), {"ReLU": relu, "tanh": tanh}.items(), strict=True
        ):
            axes.axhline(0, color=LIGHT, linewidth=0.8, zorder=0)
            axes.plot(_numbers(x), _numbers(value), color=BLUE, label="y")
            axes.plot(_numbers(x), _numbers(slope), color=ORANGE, label="slope")
            axes.set(title=name, xlabel="x", ylim=(-1.3, 2.2))
            axes.legend(loc="upper left")
        return _svg(figure)


def pool_picture(x: Tensor, dy: Tensor, dx: Tensor, winners: Sequence[tuple[int, int]]) -> str:
    """x, dx (H, W), dy (P, Q) and each window's winner (row, column), row-major."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(7.4, 2.5), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=[7, 5, 7])
        _cells(left, _numbers(x), "x", "{:.0f}", shade=False)
        _cells(middle, _numbers(dy), "dy", "{:+.0f}")
        _cells(right, _numbers(dx), "dx", "{:+.0f}")
        for k, (i, j) in enumerate(winners):
            p, q = divmod(k, dy.shape[1])
            colour = COLOURS[k % len(COLOURS)]
            _box(left, 2 * q, 2 * p, 3, 3, colour, inset=0.08 + 0.05 * (k % 3), width=1.1)
            _box(middle, q, p, 1, 1, colour, inset=0.06, width=2)
            _box(left, j, i, 1, 1, "black", inset=0.14, width=1.6)
            _arrow(figure, middle, (q, p), right, (j, i), colour)
        return _svg(figure)


def convolution_picture(
    w: Tensor, dy: Tensor, dx: Tensor, spread: Tensor, strided_dx: Tensor, pixel: tuple[int, int]
) -> str:
    """Scatter: kernel, dy, dx at stride 1. Gather: the turned kernel, dy spread out and padded, dx at stride 2, with
    the frame that `pixel` of dx reads."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(6.6, 5.6), layout="constrained")
        rows: Any = figure.subfigures(2, 1, height_ratios=[7, 9])
        scatter = {"w": w, "dy, stride 1": dy, "dx": dx}
        gather = {"w turned": w.flip(0, 1), "dy spread out, stride 2": spread, "dx": strided_dx}
        for row, maps in zip(rows, (scatter, gather), strict=True):
            sides = [len(values) for values in maps.values()]
            # Cells of one size in both rows: what is left of the width stays empty.
            panels = row.subplots(1, 4, width_ratios=[*sides, 19.01 - sum(sides)])
            panels[3].axis("off")
            for axes, (title, values) in zip(panels, maps.items(), strict=False):
                _cells(axes, _numbers(values), title, "{:+.0f}")
        i, j = pixel
        _box(panels[1], j, i, len(w), len(w), ORANGE, width=2.2)
        _box(panels[2], j, i, 1, 1, ORANGE, width=2.2)
        return _svg(figure)


def response_norm_picture(
    x: Tensor, y: Tensor, chosen: int, single: Tensor, gain: Tensor, competition: Tensor
) -> str:
    """All (C,): responses and outputs, dx of a dy that is 1 at `chosen` alone, and the two terms for a random dy."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained")
        above, middle, below = figure.subplots(3, 1, sharex=True)
        c = np.arange(len(x))
        above.bar(c, _numbers(x), color=LIGHT, label="x")
        above.bar(c, _numbers(y), width=0.45, color=BLUE, label="y")
        middle.bar(c, _numbers(single), color=np.where(c == chosen, BLUE, RED).tolist())
        middle.axvspan(chosen - 0.5, chosen + 0.5, color=LIGHT, zorder=0)
        middle.set_title(f"dx, dy at map {chosen} alone")
        below.bar(c, _numbers(gain), color=BLUE, width=0.8, label="gain")
        below.bar(c, -_numbers(competition), color=RED, width=0.5, label="- competition")
        below.plot(c, _numbers(gain - competition), "_", color="black", markersize=6, label="dx")
        below.set_xlabel("map")
        for axes in (above, middle, below):
            axes.axhline(0, color=GREY, linewidth=0.6)
        above.legend(ncols=2, loc="upper right")
        below.legend(ncols=3, loc="upper right")
        low, high = below.get_ylim()
        below.set_ylim(low, high + 0.35 * (high - low))
        return _svg(figure)


def maps_picture(
    panels: Mapping[str, Tensor], form: str = "{:.2f}", figsize: tuple[float, float] = (7.4, 2.6)
) -> str:
    """Named maps (H, W) side by side, each with its numbers and on its own scale."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=figsize, layout="constrained")
        for axes, (name, values) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
            _cells(axes, _numbers(values), name, form)
        return _svg(figure)


def block_picture(x: Tensor, dy: Tensor, gradients: Mapping[str, Tensor]) -> str:
    """One map: x, dy, and dx under each order; negative inputs are hatched."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(7.6, 2.3), layout="constrained")
        panels = figure.subplots(1, 2 + len(gradients), width_ratios=[7, 3.4, *[7] * len(gradients)])
        for axes, (name, values) in zip(panels, {"x": x, "dy": dy, **gradients}.items(), strict=True):
            _heat(axes, _numbers(values), float(values.abs().max()))
            axes.set_title(name, loc="center")
        for axes in (panels[0], *panels[2:]):
            for i, j in (x < 0).nonzero().tolist():
                axes.add_patch(
                    Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, hatch="////", edgecolor=GREY, linewidth=0)
                )
        return _svg(figure)


def masks_picture(whole: Tensor, part: Tensor, first_row: int) -> str:
    """Keep-masks (N, U): of the batch, and of the rows from `first_row` on computed alone."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(7.2, 1.8), layout="constrained")
        for axes, mask, title, start in zip(
            figure.subplots(1, 2),
            (whole, part),
            ("the batch", "its second half alone"),
            (0, first_row),
            strict=True,
        ):
            axes.imshow(1 - _numbers(mask.float()), cmap="Greys", vmin=0, vmax=1.4, aspect="auto")
            axes.set_yticks(range(len(mask)), [str(start + i) for i in range(len(mask))])
            axes.set(title=title, xlabel="unit", ylabel="image")
        return _svg(figure)


def cross_entropy_picture(x: Tensor, p: Tensor, q: Tensor, dx: Tensor) -> str:
    """All (K,): logits, what is said and what is true, and the gradient."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(7.4, 2.0), layout="constrained")
        first, second, third = figure.subplots(1, 3)
        k = np.arange(len(x))
        first.bar(k, _numbers(x), color=GREY)
        second.bar(k - 0.2, _numbers(p), width=0.4, color=BLUE, label="p")
        second.bar(k + 0.2, _numbers(q), width=0.4, color=ORANGE, label="q")
        third.bar(k, _numbers(dx), color=np.where(_numbers(dx) < 0, GREEN, RED).tolist())
        second.legend()
        for axes, title in ((first, "logits x"), (second, "softmax and truth"), (third, "dx = p - q")):
            axes.axhline(0, color=GREY, linewidth=0.6)
            axes.set(title=title, xlabel="class", xticks=k)
        return _svg(figure)


def update_picture(paths: Mapping[str, Sequence[float]], drop: int) -> str:
    """A weight over the steps under each rule; the rate falls after step `drop`."""
    with matplotlib.rc_context(PAGE):
        figure = Figure(figsize=(6.2, 2.4), layout="constrained")
        axes = figure.subplots()
        axes.axvline(drop, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
        for (name, path), colour in zip(paths.items(), COLOURS, strict=False):
            axes.plot(range(len(path)), path, "o-", color=colour, markersize=2.5, label=name)
        axes.set(xlabel="step", ylabel="weight")
        axes.legend()
        return _svg(figure)


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def _heat(axes: Axes, values: np.ndarray, scale: float) -> None:
    """Blue is negative, red positive, white zero."""
    axes.imshow(values, cmap="RdBu_r", vmin=-scale, vmax=scale)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(visible=True, color=LIGHT)


def _cells(axes: Axes, values: np.ndarray, title: str, form: str, shade: bool = True) -> None:
    """A map with its numbers; zeros are left out."""
    scale = max(float(np.abs(values).max()), 1e-12) * 1.6  # pale enough for black figures
    _heat(axes, values if shade else np.zeros_like(values), scale)
    axes.set_title(title, loc="center")
    for (i, j), value in np.ndenumerate(values):
        if form.format(value).strip("+-0.") or not shade:
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7)


def _box(
    axes: Axes, x: float, y: float, w: float, h: float, colour: str, inset: float = 0.0, width: float = 1.2
) -> None:
    corner = (x - 0.5 + inset, y - 0.5 + inset)
    axes.add_patch(
        Rectangle(
            corner, w - 2 * inset, h - 2 * inset, fill=False, edgecolor=colour, linewidth=width, clip_on=False
        )
    )


def _arrow(
    figure: Figure, start: Axes, a: tuple[float, float], end: Axes, b: tuple[float, float], colour: str
) -> None:
    arrow = ConnectionPatch(
        a, b, "data", "data", axesA=start, axesB=end, arrowstyle="-|>", color=colour, linewidth=1.0,
        shrinkA=9, shrinkB=6, alpha=0.65, connectionstyle="arc3,rad=-0.15",
    )  # fmt: skip
    figure.add_artist(arrow)


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()
