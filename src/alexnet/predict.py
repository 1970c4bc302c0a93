"""The verb `predict`: pictures in, the most probable classes out, as a table, JSON, CSV and a contact sheet.

A picture goes the way of a stored one (data/prepare.py: decoded to RGB, short side to px, centre square), and then that
of evaluation (training/scoring.py: centre view or ten). So its probabilities are those of `evaluate` on a store of
the same files.
"""

import csv
import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alexnet.cli import WIDTH
from alexnet.data.files import Folder, shown
from alexnet.data.pictures import HEAD, Resample, decode, fit, is_picture, reason
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.system import command_line, device_type_of, environment, write_json
from alexnet.training.checkpoint import load
from alexnet.training.network import Network
from alexnet.training.scoring import average, log_probabilities

CHUNK = 1024  # pictures decoded at a time
SHEET = 40  # pictures on the contact sheet at most
STDIN = "-"


@dataclass
class Predict:
    """scripts/predict.py."""

    # A checkpoint file or a run directory; the probabilities of several are averaged.
    checkpoint: Any = None
    # A picture, a folder (with its sub-folders), a pattern such as '*.jpg', or a list of these; "-": a picture, or
    # the names of pictures, one a line, from standard input.
    images: Any = None
    views: int = 1
    top: int = 5
    backend: Backends = field(default_factory=Backends)
    batch_size: int = 256
    device: str = "auto"
    resample: Resample | None = None  # None: as the checkpoint's store was made
    output_dir: str = "outputs"

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise UserError("checkpoint is not given: use checkpoint=<file or run directory>")
        if not self.images:
            raise UserError("images is not given: use images=<file, folder, 'pattern' or ->")
        if self.views not in (1, 10):
            raise UserError(
                f"views={self.views} must be 1 (centre) or 10 (corners, centre and their mirrors)"
            )
        for key in ("top", "batch_size"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be a positive integer")


class Prediction(NamedTuple):
    """The classes of one picture, the most probable first."""

    name: str
    labels: list[int]
    probabilities: list[float]


def predict(config: Predict) -> bool:
    """Predicts, prints and writes <output_dir>/predict/. Returns whether every picture could be read.

    Raises UserError if a checkpoint or a picture is missing, or if no picture can be read.
    """
    device = torch.device(device_type_of(config.device, "device", "device=cpu"))
    backend = config.backend.resolve(device.type)
    paths = config.checkpoint if isinstance(config.checkpoint, list) else [config.checkpoint]
    classifiers = [load(str(path), backend) for path in paths]
    first = classifiers[0]
    for path, other in zip(paths, classifiers, strict=True):
        if other.classes != first.classes or other.augment.px != first.augment.px:
            raise UserError(f"checkpoint={path} has other classes or another image size than {paths[0]}")
    unread: dict[str, str] = {}
    predictions: list[Prediction] = []
    sheet: list[tuple[np.ndarray, Tensor]] = []
    for names, pixels in decoded(config, first, unread):
        outputs = [
            log_probabilities(c.net, c.augment, pixels, config.views, config.batch_size, device)
            for c in classifiers
        ]
        probabilities = average(outputs).exp()
        p, labels = probabilities.topk(min(config.top, probabilities.shape[1]))
        predictions += map(Prediction, names, labels.tolist(), p.tolist())
        sheet += list(zip(pixels, probabilities, strict=True))[: SHEET - len(sheet)]
    for name, why in unread.items():
        print(f"{shown(name)}: {why}", file=sys.stderr)
    if not predictions:
        raise UserError(f"images={config.images}: none of {len(unread)} pictures can be read")
    names_of_classes = [c["words"].split(",")[0] or c["wnid"] for c in first.classes]  # the first synonyms
    print(table(predictions, names_of_classes))
    directory = Path(config.output_dir) / "predict"
    directory.mkdir(parents=True, exist_ok=True)
    write(config, directory, predictions, unread, first.classes)
    contact_sheet(predictions, sheet, names_of_classes, directory / "predictions.png")
    print(f"\npredicted {len(predictions)}, unreadable {len(unread)}; written to {directory}")
    return not unread


def pictures(images: Any) -> Iterator[tuple[str, bytes | Path]]:
    """Each picture that `images` names, in order of their names: its name, and its content or its file.

    Raises UserError for what is not there.
    """
    for given in images if isinstance(images, list) else [images]:
        if given == STDIN:
            content = sys.stdin.buffer.read()
            if is_picture(content[:HEAD]):
                yield "standard input", content
                continue
            lines = content.decode(errors="surrogateescape").splitlines()  # the names of pictures
            yield from ((line, Path(line)) for line in lines if line.strip())
            continue
        path = Path(str(given)).expanduser()
        found = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"images={given}: there is no such file or folder, and no file has such a name")
        for one in map(Path, found):
            files = [one / name for name in sorted(Folder(one).pictures)] if one.is_dir() else [one]
            if not files:
                raise UserError(f"images={one} holds no picture")
            yield from ((str(file), file) for file in files)


