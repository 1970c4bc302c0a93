"""Where a network errs and how sure it is: errors by class, and calibration.

    confusion[a,b] = number of images of class a whose most probable class is b

A network is calibrated if of all images to which it gives its class with probability p, the share p is right. For the
reliability diagram images are put into bins by the probability of their most probable class; the expected calibration
error is the mean over images of the distance between accuracy and confidence of their bin:

    ECE = sum over bins of (images in the bin / N) |share that is right - mean probability|

(M. P. Naeini, G. Cooper, M. Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", 2015;
C. Guo et al., "On calibration of modern neural networks", 2017).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alexnet import cli

BINS = 15  # of equal width, as in the papers above
TAKEN_FOR = 3  # classes that are named beside an error


@dataclass(frozen=True)
class ClassError:
    """One class: how many images, which share is wrong (a fraction), and what they are taken for most often."""

    label: int
    name: str
    n: int
    error: float
    taken_for: list[tuple[str, int]]  # (name, images), the most frequent first


@dataclass(frozen=True)
class Bin:
    """Images whose largest probability lies in (low, high]: how many, their mean probability, and the share right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    ece: float  # expected calibration error, a fraction
    bins: list[Bin]  # the empty ones left out


def confusion_matrix(log_probs: Tensor, labels: Tensor | np.ndarray) -> np.ndarray:
    """Log-probabilities (N, classes) and labels (N,) -> counts (classes, classes): row true, column predicted."""
    classes = log_probs.shape[1]
    truth = torch.as_tensor(np.asarray(labels), dtype=torch.int64)
    pairs = truth * classes + log_probs.argmax(1).cpu()
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()


def errors_by_class(confusion: np.ndarray, names: Sequence[str]) -> list[ClassError]:
    """The classes that have images, in order of their labels."""
    found = []
    for label, counts in enumerate(confusion):
        others = counts.copy()
        others[label] = 0
        most = np.argsort(-others, kind="stable")[:TAKEN_FOR]
        taken_for = [(names[k], int(others[k])) for k in most if others[k]]
        if n := int(counts.sum()):
            found.append(ClassError(label, names[label], n, float(others.sum() / n), taken_for))
    return found


def calibration(log_probs: Tensor, labels: Tensor | np.ndarray, bins: int = BINS) -> Calibration:
    """Log-probabilities (N, classes) and labels (N,) -> the reliability diagram's bins and their ECE."""
    top = log_probs.max(1)
    confidence = top.values.exp().double().cpu().numpy().clip(0, 1)
    right = top.indices.cpu().numpy() == np.asarray(labels)
    where = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for i in np.unique(where):
        inside = where == i
        share, mean = float(right[inside].mean()), float(confidence[inside].mean())
        found.append(Bin(int(i) / bins, (int(i) + 1) / bins, int(inside.sum()), mean, share))
    ece = sum(b.n * abs(b.accuracy - b.confidence) for b in found) / len(right)
    return Calibration(ece, found)


def table(classes: Sequence[ClassError]) -> str:
    """A line for each class, the worst first: name, images, error in percent, what it is taken for."""
    rows = [("class", "images", "error %", "taken for")]
    for one in sorted(classes, key=lambda c: (-c.error, c.label)):
        others = ", ".join(f"{name} ({count})" for name, count in one.taken_for)
        others = others if len(others) <= 50 else f"{others[:49]}…"
        rows.append((one.name[:28], f"{one.n:,}", f"{100 * one.error:.1f}", others))
    return cli.table(rows, right=(1, 2))
