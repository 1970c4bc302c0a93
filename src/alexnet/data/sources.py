"""Where images come from: the known data sets, what a folder or an archive holds, and subsets of it.

A source is a list of (file name, label) for each split, in an order that depends on the file names alone, so that every
form of the same images gives the same store. Classes are numbered in the sorted order of their wnids (elsewhere: of
their names), in every split alike. The images of a class are sorted by name: for imagenet and for numbered classes by
that of the file, which is the same in every form, else by the whole path.

Without val images there is no val store unless `val_fraction` is set. `synthetic` is drawn, see synthetic.py.
"""

import hashlib
import io
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from zlib import crc32

import numpy as np

from alexnet.data import layouts, synthetic
from alexnet.data.config import SourceKind
from alexnet.data.files import fingerprint, listing, open_files, shown
from alexnet.data.layouts import Labelled, Splits, counts, key_of, some
from alexnet.data.pictures import Payload
from alexnet.data.store import draw_order, holdout_split
from alexnet.errors import UserError, did_you_mean


class Official(NamedTuple):
    """A published archive: its address and MD5, and the least side of its images (0: not resized)."""

    url: str
    md5: str
    side: int


_FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas/"
OFFICIAL: dict[str, list[Official]] = {  # smallest images first
    "tiny_imagenet": [
        Official("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de", 0)
    ],
    "imagenette": [
        Official(f"{_FASTAI}imagenette2-160.tgz", "e793b78cc4c9e9a4ccc0c1155377a412", 160),
        Official(f"{_FASTAI}imagenette2-320.tgz", "3df6f0d01a2c9592104656642f5e78a3", 320),
        Official(f"{_FASTAI}imagenette2.tgz", "fe2fc210e6bb7c5664d602c3cd71e612", 0),
    ],
    "imagewoof": [
        Official(f"{_FASTAI}imagewoof2-160.tgz", "3d200a7be99704a0d7509be2a9fbfe15", 160),
        Official(f"{_FASTAI}imagewoof2-320.tgz", "0f46d997ec2264e97609196c95897a44", 320),
        Official(f"{_FASTAI}imagewoof2.tgz", "9aafe18bcdb1632c4249a76c458465ba", 0),
    ],
}
# (classes, train images, val images) of the whole official set
COUNTS: dict[str, tuple[int, int, int]] = {
    "tiny_imagenet": (200, 100_000, 10_000),
    "imagenette": (10, 9_469, 3_925),
    "imagewoof": (10, 9_025, 3_929),
    "imagenet": (1000, 1_281_167, 50_000),
}
WORDS = {
    "imagenette": {
        "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player",
        "n03000684": "chain saw", "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage truck",
        "n03425413": "gas pump", "n03445777": "golf ball", "n03888257": "parachute",
    },
    "imagewoof": {
        "n02086240": "Shih-Tzu", "n02087394": "Rhodesian ridgeback", "n02088364": "beagle",
        "n02089973": "English foxhound", "n02093754": "Border terrier", "n02096294": "Australian terrier",
        "n02099601": "golden retriever", "n02105641": "Old English sheepdog", "n02111889": "Samoyed",
        "n02115641": "dingo",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What can be prepared."""

    description: str
    classes: list[dict[str, str]]  # wnid and words, in the order of the labels
    splits: dict[str, dict[str, int]]  # {split: {file name: label}}, in the order of the store
    stream: Callable[[set[str]], Iterator[tuple[str, Payload]]]  # every wanted file once, in a cheap order
    origin: dict[str, Any] = field(default_factory=dict)  # `fingerprint` of the files
    sizes: Mapping[str, int] = field(default_factory=dict)  # bytes of every picture, of other classes too
    left_out: Mapping[str, int] = field(default_factory=dict)  # how many files of each kind are not used


def open_source(
    kind: SourceKind,
    path: Path,
    *,
    official: bool = True,
    words: Path | None = None,
    splits: Splits = Splits.auto,
    wanted: Sequence[str] | None = None,
) -> Source:
    """Find out what a source of images on disk holds.

    Args:
        kind: which layout to expect; any but `synthetic`.
        path: an archive or a folder.
        official: insist on the published checksum of a published file name, and on the published counts.
        words: a file of "wnid words" lines, for names that the source does not carry.
        splits: what folders named train, val, test are.
        wanted: the classes that will be chosen; of others, folders without a picture do not matter.

    Raises:
        UserError: nothing there, not an archive, another checksum, another layout, other counts.
    """
    if official:
        check_archive(path)
    folder = listing(path)
    files = open_files(path, folder)
    names = layouts.words_of(files, words) | WORDS.get(kind, {})
    if files.numbers:
        labelled = layouts.numbered(files, sorted(names))
    elif kind == SourceKind.tiny_imagenet:
        labelled = layouts.tiny_imagenet(files)
    else:
        labelled = layouts.by_class(files, splits, kind, wanted)
    if not labelled.get("train"):
        raise UserError(
            f"path={path} holds no train images in the layout of source={kind} ({counts(files.left_out)})"
        )
    wnids = sorted(set(labelled["train"].values()))
    _check_classes(labelled, wnids, kind, path, official)
    classes = [{"wnid": shown(wnid), "words": shown(names.get(wnid, wnid))} for wnid in wnids]
    label = {wnid: number for number, wnid in enumerate(wnids)}
    by_file = kind == SourceKind.imagenet or bool(files.numbers)
    ordered: dict[str, dict[str, int]] = {}
    for split, found in labelled.items():
        rows = sorted((label[wnid], key_of(name) if by_file else "", name) for name, wnid in found.items())
        if rows:
            ordered[split] = {name: number for number, _, name in rows}
    # Its place is not in the name: a folder that was moved holds the same images.
    description, origin = f"{kind}: {shown(path.name)}", fingerprint(folder)
    return Source(description, classes, ordered, files.stream, origin, files.pictures, files.left_out)


def synthetic_source(n_train: int, n_val: int, px: int, seed: int) -> Source:
    """The embedded set, as a source like any other, of files named <split>/<row>."""
    sizes = {"train": n_train, "val": n_val}

    def stream(wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for number, (split, n) in enumerate(sizes.items()):
            if not any(name.startswith(f"{split}/") for name in wanted):
                continue
            for first, images in synthetic.blocks(n, px, seed, number):
                rows = ((f"{split}/{row}", image) for row, image in enumerate(images, first))
                yield from (row for row in rows if row[0] in wanted)

    classes = [{"wnid": name.replace(" ", "_"), "words": name} for name in synthetic.CLASSES]
    splits = {
        split: {f"{split}/{row}": int(label) for row, label in enumerate(synthetic.labels_of(n))}
        for split, n in sizes.items()
    }
    return Source(f"synthetic: seed {seed}", classes, splits, stream)


def _check_classes(
    labelled: Labelled, wnids: Sequence[str], kind: SourceKind, path: Path, official: bool
) -> None:
    strange = [wnid for wnid in wnids if not layouts.WNID.fullmatch(wnid)]
    if strange and kind != SourceKind.folder:
        raise UserError(f"path={path} has the class {shown(strange[0])!r}, which is no wnid (n and 8 digits), so it is "
                        f"not source={kind}; for classes of your own use source=folder, for ImageNet with numbers "
                        "words=LOC_synset_mapping.txt")  # fmt: skip
    if len(wnids) == 1:
        raise UserError(
            f"path={path} holds one class, {shown(wnids[0])}: a classifier needs two or more, each a folder"
        )
    val = set(labelled.get("val", {}).values())
    if val and val != set(wnids):
        odd = min(val ^ set(wnids))
        here, there = ("val", "train") if odd in val else ("train", "val")
        raise UserError(
            f"path={path}: class {shown(odd)} is in {here} but not in {there}; both need the same classes"
        )
    found = (len(wnids), len(labelled["train"]), len(labelled.get("val", {})))
    strange = sorted(set(wnids) - set(WORDS.get(kind, wnids)))
    if official and (strange or found != COUNTS.get(kind, found)):
        raise UserError(
            f"path={path} holds {found[0]} classes, {found[1]} train and {found[2]} val images, but {kind} has "
            f"{COUNTS[kind]}{' and no class ' + strange[0] if strange else ''}: it is incomplete or another set; "
            "to prepare it as it is, set official=false"
        )


def check_archive(path: Path) -> None:
    """Compare the MD5 of a file that has a published name; UserError when it differs."""
    published = {Path(entry.url).name: entry.md5 for entries in OFFICIAL.values() for entry in entries}
    if path.name not in published or not path.is_file():
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != published[path.name]:
        raise UserError(
            f"path={path} has MD5 {found}, the published file has {published[path.name]}: fetch it again, "
            "or set official=false if it is meant to differ"
        )


def download(kind: SourceKind, px: int, directory: Path) -> Path:
    """Fetch the smallest published archive whose images are not enlarged at `px`; at once if it is there."""
    if kind not in OFFICIAL:
        raise UserError(
            f"path is not set: source={kind} needs the archive or folder of its images, path=<...>"
        )
    chosen = next((entry for entry in OFFICIAL[kind] if entry.side >= px), OFFICIAL[kind][-1])
    target = directory / Path(chosen.url).name
    if not target.is_file():
        # Not above: every decoding process would load torch.
        from torchvision.datasets.utils import download_url

        try:
            with redirect_stderr(progress_stream()):
                download_url(chosen.url, str(directory), md5=chosen.md5)
        except Exception as error:  # urllib, ssl and torchvision each have their own
            with suppress(OSError):  # it holds something, or is not there
                directory.rmdir()
            raise UserError(
                f"cannot download {chosen.url} ({error}): fetch it elsewhere and set path=<the file>"
            ) from error
    return target


class Lines(io.TextIOBase):
    """What a progress bar writes, for a file or a pipe: no carriage returns, one line a minute and one at the end."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.line, self.last = stream, "", time.monotonic()

    def write(self, text: str) -> int:
        self.line = text.rpartition("\r")[2].strip() or self.line
        if text == "\n" or time.monotonic() - self.last >= 60:  # a bar ends with a line feed
            print(self.line, file=self.stream, flush=True)
            self.last = time.monotonic()
        return len(text)


def progress_stream() -> TextIO:
    """Where a progress bar is written."""
    return sys.stderr if sys.stderr.isatty() else Lines(sys.stderr)  # type: ignore[return-value]


def with_classes(source: Source, wanted: Sequence[str]) -> Source:
    """The source with only the classes named (wnids), numbered anew in sorted order; in every split."""
    known = [entry["wnid"] for entry in source.classes]
    for wnid in wanted:
        if wnid not in known:
            raise UserError(f"classes: {wnid!r} is not in {source.description}: {did_you_mean(wnid, known)}")
    kept = sorted(set(wanted))
    if len(kept) < 2:
        raise UserError(f"classes: {some(kept) or 'none'} must be two or more of {source.description}")
    number = {known.index(wnid): label for label, wnid in enumerate(kept)}
    splits = {
        split: {name: number[label] for name, label in labels.items() if label in number}
        for split, labels in source.splits.items()
    }
    return replace(source, classes=[source.classes[known.index(wnid)] for wnid in kept], splits=splits)


def draw_classes(source: Source, n: int, seed: int) -> list[str]:
    """n wnids drawn by seed (the first n of 1000 would be fish and birds)."""
    if n > len(source.classes):
        raise UserError(f"n_classes={n}: {source.description} has only {len(source.classes)} classes")
    return [source.classes[number]["wnid"] for number in draw_order(len(source.classes), seed)[:n]]


def with_images_per_class(source: Source, count: int, seed: int) -> Source:
    """The source with `count` train images of each class, drawn by (seed, wnid); val stays whole."""
    members: dict[int, list[str]] = defaultdict(list)
    for name, label in source.splits["train"].items():
        members[label].append(name)
    kept: dict[str, int] = {}
    for label, names in sorted(members.items()):
        wnid = source.classes[label]["wnid"]
        if len(names) < count:
            raise UserError(f"images_per_class={count}: class {wnid} has only {len(names)} images; lower it")
        drawn = sorted(draw_order(len(names), seed, crc32(wnid.encode()))[:count])
        kept |= {names[row]: label for row in drawn}
    return replace(source, splits={**source.splits, "train": kept})


def with_val_fraction(source: Source, fraction: float, seed: int) -> Source:
    """A val split cut from train, by class, when the source has none of its own."""
    if source.splits.get("val"):
        raise UserError(
            f"val_fraction={fraction}: {source.description} has its own val images; set val_fraction=0"
        )
    train = list(source.splits["train"].items())
    first, second = holdout_split(np.array([label for _, label in train]), fraction, seed)
    if not len(second):
        raise UserError(
            f"val_fraction={fraction}: every class of {source.description} has one image, which stays in train; "
            "give more images a class, or set val_fraction=0"
        )
    splits = {"train": dict(train[row] for row in first), "val": dict(train[row] for row in second)}
    return replace(source, splits=splits)
