"""What a trained network says: measured once, when its run is over, and kept in the run's directory.

    val_1view.npz       log-probabilities of val, (N, classes) float32, and its labels
    val_10view.npz
    measures.json       errors on val, holdout and training images in evaluation mode; chroma of the halves of conv1
    conv1.npy           its kernels, (O, 3, R, S): Figure 3
    probe.json          what the initialisation probe said of the untrained network
    nearest_hidden.npz  for test images their six nearest training images by the last hidden layer: Figure 4
    nearest_pixels.npz  the same by raw pixels
    figure4.npz         the pictures that Figure 4 shows

Everything here is of last.ckpt: all arms train equally long and none is stopped where it looks best. (The results in
run.json are of best.ckpt, for the user of a network.) A file is written whole or not at all: a kill in between costs
one measure. A run that diverged has a reason instead.
"""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet.claims.claims import FIRST_SEED, METRICS, Claim, Features, Figure, Nets, Test
from alexnet.claims.statistics import split_excess
from alexnet.claims.tables import Evidence
from alexnet.data.module import ImageData
from alexnet.data.store import Store
from alexnet.errors import UserError
from alexnet.system import git_state, read_json, replaced, write_json
from alexnet.training import assemble
from alexnet.training.checkpoint import CHECKPOINTS, LAST, load
from alexnet.training.config import Train
from alexnet.training.metrics import read_metrics
from alexnet.training.network import Network
from alexnet.training.probe import spread
from alexnet.training.record import read_record
from alexnet.training.scoring import TOP5_CLASSES, average, log_probabilities, score

TRAIN_IMAGES = 2000  # seen once more in evaluation mode: a standard error of 1.1 points at most
QUERIES = 1000  # test images whose neighbours are looked for
NEIGHBOURS = 6  # Figure 4
GALLERY_PART = 512  # training images compared at a time
SHOWN, SHOWN_QUERIES = 8, 5  # test images in the left and the right half of Figure 4


class Want(StrEnum):
    """A measure, named by its file."""

    one_view = "val_1view.npz"
    ten_views = "val_10view.npz"
    basic = "measures.json"  # after the view it takes val's errors from, if there is one
    kernels = "conv1.npy"
    probe = "probe.json"
    hidden = "nearest_hidden.npz"
    pixels = "nearest_pixels.npz"
    figure4 = "figure4.npz"  # after the neighbours it shows


PICTURES = {Want.figure4}  # holds images of the data set


def wanted(claim: Claim, seed: int) -> set[Want]:
    """What a claim asks of its runs. Pixels know no seed, and Figure 4 shows one net: those of one seed will do."""
    wants = {Want.basic, *(want_of(test) for test in claim.tests.values())}
    if claim.probe:
        wants.add(Want.probe)
    if claim.figure is Figure.kernels:
        wants.add(Want.kernels)
    if claim.figure is Figure.retrieval:
        wants |= {Want.hidden, Want.figure4}
    return wants if seed == FIRST_SEED else wants - {Want.pixels, Want.figure4}


def want_of(test: Test) -> Want:
    by_features = {Features.hidden: Want.hidden, Features.pixels: Want.pixels}
    return by_features.get(test.features, Want.one_view if test.views == 1 else Want.ten_views)


def is_measured(directory: Path, wants: Collection[Want]) -> bool:
    wants = set(wants) - (set() if weights(directory).exists() else PICTURES)  # a record (jobs.keep) has none
    return bool(failure(directory)) or all((directory / want).exists() for want in wants)


def weights(directory: Path) -> Path:
    """What everything here is measured of."""
    return directory / CHECKPOINTS / LAST


def failure(directory: Path) -> str:
    """Why this run has no results, empty if it has."""
    path = directory / Want.basic
    return str(read_json(path).get("failed", "")) if path.exists() else ""


def diverged(directory: Path) -> bool:
    """Whether the loss of training, or of the holdout after it, ended in NaN or infinity: weights do not recover."""
    return read_metrics(directory / "metrics.csv").diverged


def damage(directory: Path) -> str:
    """What is wrong with the first file of a run that does not hold what it should, in one line; empty where all do."""
    paths = (directory / name for name in ("run.json", "metrics.csv", *Want))
    return next(filter(None, (_damage(p, p.stat().st_mtime_ns) for p in paths if p.exists())), "")


@cache
def _damage(path: Path, written: int) -> str:
    """Once for each time at which the file was written: a run's state is asked for often."""
    try:
        if _holds(path):
            return ""
    except UserError as error:
        return str(error)
    except Exception:  # whatever NumPy makes of it
        pass
    again = "delete it, and it is measured" if path.name in list(Want) else "delete its directory to train it"
    return f"{path} is damaged: {again} again"


