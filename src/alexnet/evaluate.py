"""The verb `evaluate`: checkpoints in, a table and a JSON file out. training/scoring.py says what the numbers are."""

import csv
import errno
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alexnet.data.store import Store, open_store
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.system import command_line, device_type_of, environment, write_json
from alexnet.training import by_class, compare
from alexnet.training.checkpoint import BEST, find, load
from alexnet.training.network import Network
from alexnet.training.scoring import PaperRow, Result, average, log_probabilities, paper_rows, score, table

WORST = 10  # classes that are printed


@dataclass
class Evaluate:
    """scripts/evaluate.py."""

    # A checkpoint file or a run directory; several are averaged as the paper's ensembles are.
    checkpoint: Any = None
    # Instead: a directory, all runs below which are listed with their errors.
    compare: str | None = None
    views: int = 1
    split: str = "val"
    # The store to evaluate on; None: <data_dir>/<the checkpoint's data set>.
    store: str | None = None
    backend: Backends = field(default_factory=Backends)
    batch_size: int = 256
    device: str = "auto"
    data_dir: str = "data"
    output_dir: str = "outputs"
    # A table and a picture of the errors by class, beside the JSON.
    per_class: bool = False
    # Besides the run's directory, where the JSON goes.
    json: str | None = None

    def __post_init__(self) -> None:
        if not self.checkpoint and not self.compare:
            raise UserError(
                "checkpoint is not given: use checkpoint=<file or run directory>, or compare=<directory>"
            )
        if self.checkpoint and self.compare:
            raise UserError(
                f"compare={self.compare} lists runs as they ended: leave checkpoint out, or compare"
            )
        if self.batch_size < 1:
            raise UserError(f"batch_size={self.batch_size} must be a positive integer")
        if self.views not in (1, 10):
            raise UserError(f"views={self.views} must be 1 (centre) or 10 (corners, centre and mirrors)")
        if self.device not in ("auto", "cpu", "cuda", "gpu"):
            raise UserError(f"device={self.device} must be one of auto, cpu, gpu")
        if self.split not in ("train", "holdout", "val"):
            raise UserError(f"split={self.split} must be one of train, holdout, val")


def evaluate(config: Evaluate) -> list[Result]:
    """Each checkpoint on the split, then their average if there are several.

    Raises UserError if a checkpoint is missing, if their classes differ from each other's or from the store's.
    """
    if config.compare:
        return _compared(config, Path(config.compare))
    given = config.checkpoint if isinstance(config.checkpoint, list) else [config.checkpoint]
    paths = [find(str(path)) for path in given]
    device = torch.device(device_type_of(config.device, "device", "device=cpu"))
    backend = config.backend.resolve(device.type)
    classifiers = [load(path, backend) for path in paths]
    store = _store(config, classifiers[0])
    for checkpoint, classifier in zip(paths, classifiers, strict=True):
        _same_classes(checkpoint, classifier, store)
    index = None if config.split == "val" else store.holdout()[config.split == "holdout"]
    labels = store.labels if index is None else store.labels[index]
    outputs = [
        log_probabilities(c.net, c.augment, store.images, config.views, config.batch_size, device, index)
        for c in classifiers
    ]
    judged = average(outputs)
    protocol: dict[str, Any] = {"split": config.split, "views": config.views}
    results = [score(p, labels, name=str(path), **protocol) for p, path in zip(outputs, paths, strict=True)]
    if len(outputs) > 1:
        results.append(score(judged, labels, networks=len(outputs), **protocol))
    wnids = [c["wnid"] for c in store.classes] if config.split == "val" else []
    references = paper_rows(wnids, len(outputs), config.views)
    print(table(results, references), flush=True)  # before anything can go wrong with the file
    reliability = by_class.calibration(judged, labels)
    print(f"expected calibration error {100 * reliability.ece:.1f} points, {len(reliability.bins)} bins")
    path = _write(config, paths, store, results, references, asdict(reliability))
    if config.per_class:
        _by_class(judged, labels, store, reliability, path)
    print(f"\nrecord {path}")
    return results


def _compared(config: Evaluate, root: Path) -> list[Result]:
    """Prints every run of the tree and writes the same as JSON; nothing is computed."""
    directories = sorted(path.parent for path in root.rglob("run.json"))
    if not directories:
        raise UserError(f"compare={root} holds no run.json: give a directory of runs, such as outputs/train")
    rows = compare.compare(directories)
    print(compare.table(rows))
    who = sha256(str(root.resolve()).encode()).hexdigest()[:8]
    path = Path(config.json or Path(config.output_dir) / "evaluate" / f"compare-{who}.json")
    _write_json(path, {"command": command_line(), "runs": rows})
    print(f"\nrecord {path}")
    return []


