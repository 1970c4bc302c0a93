"""Scoring: images in, log-probabilities out, and from these the two errors and the cross-entropy.

    p[n,c]  = mean over networks and views of softmax(logits[n,c])         section 4.1; worker.cu:150-174
    top-k   = share of images whose label is not among the k largest p[n,:]
    loss    = -mean over n of log p[n, label[n]]                           in nats

Probabilities are averaged, then the logarithm is taken; averaging logits would be another ensemble. Ten views
are the four corners and the centre of the image and the five mirrored; one view is the centre.

The network computes with its float32 weights in IEEE float32, whatever precision it was trained in: the numbers
belong to the weights and not to what made their training faster, and the end of a run, evaluate.py and
reproduce.py agree. The price, after training in bfloat16 under a compiled backend, is a second set of compiled graphs.

Every number comes with a 95 % interval over the draw of the *images*: another draw of the same size would
give another error. How much another *seed* changes it is a different question, answered by training again.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from alexnet import cli
from alexnet.data.augment import Augment
from alexnet.errors import UserError
from alexnet.system import under_precision

LEVEL = 0.95  # of every interval
TOP5_CLASSES = 6  # with five classes or fewer, the top five are never wrong


class Estimate(NamedTuple):
    """A measured value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Result:
    """What one network, or the average of several, does on one split. Errors are fractions, never percent."""

    split: str  # train, holdout or val
    views: int  # 1 or 10
    n: int  # images
    networks: int  # whose probabilities were averaged
    top1_error: Estimate
    top5_error: Estimate | None  # None with fewer than six classes
    cross_entropy: Estimate  # nats
    name: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON: `top1_error` is the value, `top1_error_interval` its bounds."""
        plain: dict[str, Any] = {}
        for key, value in self.__dict__.items():
            if isinstance(value, Estimate):
                plain |= {key: value.value, f"{key}_interval": [value.low, value.high]}
            else:
                plain[key] = value
        return plain

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "Result":
        """The inverse of `as_dict`."""
        values = {key: value for key, value in plain.items() if not key.endswith("_interval")}
        for key in values:
            if f"{key}_interval" in plain:
                values[key] = Estimate(plain[key], *plain[f"{key}_interval"])
        return cls(**values)


@dataclass(frozen=True)
class PaperRow:
    """One printed result of the paper; errors as fractions."""

    name: str
    source: str
    split: str
    views: int
    networks: int
    top1_error: float
    top5_error: float


# Trained from scratch only: the rows with a star were pre-trained on other ImageNet releases.
PAPER_ROWS = (
    PaperRow("1 CNN", "Table 2", "2012 val", 10, 1, 0.407, 0.182),
    PaperRow("5 CNNs", "Table 2", "2012 val", 10, 5, 0.381, 0.164),
    PaperRow("CNN", "Table 1", "2010 test", 10, 1, 0.375, 0.170),
    PaperRow("CNN", "footnote 5", "2010 test", 1, 1, 0.390, 0.183),
)


def paper_rows(wnids: Sequence[str], networks: int, views: int) -> list[PaperRow]:
    """The paper's rows with the same protocol; none unless the data set is ImageNet-1k (1000 WordNet ids)."""
    imagenet = len(set(wnids)) == 1000 and all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids)
    return [r for r in PAPER_ROWS if imagenet and r.views == views and (r.networks > 1) == (networks > 1)]


