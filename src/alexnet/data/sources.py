"""Where images come from: which files belong to which split and class, in archives and in folders.

A source is a list of (file name, label) for each split, in an order that depends on the file names alone, and
`stream`, which yields the files in whatever order is cheapest. Nothing is ever extracted: the members of an
archive go straight into memory, so no archive can write outside its place, and an archive and the folder it
was made from give the same store.

    tiny_imagenet          train/<wnid>/images/*.JPEG; val/images/*.JPEG, flat, with val/val_annotations.txt
    imagenette, imagewoof  train/<wnid>/*.JPEG, val/<wnid>/*.JPEG
    imagenet               train/<wnid>/*.JPEG, val/<wnid>/*.JPEG; names from words.txt or LOC_synset_mapping.txt
    folder                 train/<class>/**, val/<class>/**; or <class>/** alone, which is all train
    synthetic              drawn, see synthetic.py

Classes are numbered in the sorted order of their wnids (for `folder`: directory names), in every split alike.
A folder without val/ gives no val store unless `val_fraction` is set.
"""

import hashlib
import os
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol
from zlib import crc32

import numpy as np

from alexnet.data import synthetic
from alexnet.data.store import draw_order, holdout_split
from alexnet.errors import UserError, did_you_mean

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
VAL_NAMES = ("val", "valid", "validation")
TEXTS = ("words.txt", "LOC_synset_mapping.txt", "val_annotations.txt")


class SourceKind(StrEnum):
    synthetic = "synthetic"
    tiny_imagenet = "tiny_imagenet"
    imagenette = "imagenette"
    imagewoof = "imagewoof"
    imagenet = "imagenet"
    folder = "folder"


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
WORDS: dict[str, dict[str, str]] = {
    "imagenette": {
        "n01440764": "tench",
        "n02102040": "English springer",
        "n02979186": "cassette player",
        "n03000684": "chain saw",
        "n03028079": "church",
        "n03394916": "French horn",
        "n03417042": "garbage truck",
        "n03425413": "gas pump",
        "n03445777": "golf ball",
        "n03888257": "parachute",
    },
    "imagewoof": {
        "n02086240": "Shih-Tzu",
        "n02087394": "Rhodesian ridgeback",
        "n02088364": "beagle",
        "n02089973": "English foxhound",
        "n02093754": "Border terrier",
        "n02096294": "Australian terrier",
        "n02099601": "golden retriever",
        "n02105641": "Old English sheepdog",
        "n02111889": "Samoyed",
        "n02115641": "dingo",
    },
}


class Item(NamedTuple):
    """One image to be: its file name inside the source, and its class."""

    name: str
    label: int


Payload = bytes | Path | np.ndarray  # an encoded file, where to read one, or pixels (px, px, 3)


class Files(Protocol):
    """A folder or an archive. Names are relative, with forward slashes, whatever the system."""

    names: list[str]

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        """Every wanted file once, in the order that is cheapest to read."""


@dataclass(frozen=True)
class Source:
    """What can be prepared: classes in label order, the items of every split in store order, their files."""

    description: str
    classes: list[dict[str, str]]
    splits: dict[str, list[Item]]
    files: Files


# Folders and archives -------------------------------------------------------------------------------------


class Folder:
    """A directory tree; files are read by whoever decodes them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        walk = os.walk(root, followlinks=True)
        self.names = [
            Path(directory, file).relative_to(root).as_posix()
            for directory, _, files in walk
            for file in files
        ]

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for name in sorted(wanted):
            yield name, self.root / name


class Tar:
    """A tar archive, compressed or not, read from front to back. Links and devices in it are ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.texts: dict[str, bytes] = {}  # kept, so that a list at the far end costs no second pass
        for name, archive, member in self._members():
            self.names.append(_safe(name, path))
            if name.endswith(TEXTS):
                self.texts[name] = _content(archive, member)

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        if wanted <= self.texts.keys():
            yield from ((name, self.texts[name]) for name in sorted(wanted))
            return
        remaining = set(wanted)
        for name, archive, member in self._members():
            if name in remaining:
                remaining.remove(name)
                yield name, _content(archive, member)
            if not remaining:
                return

    def _members(self) -> Iterator[tuple[str, tarfile.TarFile, tarfile.TarInfo]]:
        with tarfile.open(self.path, "r|*") as archive:  # a stream: a compressed file cannot be sought in
            for member in archive:
                if member.isfile():
                    yield str(PurePosixPath(member.name)), archive, member
                archive.members = []  # type: ignore[attr-defined]  # else a million entries stay in memory


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


