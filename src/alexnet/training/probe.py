"""What the network knows before its first step, and why its loss stands still.

A loss pinned at ln(classes) is the commonest failure of this network: it answers every image alike, with the
frequencies of the classes. The cause is visible before training. With biases of 1 and weights of std .01
(section 5) nearly every unit is always on, its value is set by the bias, and the image is a ripple of a per
cent on top. For a layer's output y[n,u], image n, unit u:

    rms          sqrt(mean_nu y^2)                                      all there is
    image rms    sqrt(mean_u var_n y[n,u])                              what depends on the image
    correlation  mean over pairs n != m of <y[n],y[m]> / |y[n]||y[m]|   1: all images look alike
    dead         share of units (feature maps) that are 0 for every image, where the output is rectified
    |g|/|w|      gradient of the loss over weight, in norms             times the rate: relative step
    s/k          the response norm divides by s^beta, s = k + alpha * mean of squares; at 1 it is a constant

and the *logit signal*, mean_c std_n logits[n,c]: how much the answers differ from image to image.

Signals measured by this file (seed 0, 48 images of ImageNet, float32):

    1000 classes, 224 px    raw pixels: paper .013, Caffe .006, code145 .18      normalised: torch .0004, He .51
    200 classes, `mini`     raw pixels: paper .002, Caffe .001, code145 .03, code145 with init=fan_in .14

STALLS stands in the gap between the starts of which people report losses stuck at 6.9 for thousands of steps
(paper, Caffe, and any of these on normalised input, which is 30 to 40 times quieter) and those that start at
once. It predicts a *long* plateau, not a failure: Caffe's net leaves after one or two thousand steps, sometimes
eight.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alexnet.cli import table
from alexnet.errors import UserError
from alexnet.layers.local_response_norm import window_sum

STALLS = 0.05  # logit signal, see above
TOO_LOUD = 6.0  # first loss / ln(classes): 1.1 code145, 3 He with biases of 1, 18 He on raw pixels
RAW_RMS = 10.0  # grey levels: raw pixels minus their mean have rms about 60, normalised ones about 1
SILENT = ("Dropout", "Flatten", "Identity")  # in evaluation mode these say nothing new
MANY_DEAD = 0.9  # share of a layer's units


@dataclass(frozen=True)
class Layer:
    """Output of one module; `gradient_to_weight` for those with weights, `dead` for rectified outputs."""

    name: str
    rms: float
    image_rms: float
    correlation: float
    dead: float | None
    gradient_to_weight: float | None = None


@dataclass(frozen=True)
class Denominators:
    """s/k of one response norm over images, channels and positions."""

    name: str
    median: float
    p99: float
    largest: float


@dataclass(frozen=True)
class Probe:
    """The measurements of one untrained network."""

    images: int
    classes: int
    input_rms: float
    layers: tuple[Layer, ...]
    norms: tuple[Denominators, ...]
    logit_signal: float
    loss: float

    @property
    def stalls(self) -> bool:
        """Whether a plateau at ln(classes) is to be expected."""
        return not self.logit_signal >= STALLS  # true for NaN

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"stalls": self.stalls, "verdict": self.verdict()}

    def verdict(self) -> str:
        """Two or three sentences: the prediction, its reason, and the remedy."""
        plateau, signal = f"ln({self.classes}) = {math.log(self.classes):.3f}", f"{self.logit_signal:.2g}"
        if not math.isfinite(self.loss):
            return "The first loss is not a number: lower model.init_std, or check the images and their mean."
        if not self.stalls:
            if self.loss > TOO_LOUD * math.log(self.classes):
                return (
                    f"Expect a burst or NaN: the first loss is {self.loss:.3g}, guessing gives {plateau}. "
                    "Lower model.init_std or optim.lr; model.init=he belongs to augment.input=normalised."
                )
            return f"No plateau expected: from image to image the logits differ by {signal} (above {STALLS})."
        shares = [(layer.dead or 0.0, layer.name) for layer in self.layers]
        dead, worst = max(shares, key=itemgetter(0), default=(0.0, ""))
        if dead > MANY_DEAD:
            remedy = f"{dead:.0%} of the units after {worst} are dead: raise model.init_bias there."
        elif self.input_rms < RAW_RMS:
            remedy = (
                f"The input has rms {self.input_rms:.2g}: these weights are meant for raw pixels. "
                "Set model.init=he 'model.init_bias=[0,0,0,0,0,0,0,0]', or augment.input=mean_image and "
                "model.init=fan_in with model=code145's weights."
            )
        else:
            remedy = (
                "Use the 2012 code's weights, scaled to this net: model.init=fan_in, init_std .03 "
                "for conv3, conv4, conv5 (as model=code145 has); or augment.input=normalised, model.init=he."
            )
        return (
            f"Expect a plateau at {plateau}: from image to image the logits differ by {signal} only "
            f"(training starts at once above {STALLS}). {remedy}"
        )

    def table(self) -> str:
        """Text of at most 100 columns: layers, denominators of the response norms, logits."""
        guess = f"ln({self.classes}) = {math.log(self.classes):.3f}"
        layers: list[tuple[str, ...]] = [("layer", "rms", "image rms", "correlation", "dead", "|g|/|w|")]
        for y in self.layers:
            dead = "" if y.dead is None else f"{y.dead:.1%}"
            ratio = "" if y.gradient_to_weight is None else f"{y.gradient_to_weight:.1e}"
            layers.append((y.name, f"{y.rms:.3g}", f"{y.image_rms:.2g}", f"{y.correlation:.4f}", dead, ratio))
        norms: list[tuple[str, ...]] = [("response norm, s/k", "median", "99 %", "largest")]
        norms += [(n.name, f"{n.median:.5f}", f"{n.p99:.5f}", f"{n.largest:.5f}") for n in self.norms]
        logits: list[tuple[str, ...]] = [
            ("logit signal", f"{self.logit_signal:.2g}", f"stalls below {STALLS}"),
            ("first loss", f"{self.loss:.4g}", f"guessing: {guess}"),
        ]
        parts = (layers, norms, logits) if self.norms else (layers, logits)
        return "\n\n".join(table(rows, right=range(1, len(rows[0]))) for rows in parts)


def probe(model: nn.Module, images: Tensor, labels: Tensor | None = None) -> Probe:
    """One forward and one backward pass without dropout. images (N, 3, c, c) as the network is fed; labels (N).

    Without labels, the gradient is that of labels dealt out in turn. A copy of the network is asked: it stays
    as it was. N of 32 to 128 will do. A compiled network hides its layers: probe it before torch.compile.
    Raises UserError for a single image.
    """
    if len(images) < 2:
        raise UserError("The probe compares images and got one: give it at least two, better 32.")
    layers: list[Layer] = []
    norms: list[Denominators] = []
    last = "input"

    @torch.no_grad()
    def measure(name: str, module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        """A module without weights is named after the layer it follows: one activation may serve them all."""
        nonlocal last
        last = name if _weight(module) is not None else last
        label = name if _weight(module) is not None else f"{last} {type(module).__name__}"
        layers.append(_layer(label, y.detach().float()))
        s = _denominators(module, inputs[0].detach().float())
        if s is not None:
            # From every so-many-th value: torch.quantile takes 16 million at most.
            sample = s.flatten()[:: max(1, s.numel() // 1_000_000)]
            median, p99 = torch.quantile(sample, torch.tensor([0.5, 0.99], device=s.device)).tolist()
            norms.append(Denominators(label, median, p99, float(s.max())))

    net = copy.deepcopy(model).eval()  # without the gradients of the original
    for name, module in net.named_modules():
        kind = type(module).__name__
        if kind.startswith("Dropout"):
            module.p = 0.0  # evaluation alone scales by 1 - p in the 2012 mode, and not in torch's
        if not any(module.children()) and not kind.startswith(SILENT):
            module.register_forward_hook(partial(measure, name))
    with torch.enable_grad():
        logits = net(images).float()
        if labels is None:
            labels = torch.arange(len(images), device=images.device) % logits.shape[1]
        loss = F.cross_entropy(logits, labels)
        loss.backward()
    ratios = {name: ratio for name, ratio, _ in _gradients(net, dict(net.named_parameters()))}
    return Probe(
        images=len(images),
        classes=logits.shape[1],
        input_rms=_rms(images.float()),
        layers=tuple(replace(layer, gradient_to_weight=ratios.get(layer.name)) for layer in layers),
        norms=tuple(norms),
        logit_signal=float(logits.detach().std(0).mean()),
        loss=float(loss.detach()),
    )


def _weight(module: nn.Module) -> nn.Parameter | None:
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def _layer(name: str, y: Tensor) -> Layer:
    """y (N, ...) -> its statistics; a unit of a 4-d output is a feature map."""
    rows = F.normalize(y.flatten(1), dim=1)
    n = len(rows)
    # The sum over pairs n != m of <r_n, r_m> is |sum_n r_n|^2 minus the N diagonal terms.
    correlation = float((rows.sum(0).square().sum() - rows.square().sum()) / (n * (n - 1)))
    dead = None
    if float(y.min()) == 0:  # rectified
        off = (y == 0).flatten(2).all(2) if y.dim() > 2 else y == 0  # (N, units)
        dead = float(off.all(0).float().mean())
    return Layer(name, _rms(y), float(y.var(0).mean().sqrt()), correlation, dead)


def _denominators(module: nn.Module, x: Tensor) -> Tensor | None:
    """s/k of a response norm for its input x (N, C, H, W); None for any other module."""
    size, alpha, k = (getattr(module, name, None) for name in ("size", "alpha", "k"))
    if size is None or alpha is None or k is None:
        return None
    if type(module).__name__ == "SameMapNorm":
        return 1 + alpha / k * F.avg_pool2d(x.square(), size, 1, size // 2)
    if str(getattr(module, "order", "")).startswith("relu"):
        x = x.relu()
    towers = x.square().unflatten(1, (getattr(module, "groups", 1), -1))  # (N, towers, C / towers, H, W)
    return 1 + alpha / (k * size) * window_sum(towers, 2, size // 2, (size - 1) // 2)


def _gradients(model: nn.Module, used: Mapping[str, Tensor]) -> Iterator[tuple[str, float, float]]:
    """(layer, |g|/|w|, share of units that got no gradient at all) of all layers with a gradient.

    Silent inputs take the gradient from a unit's weights too, but not from its bias.
    """
    for name, module in model.named_modules():
        if _weight(module) is None:
            continue
        w = used[f"{name}.weight"]
        if w.grad is not None:
            silent = (w.grad.flatten(1) == 0).all(1) if w.dim() > 1 else w.grad == 0
            bias = used.get(f"{name}.bias")
            if bias is not None and bias.grad is not None:
                silent = silent & (bias.grad == 0)
            yield name, float(w.grad.float().norm() / w.detach().float().norm()), float(silent.float().mean())


def spread(rows: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the rows, evenly from first to last: stores are sorted by class."""
    return rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(np.int64)]