def decoded(
    config: Predict, classifier: Network, unread: dict[str, str]
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Names and pixels (n, px, px, 3) uint8 of some pictures at a time; what cannot be read goes into `unread`."""
    resample = config.resample or Resample(classifier.arguments["resample"])
    names: list[str] = []
    pixels: list[np.ndarray] = []
    for name, content in pictures(config.images):
        try:
            pixels.append(np.asarray(fit(decode(content), classifier.arguments["px"], resample)))
            names.append(name)
        except Exception as error:  # Pillow's plugins raise almost anything at damaged files
            unread[name] = reason(error)
        if len(names) == CHUNK:
            yield names, np.stack(pixels)
            names, pixels = [], []
    if names:
        yield names, np.stack(pixels)


def table(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """A line for each picture: its name and its classes with percentages, cut to a terminal's width."""
    longest = min(max(len(p.name) for p in predictions), 40)
    lines = []
    for name, labels, probabilities in predictions:
        name = name if len(name) <= longest else f"…{name[1 - longest :]}"
        found = [f"{classes[k]} {100 * p:.1f} %" for k, p in zip(labels, probabilities, strict=True)]
        line = f"{name:{longest}s}  {', '.join(found)}"
        lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…")
    return "\n".join(lines)


def write(
    config: Predict,
    directory: Path,
    predictions: Sequence[Prediction],
    unread: dict[str, str],
    classes: Sequence[dict[str, str]],
) -> None:
    """predictions.json and predictions.csv."""
    found = []
    for name, *top in predictions:
        classes_of_it = [{**classes[k], "probability": p} for k, p in zip(*top, strict=True)]
        found.append({"image": name, "top": classes_of_it})
    content = {"command": command_line(), "views": config.views, "predictions": found, "unreadable": unread}
    write_json(directory / "predictions.json", {**content, **environment()})
    path, as_given = directory / "predictions.csv", "surrogateescape"
    with path.open("w", newline="", encoding="utf-8", errors=as_given) as file:
        rows = csv.writer(file)
        rows.writerow(["image", "rank", "wnid", "words", "probability"])
        for name, *top in predictions:
            for rank, (k, p) in enumerate(zip(*top, strict=True), start=1):
                rows.writerow([name, rank, classes[k]["wnid"], classes[k]["words"], f"{p:.6f}"])


def contact_sheet(
    predictions: Sequence[Prediction],
    sheet: Sequence[tuple[np.ndarray, Tensor]],
    classes: Sequence[str],
    path: Path,
) -> None:
    """The first pictures with bars for their five most probable classes, like the paper's Figure 4."""
    try:
        from alexnet.pages.figures import predictions_figure
    except ModuleNotFoundError:
        print("no contact sheet: matplotlib is missing (pip install 'alexnet[plots]')", file=sys.stderr)
        return
    pixels, probabilities = (list(column) for column in zip(*sheet, strict=True))
    titles = [Path(p.name).name for p in predictions[: len(sheet)]]
    predictions_figure(np.stack(pixels), torch.stack(probabilities), None, classes, path, titles=titles)