class Zip:
    """A zip archive."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with zipfile.ZipFile(path) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
        self.names = [_safe(info.filename, path) for info in entries]

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        with zipfile.ZipFile(self.path) as archive:
            for info in archive.infolist():
                name = str(PurePosixPath(info.filename))
                if not info.is_dir() and name in wanted:
                    yield name, archive.read(info)


def _safe(name: str, archive: Path) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise UserError(f"path={archive} contains the member {name!r}, which points outside: do not trust it")
    return str(parts)


def open_files(path: Path) -> Files:
    """The folder or archive at `path`; UserError when there is none, or it cannot be read."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise UserError(f"path={path} does not exist: give the archive or the folder of the images")
    try:
        return Zip(path) if path.suffix == ".zip" else Tar(path)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        raise UserError(f"path={path} is not a whole archive ({error}): fetch it again") from error


# The sources ----------------------------------------------------------------------------------------------


def described(kind: str, path: Path) -> str:
    """The source in a manifest. Its place is left out: a folder that was moved holds the same images."""
    return f"{kind}: {path.name}"


def open_source(
    kind: SourceKind,
    path: Path | None,
    *,
    px: int,
    downloads: Path,
    official: bool = True,
    words: Path | None = None,
) -> Source:
    """Find out what a source of images on disk holds.

    Args:
        kind: which layout to expect; any but `synthetic`.
        path: an archive or a folder; None downloads the published archive whose images suit `px`.
        downloads: where a downloaded archive is kept.
        official: insist on the published checksum of a published file name, and on the published counts.
        words: a file of "wnid words" lines, for names that the source does not carry.

    Raises:
        UserError: nothing there, not an archive, another checksum, another layout, other counts.
    """
    path = path or download(kind, px, downloads)
    if official:
        check_archive(path)
    files = open_files(path)
    tree = _tree(files)
    splits = _tiny_imagenet(tree, files) if kind == SourceKind.tiny_imagenet else _by_class(tree, kind, path)
    if not splits.get("train"):
        raise UserError(f"path={path} holds no train images in the layout of source={kind}")
    wnids = sorted(set(splits["train"].values()))
    _check_val(splits, wnids, path)
    if official:
        _check_counts(kind, splits, wnids, path)
    names = _words(tree, files, words) | WORDS.get(kind, {})
    classes = [{"wnid": wnid, "words": names.get(wnid, wnid)} for wnid in wnids]
    items = {split: _items(found, wnids) for split, found in splits.items() if found}
    return Source(described(kind, path), classes, items, files)


def synthetic_source(n_train: int, n_val: int, px: int, seed: int) -> Source:
    """The embedded set, as a source like any other."""
    classes = [{"wnid": name.replace(" ", "_"), "words": name} for name in synthetic.CLASSES]
    sizes = {"train": n_train, "val": n_val}
    splits = {
        split: [Item(f"{split}/{row}", int(label)) for row, label in enumerate(synthetic.labels_of(n))]
        for split, n in sizes.items()
    }
    return Source(f"synthetic: seed {seed}", classes, splits, _Drawn(sizes, px, seed))


class _Drawn:
    """The synthetic images as files named <split>/<row>."""

    def __init__(self, sizes: Mapping[str, int], px: int, seed: int) -> None:
        self.sizes, self.px, self.seed = sizes, px, seed
        self.names = [f"{split}/{row}" for split, n in sizes.items() for row in range(n)]

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for number, (split, n) in enumerate(self.sizes.items()):
            if not any(name.startswith(f"{split}/") for name in wanted):
                continue
            for first, images in synthetic.blocks(n, self.px, self.seed, number):
                rows = ((f"{split}/{first + row}", image) for row, image in enumerate(images))
                yield from ((name, image) for name, image in rows if name in wanted)


def _tree(files: Files) -> dict[str, str]:
    """{name without the directories that all images share: name}. Hidden files are left out."""
    visible = [name for name in files.names if not re.search(r"(^|/)(\.|__MACOSX/)", name)]
    folders = [name.split("/")[:-1] for name in visible if name.lower().endswith(IMAGE_SUFFIXES)]
    shared: list[str] = []
    while folders and all(len(parts) > len(shared) for parts in folders):
        here = {parts[len(shared)] for parts in folders}
        if len(here) > 1 or here <= {"train", *VAL_NAMES}:
            break
        shared.append(here.pop())
    prefix = "".join(f"{part}/" for part in shared)
    return {name.removeprefix(prefix): name for name in visible}