@torch.inference_mode()
def log_probabilities(
    model: nn.Module,
    augment: Augment,
    images: np.ndarray | Tensor,
    views: int = 1,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    index: np.ndarray | None = None,
) -> Tensor:
    """Images (N, px, px, 3) uint8, or the rows that `index` names -> log p (N, classes), float32 on the CPU.

    `images` may be memory-mapped: one batch is read at a time. `batch_size` counts views. Network and views
    move to `device`; the network runs in evaluation mode, float32 products in IEEE float32, under
    the caller's `autocast` if there is one.
    Raises UserError for views other than 1 or 10 and for no images.
    """
    if views not in (1, 10):
        raise UserError(f"views={views}: the paper's test uses the centre (views=1) or ten views (views=10).")
    rows = np.arange(len(images)) if index is None else np.asarray(index)
    if not len(rows):
        raise UserError("There is no image to evaluate: the split is empty. Choose another split=...")
    modes, step = {module: module.training for module in model.modules()}, max(1, batch_size // views)
    model.to(device).eval()
    augment.to(device)
    try:
        with (
            under_precision("32-true"),
            tqdm(total=len(rows), desc="evaluate", unit=" images", disable=None) as bar,
        ):
            parts = []
            for start in range(0, len(rows), step):
                # Indexing by an array copies, also from a read-only map.
                batch = torch.as_tensor(images[rows[start : start + step]]).to(device)
                x = augment.centre(batch).unsqueeze(1) if views == 1 else augment.ten_views(batch)
                logits = model(x.flatten(0, 1)).float().unflatten(0, x.shape[:2])  # (B, views, classes)
                parts.append((logits.log_softmax(-1).logsumexp(1) - math.log(views)).cpu())
                bar.update(len(batch))
        return torch.cat(parts)
    finally:
        for module, training in modes.items():
            module.training = training


def average(log_probs: Sequence[Tensor]) -> Tensor:
    """The paper's ensemble: log of the mean of the networks' probabilities, all (N, classes)."""
    shapes = {tuple(p.shape) for p in log_probs}
    if len(shapes) != 1:
        raise UserError(
            f"Networks to average must agree on images and classes, here {sorted(shapes)}: "
            "give checkpoints trained on the same classes."
        )
    return reduce(torch.logaddexp, log_probs) - math.log(len(log_probs))


def score(
    log_probs: Tensor,
    labels: Tensor | np.ndarray,
    *,
    split: str = "val",
    views: int = 1,
    networks: int = 1,
    name: str = "",
) -> Result:
    """Log-probabilities (N, classes) and labels (N,) -> Result, which keeps the other arguments as they are.

    Raises UserError for fewer than two images, labels the network has no output for, and NaN outputs.
    """
    truth = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    n, classes = log_probs.shape
    if len(truth) != n or n < 2:
        raise UserError(f"{n} outputs and {len(truth)} labels: give as many of each, and at least two.")
    low, high = int(truth.min()), int(truth.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"The labels run from {low} to {high}, but the network has {classes} outputs: "
            "evaluate the checkpoint on the data set it was trained on (store=...)."
        )
    if broken := int(log_probs.isnan().any(1).sum()):
        raise UserError(
            f"The network's output is not a number for {broken:,} of {n:,} images: its training diverged; "
            "take an earlier checkpoint=... or train with a lower optim.lr."
        )
    top = log_probs.topk(min(5, classes)).indices == truth[:, None]  # (N, 5)
    top1 = _share(int((~top[:, 0]).sum()), n)
    top5 = _share(int((~top.any(1)).sum()), n) if classes >= TOP5_CLASSES else None
    # The normal interval: mean +- 1.96 s / sqrt(n).
    losses = -log_probs.double().gather(1, truth[:, None])
    loss = float(losses.mean())
    half = float(NormalDist().inv_cdf((1 + LEVEL) / 2) * losses.std() / math.sqrt(n))
    return Result(split, views, n, networks, top1, top5, Estimate(loss, loss - half, loss + half), name)


def _share(count: int, n: int) -> Estimate:
    """A proportion with Wilson's interval, which stays inside 0..1 and is honest near both ends."""
    from scipy.stats import binomtest  # not above: a second of a prediction, which has no interval

    interval = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return Estimate(count / n, float(interval.low), float(interval.high))


def table(results: Sequence[Result], references: Sequence[PaperRow] = ()) -> str:
    """Text of at most 100 columns: a line per result with its 95 % intervals, then the paper's rows."""
    rows = [("network", "split", "views", "images", "top-1 error %", "top-5 error %", "cross-entropy")]
    for r in results:
        name = r.name or ("1 network" if r.networks == 1 else f"{r.networks} networks")
        loss, _, high = r.cross_entropy
        shown = f"{r.n:,}", percent(r.top1_error), percent(r.top5_error), f"{loss:.3f} ±{high - loss:.3f}"
        rows.append((name, r.split, str(r.views), *shown))
    for p in references:
        errors = f"{100 * p.top1_error:.1f}", f"{100 * p.top5_error:.1f}"
        rows.append((f"paper {p.name}, {p.source}", p.split, str(p.views), "", *errors, ""))
    return cli.table(rows, right=(2, 3))


def percent(e: Estimate | None) -> str:
    return "-" if e is None else f"{100 * e.value:.2f} ({100 * e.low:.1f}-{100 * e.high:.1f})"
