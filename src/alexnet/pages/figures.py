"""Every picture: curves (Figure 1), first-layer kernels (Figure 3), answers and neighbours (Figure 4).

Pixels of a kernel are weights, so a picture of kernels needs a scale: all kernels share one, from the smallest
weight to the largest (shownet.py:187-195), or one kernel with small weights would look as strong as the others.

Fonts, colours and line widths are STYLE's; the suffix of the path chooses the format (png, pdf, svg).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

# Okabe and Ito's colours: distinct for every kind of colour vision and in grey print.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
GREY, LIGHT = "#555555", "#DDDDDD"
STYLE: Any = {
    "figure.dpi": 160,
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.08,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same picture on every machine
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": LIGHT,
    "grid.linewidth": 0.5,
    "axes.prop_cycle": cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE]),
    "lines.linewidth": 1.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "svg.hashsalt": "alexnet",  # the same file from the same numbers
}
KERNELS_PER_ROW = 16  # Figure 3

Array = np.ndarray | Tensor
Numbers = Sequence[float] | np.ndarray
RunCurves = Mapping[
    str, tuple[Sequence[float], Sequence[float]]
]  # {"train", "holdout": (epochs done, values)}


@dataclass(frozen=True)
class Curve:
    """One line: x and y of equal length; `low` and `high` shade a band (over seeds, say)."""

    x: Numbers
    y: Numbers
    low: Numbers | None = None
    high: Numbers | None = None
    style: str = "-"  # matplotlib's: "-" or "--"
    colour: str | None = None  # None: the next of STYLE


@matplotlib.rc_context(STYLE)
def training_figure(
    curves_of: Callable[[str], RunCurves],
    first_layer_weight: Tensor,
    path: Path,
    towers: int = 1,
    title: str = "",
) -> Path:
    """The picture of a run: loss and error against epochs, beside the kernels of conv1.

    curves_of("loss") and curves_of("top1_error") are {"train" and "holdout": (epochs done, values)}, or empty
    (training/metrics.py); first_layer_weight (O, 3, R, S).
    """
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    halves: Any = figure.subfigures(1, 2, wspace=0.03)
    left, right = halves
    loss, error = left.subplots(2, 1, sharex=True)
    _curves(loss, run_curves(curves_of("loss")), "", "loss (nats)", from_zero=False)
    _curves(error, run_curves(curves_of("top1_error"), 100.0), "epochs", "top-1 error (%)")
    error.get_legend().remove()  # the same names as above
    error.set_xlim(left=0)
    error.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    # A multiple of four that makes a block of kernels about 1.35 * towers times as wide as high.
    kernels = len(first_layer_weight) // towers
    columns = 4 * max(1, round((kernels * 1.35 * towers) ** 0.5 / 4))
    _kernels(right.subplots(towers, 1, squeeze=False)[:, 0], first_layer_weight, columns)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def curves_figure(curves: Mapping[str, Curve], path: Path, level: float) -> Path:
    """Figure 1: named curves, and the horizontal `level` they are compared at (25 % there)."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(level, color=GREY, linewidth=0.8, linestyle=(0, (2, 2)))
    _curves(axes, curves, "epochs", "training error rate (%)")
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def arms_figure(panels: Mapping[str, Mapping[str, Curve]], path: Path) -> Path:
    """The arms of a claim, one panel per quantity (the key is its label), one legend for all."""
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    cells = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (label, curves) in zip(cells, panels.items(), strict=True):
        _curves(axes, curves, "epochs", label, from_zero=False)
        axes.get_legend().remove()
    handles, names = cells[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def kernels_figure(weight: Tensor, path: Path, towers: int) -> Path:
    """Figure 3: the kernels of conv1, weight (O, 3, R, S), one block per tower."""
    rows = -(-len(weight) // towers // KERNELS_PER_ROW) * towers
    figure = Figure(figsize=(6.4, 0.42 * rows + 0.35 * towers), layout="constrained")
    _kernels(figure.subplots(towers, 1, squeeze=False)[:, 0], weight)
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def predictions_figure(
    images: Array,
    probabilities: Array,
    labels: Sequence[int] | None,
    names: Sequence[str],
    path: Path,
    titles: Sequence[str] | None = None,
) -> Path:
    """Figure 4, left: each image, its class, and bars for the five classes the network finds most probable.

    images (N, px, px, 3) uint8; probabilities (N, classes); names of the classes, the first synonym is shown.
    Where the classes are not known, `labels` is None and `titles` stand above the images.
    """
    pixels, p = np.asarray(images), np.asarray(probabilities)
    titles = titles or [names[label] for label in labels or []]
    truth = labels or [-1] * len(pixels)
    columns = min(4, len(pixels))
    rows = -(-len(pixels) // columns)
    figure = Figure(figsize=(1.9 * columns, 3.05 * rows), layout="constrained")
    cells = figure.subplots(2 * rows, columns, squeeze=False, height_ratios=[2.0, 1.0] * rows)
    for axes in cells.flat:
        axes.axis("off")
    for i, (label, title) in enumerate(zip(truth, titles, strict=True)):
        row, column = divmod(i, columns)
        _show(cells[2 * row, column], pixels[i])
        cells[2 * row, column].set_title(_short(title, 24), loc="center", fontweight="bold")
        # The five most probable classes, downwards; the true one in colour (red in the paper).
        bars, top = cells[2 * row + 1, column], np.argsort(-p[i])[:5]
        colours = ["#F0875C" if c == label else "#A9C6DE" for c in top]
        bars.barh(range(len(top)), p[i][top], height=0.85, color=colours)
        for y, c in enumerate(top):
            bars.text(0.02, y, _short(names[c], 26), va="center", fontsize=7)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6))
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def classes_figure(
    confusion: np.ndarray,
    errors: Sequence[tuple[str, float]],
    reliability: Sequence[tuple[float, float]],
    path: Path,
    title: str,
) -> Path:
    """Where a network errs: the confusions, the worst and best classes, and how sure it is.

    confusion (classes, classes): row true, column predicted. errors: (name, fraction) of each class, the worst first.
    reliability: (mean probability, share right) of each bin.
    """
    figure = Figure(figsize=(11.0, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.1, 1.2, 0.9])
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    left.imshow(shares**0.5, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    left.set(xlabel="predicted class", ylabel="true class", title="confusions (square root of the share)")
    left.grid(False)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    middle.set_axisbelow(True)
    several = len(errors) > 16
    rows = [*errors[:8], *errors[-8:]] if several else list(errors)
    middle.barh(range(len(rows)), [100 * e for _, e in rows], color=ORANGE, height=0.75)
    middle.set_yticks(range(len(rows)), [_short(name, 22) for name, _ in rows])
    middle.invert_yaxis()
    if several:
        middle.axhline(7.5, color=GREY, linewidth=0.8, linestyle=":")
    middle.set(xlabel="error (%)", title="worst and best classes" if several else "classes")
    right.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    right.plot(*zip(*reliability, strict=True), color=BLUE, marker="o", markersize=3)
    right.set(xlim=(0, 1), ylim=(0, 1), xlabel="mean probability of the class given", title="reliability")
    right.set_ylabel("share that is right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return _save(figure, path)


@matplotlib.rc_context(STYLE)
def neighbours_figure(queries: Array, neighbours: Array, path: Path, agree: np.ndarray | None = None) -> Path:
    """Figure 4, right: test images and, in each row, the training images nearest in the last hidden layer.

    queries (N, px, px, 3) and neighbours (N, K, px, px, 3) uint8; where `agree` (N, K) is given, a frame shows
    whether the neighbour is of the query's class.
    """
    first, others = np.asarray(queries), np.asarray(neighbours)
    n, k = others.shape[:2]
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    figure = Figure(figsize=(0.95 * (k + 1.15), 0.95 * n + 0.25), layout=layout)
    # The empty second column sets the query apart.
    cells = figure.subplots(n, k + 2, squeeze=False, width_ratios=[1, 0.15] + [1] * k)
    for i in range(n):
        cells[i, 1].axis("off")
        _show(cells[i, 0], first[i])
        for j in range(k):
            _show(cells[i, j + 2], others[i, j])
            if agree is not None:
                for spine in cells[i, j + 2].spines.values():
                    spine.set(visible=True, color=GREEN if agree[i, j] else RED, linewidth=2)
    cells[0, 0].set_title("test image", loc="center")
    # A title of the column would widen it.
    words = cells[0, 2].text(0, 1.09, "nearest training images, nearest first", fontsize=9)
    words.set(transform=cells[0, 2].transAxes, in_layout=False)
    return _save(figure, path)


def run_curves(curves: RunCurves, scale: float = 1.0) -> dict[str, Curve]:
    """A run's `train` and `holdout` curve in their colours."""
    colours = {"train": BLUE, "holdout": ORANGE}
    return {name: Curve(x, [scale * v for v in y], colour=colours[name]) for name, (x, y) in curves.items()}


def _curves(
    axes: Axes, curves: Mapping[str, Curve], x_label: str, y_label: str, from_zero: bool = True
) -> None:
    for name, c in curves.items():
        marker = "o" if len(c.x) < 30 else ""
        (line,) = axes.plot(c.x, c.y, c.style, color=c.colour, label=name, marker=marker, markersize=2.5)
        if c.low is not None and c.high is not None:
            axes.fill_between(c.x, c.low, c.high, color=line.get_color(), alpha=0.18, linewidth=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.legend() if curves else axes.legend(handles=[])
    if from_zero and curves:
        axes.set_ylim(0, 1.06 * max(np.max(c.y if c.high is None else c.high) for c in curves.values()))


def kernel_grid(weight: Tensor, per_row: int = KERNELS_PER_ROW) -> np.ndarray:
    """Kernels (O, C, R, S) already scaled to 0..1 -> one picture (rows * (R+1) + 1, ..., 3), white between them.

    Three input channels are red, green, blue; with any other number the first is shown in grey.
    """
    w = weight.float().cpu().numpy().transpose(0, 2, 3, 1)  # (O, R, S, C)
    w = w if w.shape[-1] == 3 else w[..., :1].repeat(3, -1)
    count, r, s, _ = w.shape
    columns = min(per_row, count)
    picture = np.ones((-(-count // columns) * (r + 1) + 1, columns * (s + 1) + 1, 3), np.float32)
    for i, kernel in enumerate(w):
        top, left = i // columns * (r + 1) + 1, i % columns * (s + 1) + 1
        picture[top : top + r, left : left + s] = kernel
    return picture


def scaled_kernels(weight: Tensor) -> np.ndarray:
    """`kernel_grid` of weights (O, C, R, S), scaled from the smallest of them to the largest."""
    return kernel_grid(_scaled(weight))


def _scaled(weight: Tensor) -> Tensor:
    w = weight.detach().float()
    return (w - w.min()) / (w.max() - w.min()).clamp_min(1e-30)


def _kernels(axes: Iterable[Axes], weight: Tensor, columns: int = KERNELS_PER_ROW) -> None:
    """One block of kernels per axes, all on one scale from the smallest weight to the largest."""
    blocks = list(axes)
    parts = _scaled(weight).tensor_split(len(blocks))
    for tower, (block, part) in enumerate(zip(blocks, parts, strict=True)):
        block.imshow(kernel_grid(part, columns), interpolation="nearest")
        block.axis("off")
        block.set_anchor("NW")
        name = f"{len(part)} kernels of conv1, {weight.shape[2]}x{weight.shape[3]}"
        block.set_title(f"tower {tower + 1}: {name}" if len(blocks) > 1 else name)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.axis("on")
    axes.grid(False)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.imshow(image)


def _short(words: str, width: int) -> str:
    """The first synonym of a WordNet entry, cut to `width` characters."""
    first = words.split(",")[0]
    return first if len(first) <= width else first[: width - 1] + "…"


def _save(figure: Figure, path: Path) -> Path:
    """Writes the file, without a date or version in it, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    none_of = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, metadata=none_of.get(path.suffix))
    return path


@matplotlib.rc_context(STYLE)
def ratios_figure(names: Sequence[str], ratios: Sequence[float], path: Path, label: str, title: str) -> Path:
    """One bar per name, on a logarithmic axis around 1: to the right ours is better, to the left it loses."""
    figure = Figure(figsize=(7.2, 0.5 + 0.22 * max(len(names), 2)), layout="constrained")
    axes = figure.subplots()
    colours = [BLUE if r >= 1 else ORANGE for r in ratios]
    axes.barh(names, [np.log2(r) for r in ratios], color=colours, height=0.7)
    for row, r in enumerate(ratios):
        axes.text(np.log2(r), row, f" {r:.2f} ", va="center", ha="left" if r >= 1 else "right", fontsize=7)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(lambda x, _: f"{2**x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.set(xlabel=label, title=title)
    return _save(figure, path)