def _by_class(tree: dict[str, str], kind: SourceKind, path: Path) -> dict[str, dict[str, str]]:
    """{split: {name: class}} of <split>/<class>/** or, without train/, of <class>/**."""
    images = {short: name for short, name in tree.items() if short.lower().endswith(IMAGE_SUFFIXES)}
    tops = {short.split("/")[0] for short in images}
    if "train" not in tops:
        if tops & set(VAL_NAMES):
            raise UserError(f"path={path} has val images but no train/: give the folder that holds both")
        images = {f"train/{short}": name for short, name in images.items()}
    splits: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    for short, name in images.items():
        top, *classes = short.split("/")[:-1]
        split = "val" if top in VAL_NAMES else top
        if split in splits:
            if not classes:
                raise _flat(split, path)
            splits[split][name] = classes[0]
    if kind != SourceKind.folder:
        _refuse_unknown_wnids(splits["train"], kind, path)
    return splits


def _flat(split: str, path: Path) -> UserError:
    return UserError(
        f"path={path} keeps {split}/ flat: the class of an image must be the directory it lies in, "
        f"{split}/<class>/<image>; sort the images into such directories by the list that came with them"
    )


def _refuse_unknown_wnids(train: dict[str, str], kind: SourceKind, path: Path) -> None:
    strange = sorted({label for label in train.values() if not re.fullmatch(r"n\d{8}", label)})
    if strange:
        raise UserError(f"path={path} has the class {strange[0]!r}, which is no wnid (n and 8 digits), so it is not "
                        f"source={kind}; for directories with names of your own use source=folder")  # fmt: skip


def _tiny_imagenet(tree: dict[str, str], files: Files) -> dict[str, dict[str, str]]:
    """train/<wnid>/images/*.JPEG, and the flat val/ by its val_annotations.txt (file, wnid, box)."""
    splits: dict[str, dict[str, str]] = {"train": {}, "val": {}}
    annotations = _val_annotations(tree, files)
    for short, name in tree.items():
        parts = short.split("/")
        if not short.lower().endswith(IMAGE_SUFFIXES) or parts[0] not in splits or len(parts) < 3:
            continue
        flat = parts[0] == "val" and parts[1] == "images"
        if flat and parts[-1] not in annotations:
            raise UserError(f"{name} is not in val/val_annotations.txt: unpack the official archive again")
        splits[parts[0]][name] = annotations[parts[-1]] if flat else parts[1]
    missing = set(annotations) - {name.rsplit("/", 1)[-1] for name in splits["val"]}
    if missing:
        raise UserError(
            f"val/images lacks {len(missing)} images that val_annotations.txt lists, first {min(missing)}"
        )
    return splits


def _val_annotations(tree: dict[str, str], files: Files) -> dict[str, str]:
    lines = _text(tree, files, "val/val_annotations.txt").splitlines()
    return dict(line.split("\t")[:2] for line in lines if line.strip())


def _text(tree: dict[str, str], files: Files, short: str) -> str:
    if short not in tree:
        return ""
    ((_, payload),) = files.stream({tree[short]})
    return (payload.read_bytes() if isinstance(payload, Path) else bytes(payload)).decode()


def _words(tree: dict[str, str], files: Files, given: Path | None) -> dict[str, str]:
    """{wnid: words} from the file given, else words.txt or LOC_synset_mapping.txt in the source."""
    if given is not None and not given.is_file():
        raise UserError(f"words={given} does not exist: give a file of 'wnid words' lines, or leave it out")
    inside = next((name for name in ("words.txt", "LOC_synset_mapping.txt") if name in tree), "")
    text = given.read_text() if given is not None else _text(tree, files, inside)
    pairs = (line.split(None, 1) for line in text.splitlines())
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def _check_val(splits: dict[str, dict[str, str]], wnids: Sequence[str], path: Path) -> None:
    val = set(splits.get("val", {}).values())
    if val and val != set(wnids):
        odd = min(val ^ set(wnids))
        here, there = ("val", "train") if odd in val else ("train", "val")
        raise UserError(
            f"path={path}: class {odd} is in {here} but not in {there}; both need the same classes"
        )