def explain_stall(
    model: nn.Module,
    loss: float,
    classes: int,
    step: int,
    used: Mapping[str, Tensor] | None = None,
    origin: str = "",
) -> str:
    """Why training stands still, from the gradients of the last step: several lines for the terminal.

    `model` still holds the gradients of that step, or `used`, {name: parameter}, does where it was computed with
    others than its own (WorkingCopies.by_name). A unit is called dead when no image of the batch gave its weights
    or its bias any gradient. `origin` says where the first value came from that is not finite (classifier.py).
    """
    rows = list(_gradients(model, dict(model.named_parameters()) if used is None else used))
    cells = [(name, f"{ratio:.1e}", f"{dead:.0%}") for name, ratio, dead in rows]
    layers = table([("layer", "|g|/|w|", "dead"), *cells], right=(1, 2))
    if math.isfinite(loss):
        guess = math.log(classes)
        what = (
            f"{loss:.4f}, {abs(loss / guess - 1):.1%} from ln({classes}) = {guess:.4f}: "
            "every image gets the same answer."
        )
    else:
        what = f"{loss}; first not finite: {origin}." if origin else f"{loss}."
    broken = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
    # A dead layer starves all layers before it, so the last one in the list is the culprit.
    culprit = next((name for name, _, dead in reversed(rows) if dead > MANY_DEAD), None)
    if broken or not math.isfinite(loss):
        where = f"{broken[0]} is no longer finite. " if broken else ""
        then = f"{where}Train with a tenth of the rate (optim.lr), from the last good checkpoint or anew."
    elif not rows:
        then = "no layer has a gradient: is everything frozen?"
    elif culprit:
        then = (
            f"{culprit} is dead; no step revives it. Start anew with a lower rate (optim.lr) or another seed."
        )
    else:
        then = (
            "run the same command with probe=true; its verdict names the remedy. It is mostly the start: use\n"
            "model=code145's weights with model.init=fan_in on raw pixels, or model.init=he on normalised ones.\n"
            "Some starts leave the plateau after thousands of steps: a larger watchdog_steps waits for them."
        )
    return f"Step {step:,}: the loss is {what}\n{layers}\nNext: {then}"