def _by_class(
    log_probs: Tensor, labels: np.ndarray, store: Store, reliability: by_class.Calibration, record: Path
) -> None:
    """Prints the worst classes; writes all of them, and a picture, beside the record."""
    confusion = by_class.confusion_matrix(log_probs, labels)
    names = [c["words"].split(",")[0] or c["wnid"] for c in store.classes]
    classes = sorted(by_class.errors_by_class(confusion, names), key=lambda c: (-c.error, c.label))
    print(f"\n{by_class.table(classes[:WORST])}")
    path = record.with_name(f"{record.stem}-classes.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["label", "wnid", "words", "images", "error", "taken_for"])
        for c in classes:
            taken_for = "; ".join(f"{name} ({count})" for name, count in c.taken_for)
            rows.writerow([c.label, *store.classes[c.label].values(), c.n, f"{c.error:.6f}", taken_for])
    print(f"\nclasses {path}")
    try:
        from alexnet.pages.figures import classes_figure
    except ModuleNotFoundError:
        print("no picture: matplotlib is missing (pip install 'alexnet[plots]')")
        return
    bins = [(b.confidence, b.accuracy) for b in reliability.bins]
    errors = [(c.name, c.error) for c in classes]
    title = f"{len(labels):,} images, expected calibration error {100 * reliability.ece:.1f} points"
    print(f"picture {classes_figure(confusion, errors, bins, path.with_suffix('.png'), title)}")


def _store(config: Evaluate, classifier: Network) -> Store:
    split = "val" if config.split == "val" else "train"
    path = Path(config.store or Path(config.data_dir) / classifier.arguments["data"] / split)
    if not (path / "manifest.json").exists() and (path / split / "manifest.json").exists():
        path = path / split  # the data set's directory was named
    store = open_store(path)
    if store.manifest["split"] != split:
        raise UserError(
            f"store={path} holds the {store.manifest['split']} images: give the {split} store for split={config.split}"
        )
    return store


def _same_classes(path: Path, classifier: Network, store: Store) -> None:
    ours, theirs = ([c["wnid"] for c in classes] for classes in (classifier.classes, store.classes))
    # torchvision's file: ImageNet's order, without wnids.
    unnamed = not any(ours) and len(ours) == len(theirs)
    if ours != theirs and not unnamed:
        raise UserError(
            f"checkpoint={path} knows {len(ours)} classes ({', '.join(ours[:3])}, ...), {store.path} holds "
            f"{len(theirs)} ({', '.join(theirs[:3])}, ...): give the store it was trained for, store=<directory>"
        )
    if store.px != classifier.arguments["px"]:
        raise UserError(
            f"checkpoint={path} was trained on {classifier.arguments['px']}-pixel images, {store.path} holds "
            f"{store.px}-pixel ones: prepare a store with px={classifier.arguments['px']}"
        )


def _write(
    config: Evaluate,
    paths: Sequence[Path],
    store: Store,
    results: Sequence[Result],
    references: Sequence[PaperRow],
    reliability: dict[str, Any],
) -> Path:
    """The JSON beside run.json if one network of a run was evaluated, else under output_dir; a copy where `json` says.

    The same command writes the same file again; other networks and another protocol write another. The best
    of a run has the plain name, last.ckpt names itself, and an ensemble or a file outside of a run is known by
    a hash of its paths, in any order.
    """
    run, single = paths[0].parent.parent, len(paths) == 1
    known = sha256("\n".join(sorted(str(path.resolve()) for path in paths)).encode()).hexdigest()[:8]
    protocol = f"{config.split}-{config.views}view.json"
    who = paths[0].stem if single else f"{len(paths)}networks"
    path = elsewhere = Path(config.output_dir) / "evaluate" / f"evaluate-{who}-{known}-{protocol}"
    in_run = single and (run / "run.json").exists()
    if in_run:
        path = run / f"evaluate-{'' if paths[0].name == BEST else f'{who}-'}{protocol}"
    content = {
        "command": command_line(),
        "store": str(store.path),
        "store_sha256": store.manifest["sha256"],
        "results": [r.as_dict() for r in results],
        "calibration": reliability,
        "paper": [asdict(row) for row in references],
        **environment(),
    }
    try:
        _write_json(path, content)
    except OSError as error:
        if not in_run or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        print(f"{run} may only be read: the record goes to {elsewhere.parent}")
        path = elsewhere
        _write_json(path, content)
    if config.json:
        _write_json(Path(config.json), content)
    return path


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