def _check_counts(kind: str, splits: dict[str, dict[str, str]], wnids: Sequence[str], path: Path) -> None:
    if kind not in COUNTS:
        return
    found = (len(wnids), len(splits["train"]), len(splits.get("val", {})))
    strange = sorted(set(wnids) - set(WORDS.get(kind, wnids)))
    if found != COUNTS[kind] or strange:
        raise UserError(
            f"path={path} holds {found[0]} classes, {found[1]} train and {found[2]} val images, but {kind} has "
            f"{COUNTS[kind]}{' and no class ' + strange[0] if strange else ''}: it is incomplete or another set; "
            "to prepare it as it is, set official=false"
        )


def _items(found: dict[str, str], wnids: Sequence[str]) -> list[Item]:
    """Sorted by class, then by file name: a folder and its archive give one order."""
    label = {wnid: number for number, wnid in enumerate(wnids)}
    return sorted(
        (Item(name, label[wnid]) for name, wnid in found.items()), key=lambda item: (item.label, item.name)
    )


# Published archives ---------------------------------------------------------------------------------------


def check_archive(path: Path) -> None:
    """Compare the MD5 of a file that has a published name; UserError when it differs."""
    published = {
        entry.url.rsplit("/", 1)[-1]: entry.md5 for entries in OFFICIAL.values() for entry in entries
    }
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
        raise UserError(f"path is empty: source={kind} needs the archive or folder of its images, path=<...>")
    chosen = next((entry for entry in OFFICIAL[kind] if entry.side >= px), OFFICIAL[kind][-1])
    target = directory / chosen.url.rsplit("/", 1)[-1]
    if not target.is_file():
        from torchvision.datasets.utils import (
            download_url,  # not above: every decoding process would load torch
        )

        try:
            download_url(chosen.url, str(directory), md5=chosen.md5)
        except Exception as error:  # urllib, ssl and torchvision each have their own
            raise UserError(
                f"cannot download {chosen.url} ({error}): fetch it elsewhere and set path=<the file>"
            ) from error
    return target


# Subsets --------------------------------------------------------------------------------------------------


def with_classes(source: Source, wanted: Sequence[str]) -> Source:
    """The source with only the classes named (wnids), numbered anew in sorted order; in every split."""
    known = [entry["wnid"] for entry in source.classes]
    for wnid in wanted:
        if wnid not in known:
            raise UserError(f"classes: {wnid!r} is not in {source.description}: {did_you_mean(wnid, known)}")
    kept = sorted(set(wanted))
    number = {known.index(wnid): label for label, wnid in enumerate(kept)}
    splits = {
        split: [Item(item.name, number[item.label]) for item in items if item.label in number]
        for split, items in source.splits.items()
    }
    return replace(source, classes=[source.classes[known.index(wnid)] for wnid in kept], splits=splits)


def draw_classes(source: Source, n: int, seed: int) -> list[str]:
    """n wnids drawn by seed (the first n of 1000 would be fish and birds)."""
    if n > len(source.classes):
        raise UserError(f"n_classes={n}: {source.description} has only {len(source.classes)} classes")
    return [source.classes[number]["wnid"] for number in draw_order(len(source.classes), seed)[:n]]


def with_images_per_class(source: Source, count: int, seed: int) -> Source:
    """The source with `count` train images of each class, drawn by (seed, wnid); val stays whole."""
    train, kept = source.splits["train"], []
    for label, size in sorted(Counter(item.label for item in train).items()):
        wnid = source.classes[label]["wnid"]
        if size < count:
            raise UserError(f"images_per_class={count}: class {wnid} has only {size} images; lower it")
        members = [item for item in train if item.label == label]
        kept += [members[row] for row in sorted(draw_order(size, seed, crc32(wnid.encode()))[:count])]
    return replace(source, splits={**source.splits, "train": kept})


def with_val_fraction(source: Source, fraction: float, seed: int) -> Source:
    """A val split cut from train, by class, when the source has none of its own."""
    if source.splits.get("val"):
        raise UserError(
            f"val_fraction={fraction}: {source.description} has its own val images; set val_fraction=0"
        )
    train = source.splits["train"]
    first, second = holdout_split(np.array([item.label for item in train]), fraction, seed)
    return replace(
        source, splits={"train": [train[row] for row in first], "val": [train[row] for row in second]}
    )