DIMENSIONS = {  # of the arrays in a file, each with as many rows as the others
    Want.one_view: {"log_probs": 2, "labels": 1},
    Want.ten_views: {"log_probs": 2, "labels": 1},
    Want.hidden: {"queries": 1, "neighbours": 2, "agree": 2},
    Want.pixels: {"queries": 1, "neighbours": 2, "agree": 2},
    Want.figure4: {"queries": 4, "neighbours": 5, "agree": 2},
}


def _holds(path: Path) -> bool:
    """Whether a file of a run holds what it must to be read. Raises what its reader makes of it."""
    match path.name:
        case "run.json":
            return "num_classes" in read_record(path.parent)["config"]["model"]
        case "metrics.csv":
            read_metrics(path)
            return True
        case Want.basic:
            content = read_json(path)
            return "failed" in content or all(isinstance(of, dict) for of in content["results"].values())
        case Want.probe:
            return {"logit_signal", "loss", "stalls", "verdict"} <= read_json(path).keys()
        case Want.kernels:
            return bool(np.load(path).ndim == 4)
    arrays, dimensions = dict(np.load(path)), DIMENSIONS[Want(path.name)]
    rows = {len(arrays[name]) for name in dimensions}
    return len(rows) == 1 and all(arrays[name].ndim == n for name, n in dimensions.items())


def record_failure(directory: Path, reason: str) -> None:
    write_json(directory / Want.basic, {"failed": reason})


def measure(directory: Path, config: Train, wants: Collection[Want]) -> None:
    """Makes what is missing of `wants`, in the order of Want."""
    missing = [want for want in Want if want in wants and not (directory / want).exists()]
    if not missing:
        return
    resolved = read_json(directory / "run.json")["resolved"]
    device = torch.device(resolved["device"])
    classifier = load(weights(directory), resolved["backend"]).to(device)
    net = Net(directory, config, classifier, assemble.image_data(config), device)
    for want in missing:
        _save(directory / want, net.content(want))


def _save(path: Path, content: Any) -> None:
    """Whole or not at all: plain data, arrays by name, or one array."""
    if path.suffix == ".json":
        write_json(path, content)
        return
    with replaced(path) as partial, partial.open("wb") as file:
        if isinstance(content, dict):
            np.savez(file, **content)
        else:
            np.save(file, content)


@dataclass(frozen=True)
class Net:
    """The trained network of a run and its data, and what each measure is of them."""

    directory: Path
    config: Train
    classifier: Network
    data: ImageData
    device: torch.device

    def content(self, want: Want) -> Any:
        """Of the file that is named so."""
        c, val = self.classifier, self.data.val_store
        match want:
            case Want.one_view | Want.ten_views:
                log_probs = self.log_probabilities(val, views=10 if want is Want.ten_views else 1)
                return {"log_probs": log_probs.numpy(), "labels": val.labels}
            case Want.basic:
                return self.basic()
            case Want.kernels:
                return c.net.conv1.weight.detach().float().cpu().numpy()
            case Want.probe:  # of the network before training: its weights depend on seed and names alone
                return c.initial_probe(self.data.train_store, self.data.split[0]).as_dict()
            case Want.hidden:
                return self.neighbours(lambda x: c.net.last_hidden(c.net.features(c.augment.centre(x))))
            case Want.pixels:  # as the network sees them, less the mean image, which changes no distance
                return self.neighbours(lambda x: c.augment.centre(x).flatten(1))
            case Want.figure4:
                return self.figure4()

    def log_probabilities(self, store: Store, rows: np.ndarray | None = None, views: int = 1) -> Tensor:
        c, size = self.classifier, self.config.data.eval_batch_size
        return log_probabilities(c.net, c.augment, store.images, views, size, self.device, rows)

    def basic(self) -> dict[str, Any]:
        """Its `results` have the form of run.json's."""
        started = time.monotonic()
        store, (trained, held_out) = self.data.train_store, (part.numpy() for part in self.data.split)
        rows = {"train": spread(trained, TRAIN_IMAGES), "holdout": held_out}
        seen = {s: (self.log_probabilities(store, r), store.labels[r]) for s, r in rows.items() if len(r)}
        view, val = self.directory / Want.one_view, self.data.val_store
        known = torch.from_numpy(np.load(view)["log_probs"]) if view.exists() else None
        seen["val"] = self.log_probabilities(val) if known is None else known, val.labels
        errors = {s: score(*both, split=s, name="last epoch").as_dict() for s, both in seen.items()}
        first, second = chroma(self.classifier.net.conv1.weight).tensor_split(2)
        results = {**errors, "conv1": {"chroma_split": split_excess(first.numpy(), second.numpy())}}
        return {"results": results, "seconds": round(time.monotonic() - started, 1), "git": git_state()}

    def neighbours(self, features: Callable[[Tensor], Tensor]) -> dict[str, np.ndarray]:
        train, val = self.data.train_store, self.data.val_store
        queries, gallery = spread(np.arange(len(val)), QUERIES), self.data.split[0].numpy()
        found = nearest(features, val.images, queries, train.images, gallery, self.device)
        agree = train.labels[found] == val.labels[queries][:, None]
        return {"queries": queries, "neighbours": found, "agree": agree}

    def figure4(self) -> dict[str, np.ndarray]:
        """Images chosen by their place, not by what became of them: one of each of eight classes, spread."""
        train, val = self.data.train_store, self.data.val_store
        classes = spread(np.unique(val.labels), SHOWN)
        left = np.array([np.flatnonzero(val.labels == c)[0] for c in classes])
        found = np.load(self.directory / Want.hidden)
        right = spread(np.arange(len(found["queries"])), SHOWN_QUERIES)
        return {
            "images": val.images[left],
            "labels": val.labels[left],
            "probabilities": self.log_probabilities(val, left).exp().numpy(),
            "names": np.array([c["words"] or c["wnid"] for c in val.classes]),
            "queries": val.images[found["queries"][right]],
            "neighbours": train.images[found["neighbours"][right]],
            "agree": found["agree"][right],
        }


