"""Which picture belongs to which split and class: the layouts in which people keep their images.

    folder                 train/<class>/**, val/<class>/**; or <class>/** alone, which is all train
    imagenette, imagewoof  train/<wnid>/*.JPEG, val/<wnid>/*.JPEG
    tiny_imagenet          train/<wnid>/images/*.JPEG; val/images/*.JPEG, flat, with val/val_annotations.txt
    imagenet               train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, or val/*.JPEG with a list of its classes:
                           LOC_val_solution.csv (Kaggle), or ground truth and meta.mat of the development kit.
                           As folders, or as published: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and
                           ILSVRC2012_devkit_t12.tar.gz in one folder
    any of them            shards of webdataset (<key>.jpg, <key>.cls) or parquet files, where a number is the class

Folders around the whole set do not matter. `splits=auto` takes train/, training/, val/, valid/, validation/, test/ and
testing/ (in any case) for splits if no other folder stands beside them, and refuses a mixture. test/ is not used, which
is said.
"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np

from alexnet.data.config import SourceKind
from alexnet.data.files import SPLIT_NAMES, Files, is_hidden, shown, stem
from alexnet.errors import UserError

WNID = re.compile(r"n\d{8}")
Labelled = dict[str, dict[str, str]]  # {split: {name of a picture: its class}}


class Splits(StrEnum):
    auto = "auto"  # folders named train, val, ... are splits if nothing else stands beside them
    top = "top"  # they are splits, and other folders beside them are left out
    none = "none"  # they are classes like any other folder


def by_class(files: Files, splits: Splits, kind: SourceKind, wanted: Sequence[str] | None) -> Labelled:
    """<split>/<class>/**, or <class>/** alone."""
    prefix, folders_below = _shared_folder(files, splits)
    named = _named_splits({path[0] for path in folders_below}, splits, files)
    labelled: Labelled = {"train": {}, "val": {}}
    flat: dict[str, list[str]] = defaultdict(list)  # pictures that lie in no folder of their class
    unused: dict[str, list[str]] = defaultdict(list)
    for name in files.pictures:
        *folders, _ = name.removeprefix(prefix).split("/")
        top, *classes = (folders or [""]) if named else ["train", *folders]
        split = named.get(top, "") if named else top
        if not name.startswith(prefix) or not split or not (named or classes):
            unused["beside the splits" if named else "beside the classes"].append(name)
        elif split == "test":
            unused["of a test split"].append(name)
        elif classes:
            labelled[split][name] = classes[0]
        else:
            flat[top].append(name)
    for top, names in flat.items():  # there are lists of ImageNet's validation images
        listed = _val_labels(files) if kind == SourceKind.imagenet else {}
        unknown = [name for name in names if key_of(name) not in listed]
        if unknown and listed:
            raise UserError(f"path={files.path}: {shown(unknown[0])} is not in the list of validation images")
        if unknown:
            lists = "LOC_val_solution.csv or ILSVRC2012_devkit_t12.tar.gz"
            remedy = f"put {lists} beside it, or " if kind == SourceKind.imagenet else ""
            raise UserError(
                f"path={files.path} keeps {shown(top)}/ flat, so nothing says the class of an image: {remedy}"
                f"sort the images into {shown(top)}/<class>/<image>, or move that folder elsewhere"
            )
        labelled[named[top]] |= {name: listed[key_of(name)] for name in names}
    for where, names in unused.items():
        files.left_out[f"{where} ({some(names, 3)})"] += len(names)
    if wanted is None:
        train = next((f"{top}/" for top, split in named.items() if split == "train"), "")
        paths = [path[1:] for path in folders_below if f"{path[0]}/" == train] if named else folders_below
        _check_class_folders(files, prefix + train, paths, splits, bool(named))
    return labelled


def _shared_folder(files: Files, splits: Splits) -> tuple[str, list[list[str]]]:
    """The folder of the splits or classes, and the path below it of each folder that directly holds pictures.

    Down while one folder alone holds pictures, in splits or in classes.
    """

    def any_split(names: Iterable[str]) -> bool:
        return splits != Splits.none and any(name.lower() in SPLIT_NAMES for name in names)

    prefix, folders = "", {name.rpartition("/")[0] for name in files.pictures}
    below = [folder.split("/") for folder in folders if folder]
    while True:
        tops, seconds = {path[0] for path in below}, {path[1] for path in below if len(path) > 1}
        is_class = any(len(path) == 1 for path in below) and not any_split(seconds)
        if len(tops) != 1 or is_class or any_split(tops):
            return prefix, below
        prefix += f"{tops.pop()}/"
        below = [path[1:] for path in below if len(path) > 1]


def _named_splits(tops: set[str], splits: Splits, files: Files) -> dict[str, str]:
    """{top folder: its split}; {} where every top folder is a class. UserError where that is not clear."""
    named = {top: SPLIT_NAMES[top.lower()] for top in sorted(tops) if top.lower() in SPLIT_NAMES}
    if not named or splits == Splits.none:
        return {}
    here, others = f"path={files.path} holds {some(named)}", tops - named.keys()
    if others and splits == Splits.auto:
        raise UserError(
            f"{here} beside {some(others)}: set splits=none if all of them are classes, or splits=top to take "
            f"{some(named)} for the splits and leave the others out"
        )
    if len(set(named.values())) < len(named):
        raise UserError(f"{here}, of which two are the same split: rename or remove one of them")
    if "train" not in named.values():
        raise UserError(
            f"{here} but no train/: give the folder that holds both, or set splits=none for classes"
        )
    return named


def _check_class_folders(
    files: Files, prefix: str, paths: list[list[str]], splits: Splits, named: bool
) -> None:
    """UserError for class folders below `prefix` without a picture and for classes that look like splits."""
    folders: dict[str, set[str]] = defaultdict(set)  # {class: its folders; "" for pictures directly in it}
    for path in filter(None, paths):
        folders[path[0]].add("".join(path[1:2]))
    inside = next(iter(folders.values()), set())
    alike = len(folders) > 1 and all(other == inside for other in folders.values())
    if alike and len(inside) > 1 and "" not in inside and splits == Splits.auto:
        raise UserError(
            f"path={files.path}: {some(folders)} all hold the same folders {some(inside)}, so which of them are the "
            f"classes? Give the folder of the classes, or set splits={'top' if named else 'none'} for {some(folders)}"
        )
    below = (folder.removeprefix(prefix) for folder in files.folders if folder.startswith(prefix))
    empty = {path.partition("/")[0] for path in below if not is_hidden(path)} - folders.keys() - {""}
    if empty and folders:
        raise UserError(
            f"path={files.path}: {some(empty)} hold(s) no picture ({counts(files.left_out)}): remove the folder, "
            "or name the classes with classes=[...]"
        )


def _val_labels(files: Files) -> dict[str, str]:
    """{key of a validation image of ImageNet: wnid}, from the development kit or from Kaggle's list."""
    truth = _text(files, "ILSVRC2012_validation_ground_truth.txt").split()
    rows = csv.reader(io.StringIO(_text(files, "LOC_val_solution.csv")))
    try:
        if truth:
            wnids = {number: wnid for number, wnid, _ in _devkit_classes(files)}
            return {f"ILSVRC2012_val_{i:08d}": wnids[int(number)] for i, number in enumerate(truth, 1)}
        return {image: boxes.split()[0] for image, boxes in rows if image != "ImageId"}
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"path={files.path}: the list of validation images cannot be read ({error!r}): fetch it again"
        ) from error


def _devkit_classes(files: Files) -> list[tuple[int, str, str]]:
    """(number in the ground truth, wnid, words) of the 1000 classes; further rows of meta.mat are their ancestors."""
    name, data = _listed(files, "meta.mat")
    if not name:
        return []
    from scipy.io import loadmat

    try:
        rows = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return [(int(row[0]), str(row[1]), str(row[2])) for row in np.atleast_1d(rows) if row[4] == 0]
    except Exception as error:  # scipy raises almost anything at a damaged file
        raise UserError(
            f"path={files.path}: {shown(name)} cannot be read ({error!r}): fetch it again"
        ) from error


def tiny_imagenet(files: Files) -> Labelled:
    """train/<wnid>/images/*.JPEG, and the flat val/ by its val_annotations.txt (file, wnid, box)."""
    prefix, _ = _shared_folder(files, Splits.auto)
    lines = _text(files, "val_annotations.txt").splitlines()
    annotations = dict(line.split("\t")[:2] for line in lines if "\t" in line)
    labelled: Labelled = {"train": {}, "val": {}}
    for name in files.pictures:
        *folders, base = name.removeprefix(prefix).split("/")
        split = folders[0] if len(folders) > 1 else ""
        if split not in labelled:
            files.left_out["outside train/ and val/"] += 1
        elif split == "val" and folders[1] == "images":
            if base not in annotations:
                raise UserError(
                    f"{shown(name)} is not in val/val_annotations.txt: unpack the official archive again"
                )
            labelled[split][name] = annotations[base]
        else:
            labelled[split][name] = folders[1]
    missing = annotations.keys() - {name.rpartition("/")[2] for name in labelled["val"]}
    if missing:
        raise UserError(
            f"val/images lacks {len(missing)} images of val_annotations.txt, first {min(missing)}"
        )
    return labelled


def numbered(files: Files, wnids: Sequence[str]) -> Labelled:
    """Pictures whose class is a number."""
    numbers: dict[str, dict[str, int]] = {"train": {}, "val": {}}
    for name in files.pictures:
        split = SPLIT_NAMES.get(name.partition("/")[0], "train")
        if split in numbers and stem(name) in files.numbers:
            numbers[split][name] = files.numbers[stem(name)]
        else:
            files.left_out["without a class" if split in numbers else "of a test split"] += 1

    # The class of a number: the wnid in the names of its training images; else the one of that rank in the list of
    # words, if that has as many; else the name that the files give it, if no two are equal; else the number itself.
    inside: dict[int, set[str]] = defaultdict(set)
    for name, number in numbers["train"].items():
        inside[number].update(WNID.findall(key_of(name))[:1])
    names, digits = files.class_names, len(str(max(inside, default=0)))
    if all(len(one) == 1 for one in inside.values()) and len(set().union(*inside.values())) == len(inside):
        class_of = {number: min(one) for number, one in inside.items()}
    elif sorted(inside) == list(range(len(wnids))):
        class_of = dict(enumerate(wnids))
    elif inside.keys() <= names.keys() and len(set(names.values())) == len(names):
        class_of = {number: names[number] for number in inside}
    else:
        class_of = {number: f"{number:0{digits}d}" for number in inside}
    strange = set(numbers["val"].values()) - class_of.keys()
    if strange:
        raise UserError(f"path={files.path}: class {min(strange)} is in val but not in train")
    return {split: {name: class_of[n] for name, n in found.items()} for split, found in numbers.items()}


def _listed(files: Files, base: str) -> tuple[str, bytes]:
    """Name and content of the list of this file name that lies least deep; empty if there is none."""
    names = (name for name in files.texts if name.rpartition("/")[2] == base)
    name = min(names, key=lambda name: (len(name), name), default="")
    return name, files.texts.get(name, b"")


def _text(files: Files, base: str) -> str:
    name, data = _listed(files, base)
    return decoded_text(data, f"path={files.path}: {shown(name)}")


def decoded_text(data: bytes, what: str) -> str:
    """A list as text: UTF-8 or, as Windows writes it, UTF-16 or UTF-8 with a mark at its start."""
    try:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} must be text in UTF-8 or UTF-16: save it as UTF-8") from error


def words_of(files: Files, given: Path | None) -> dict[str, str]:
    """{wnid: words} from the file given, else from words.txt, LOC_synset_mapping.txt or meta.mat in the source."""
    if given is None:
        text = _text(files, "words.txt") or _text(files, "LOC_synset_mapping.txt")
    elif given.is_file():
        text = decoded_text(given.read_bytes(), f"words={given}")
    else:
        raise UserError(f"words={given} does not exist: give a file of 'wnid words' lines, or leave it out")
    pairs = (line.split(None, 1) for line in text.splitlines())
    found = {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}
    return found or {wnid: words for _, wnid, words in _devkit_classes(files)}


def key_of(name: str) -> str:
    """What names an image of ImageNet in every form: n01440764_10026, without the wnid that some forms append."""
    return re.sub(r"_n\d{8}$", "", stem(name).rpartition("/")[2])


def some(names: Iterable[str], few: int = 10) -> str:
    """The first few names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return ", ".join(shown(name) for name in names[:few]) + more


def counts(left_out: Mapping[str, int]) -> str:
    """How many files of each kind are left out, in words."""
    return "left out: " + (", ".join(f"{n} {kind}" for kind, n in sorted(left_out.items())) or "nothing")