def chroma(weight: Tensor) -> Tensor:
    """How far from grey each kernel is: weight (O, 3, R, S) -> (O,), 0 for grey, 1 where R + G + B = 0 everywhere.

    The share of a kernel's energy outside the grey axis; random kernels have 2/3.
    """
    w = weight.detach().float().cpu()
    colour = w - w.mean(1, keepdim=True)
    return colour.square().sum((1, 2, 3)) / w.square().sum((1, 2, 3)).clamp_min(1e-30)


@torch.inference_mode()
def nearest(
    features: Callable[[Tensor], Tensor],
    query_images: np.ndarray,
    queries: np.ndarray,
    gallery_images: np.ndarray,
    gallery: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """The rows of `gallery` whose features are nearest (Euclidean) to each query's, nearest first: (Q, NEIGHBOURS)."""

    def of(images: np.ndarray, rows: np.ndarray) -> Tensor:
        return features(torch.from_numpy(images[rows]).to(device)).float()

    def parts(rows: np.ndarray) -> list[np.ndarray]:
        return np.array_split(rows, max(1, -(-len(rows) // GALLERY_PART)))

    q = torch.cat([of(query_images, rows) for rows in parts(queries)])
    k = min(NEIGHBOURS, len(gallery))
    distance = torch.full((len(q), k), math.inf, device=device)
    row = torch.zeros((len(q), k), dtype=torch.int64, device=device)
    for rows in parts(gallery):
        here = torch.cdist(q, of(gallery_images, rows))
        both = torch.cat([distance, here], 1)
        rows_of_both = torch.cat([row, torch.from_numpy(rows).to(device).expand(len(q), -1)], 1)
        distance, place = both.topk(k, largest=False)
        row = rows_of_both.gather(1, place)
    return row.cpu().numpy()


# From files to what the tables take ---------------------------------------------------------------------------------


def evidence(directory: Path) -> Evidence | None:
    """Of a run that is over; None while it is not, or where it is damaged. A diverged run has nan for every result,
    and its curves."""
    record_path = directory / "run.json"
    if not record_path.exists() or damage(directory):
        return None
    record, failed = read_json(record_path), bool(failure(directory))
    if record["state"] != "finished" and not failed:
        return None
    basic, metrics = directory / Want.basic, read_metrics(directory / "metrics.csv")
    measures = read_json(basic) if basic.exists() else {}
    found = Evidence.of_run(measures, metrics, record["config"]["model"]["num_classes"])
    if failed or metrics.diverged:
        nothing = {metric: math.nan for metric in METRICS if not metric.startswith("gap/")}
        return replace(found, results=nothing, diverged=True)
    return found


def per_image(test: Test, directories: Collection[Path]) -> dict[str, np.ndarray]:
    """{metric: (nets, images), or (1, images) where all nets answer together} of the runs that have what it takes.

    1 for a wrong image, and its cross-entropy; of neighbours, the share that is of the image's class.
    """
    files = [d / want_of(test) for d in directories if (d / want_of(test)).exists()]
    if not files:
        return {}
    content = [dict(np.load(file)) for file in files]
    if test.features is not Features.logits:
        return {"retrieval/precision_at_6": np.stack([c["agree"].mean(1) for c in content])}
    outputs = [torch.from_numpy(c["log_probs"]) for c in content]
    # (nets, N, classes)
    log_probs = average(outputs)[None] if test.nets is Nets.all else torch.stack(outputs)
    labels, classes = torch.from_numpy(content[0]["labels"])[:, None], log_probs.shape[-1]
    right = log_probs.topk(min(5, classes)).indices == labels  # (nets, N, 5)
    loss = -log_probs.double().gather(2, labels.expand(len(log_probs), -1, -1))
    found = {"val/top1_error": ~right[..., 0], "val/cross_entropy": loss[..., 0]}
    if classes >= TOP5_CLASSES:
        found["val/top5_error"] = ~right.any(-1)
    return {metric: values.double().numpy() for metric, values in found.items()}
