"""A store: images decoded once, as memory-mapped uint8, and everything needed to trust them.

    <data_dir>/<name>/train/            <data_dir>/<name>/val/
        images.npy    (N, px, px, 3) uint8, memory-mapped
        labels.npy    (N,) int64
        mean.npy      (px, px, 3) float32, the mean image (train only)
        manifest.json classes, counts, source, rule, hashes, channel mean, covariance

`train` and `holdout` are two index sets of the train store (`holdout_split`); `val` is the other store.
A store appears under its name only when it is whole: it is built in `<split>.partial`, where a killed job
leaves its finished rows for the next one (`Partial`), and renamed at the end.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alexnet.errors import UserError

FORMAT = 1
KNOWN = ("synthetic", "tiny_imagenet", "imagenette", "imagewoof", "imagenet")  # sources.py, but for `folder`
# What decides which images of its source a store holds (prepare.py has the rest, where the defaults serve).
REQUESTED = ("px", "n_classes", "images_per_class", "classes", "val_fraction", "n_train", "n_val")
FEW = 10  # classes that fit into a message
COPY_ROWS = 256  # rows moved at a time when bad rows are closed up


@dataclass(frozen=True)
class Store:
    """An open store. `images` (N, px, px, 3) uint8 is a read-only memory map; `mean` is None except for train."""

    path: Path
    images: np.ndarray
    labels: np.ndarray
    manifest: dict[str, Any]
    mean: np.ndarray | None

    @property
    def px(self) -> int:
        return int(self.manifest["px"])

    @property
    def classes(self) -> list[dict[str, str]]:
        return list(self.manifest["classes"])

    def __len__(self) -> int:
        return len(self.labels)

    def holdout(self) -> tuple[np.ndarray, np.ndarray]:
        """(train_index, holdout_index) by the fraction and seed that the manifest names."""
        rule = self.manifest["holdout"]
        return holdout_split(self.labels, rule["fraction"], rule["seed"])


def holdout_split(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Set aside `fraction` of every class: two sorted int64 index arrays, (train, holdout).

    Per class round(fraction * n), at least one image of a class that has two or more. The draw ranks raw
    outputs of PCG64, which numpy guarantees never to change (its shuffles it does not), so no version of
    numpy can move a holdout image into the training set.
    """
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels) if fraction > 0 else ():
        members = np.flatnonzero(labels == label)
        count = max(round(fraction * len(members)), 1) if len(members) > 1 else 0
        held[members[draw_order(len(members), seed, int(label))[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def draw_order(n: int, *seed: int) -> np.ndarray:
    """A random order of 0..n-1 that is the same under every version of numpy."""
    return np.argsort(np.random.PCG64(np.random.SeedSequence(seed)).random_raw(n), kind="stable")


# Reading ------------------------------------------------------------------------------------------------


def open_store(path: str | os.PathLike[str], verify: bool = False, px: int | None = None) -> Store:
    """Open and check one store: sizes, headers, hash of the manifest and of labels; with `verify` all hashes.

    Args:
        path: the directory of one split, `<data_dir>/<name>/<split>`.
        verify: read everything once and compare the hash of every array.
        px: the side the caller needs; a store of another size is refused.

    Raises:
        UserError: missing, unfinished, damaged, or of another size; the message names the remedy.
    """
    path = Path(path)
    manifest = _manifest(path)
    images = _array(path, "images.npy", (manifest["n"], manifest["px"], manifest["px"], 3), "uint8")
    labels = np.array(_array(path, "labels.npy", (manifest["n"],), "int64"))
    with_mean = "mean.npy" in manifest["sha256"]
    mean = np.array(_array(path, "mean.npy", images.shape[1:], "float32")) if with_mean else None
    for name in manifest["sha256"] if verify else ["labels.npy"]:
        if sha256(path / name) != manifest["sha256"][name]:
            raise _damaged(path, f"{name} has another sha256 than its manifest")
    if px is not None and px != manifest["px"]:
        raise UserError(
            f"{path} holds {manifest['px']}-pixel images, not px={px}: prepare it under another name"
        )
    return Store(path, images, labels, manifest, mean)


def _manifest(path: Path) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        unfinished = partial_directory(path).is_dir()
        state = "is unfinished" if unfinished else "does not exist"
        todo = "continue with" if unfinished else "make it with"
        raise UserError(f"the store {path} {state}: {todo} `{command(path)}`")
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise _damaged(path, "manifest.json is not JSON") from error
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path} has format {manifest.get('format')}, not {FORMAT}: {_again(path)}")
    if manifest.get("self") != _self_hash(manifest):
        raise _damaged(path, "manifest.json was changed after it was written")
    return manifest


def _array(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = np.load(path / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{name} cannot be read ({error})") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise _damaged(path, f"{name} holds {array.dtype}{array.shape}, not {dtype}{shape}")
    return array


def command(path: Path) -> str:
    """The command that makes the store at `<data_dir>/<name>/<split>`.

    A manifest there says what it was made of. Where there is none, the name does: imagenet100 and imagenet_100 are a
    hundred classes of imagenet, synthetic_500 has so many images, and what is named like no known set is a folder.
    """
    name, data_dir, request = path.parent.name, str(path.parents[1]), _request(path)
    kind = request.get("source") or max((k for k in KNOWN if name.startswith(k)), key=len, default="folder")
    if not request and kind in KNOWN and (number := re.fullmatch(r"_?(\d+)", name.removeprefix(kind))):
        request = {"n_train" if kind == "synthetic" else "n_classes": number[1]}
    path_word = ["path=<folder or archive>"] if kind in ("imagenet", "folder") else []  # the others download
    name_word = [shlex.quote(f"name={name}")] if name != kind else []
    place = [shlex.quote(f"data_dir={data_dir}")] if data_dir != "data" else []
    chosen = [_word(key, request[key]) for key in REQUESTED if request.get(key)]
    return " ".join(
        ["python scripts/prepare_data.py", f"data={kind}", *path_word, *name_word, *place, *chosen]
    )


def _word(key: str, value: Any) -> str:
    if isinstance(value, list):
        if len(value) > FEW:
            return f"class_file=<file with its {len(value)} wnids>"
        value = f"[{','.join(value)}]"
    return shlex.quote(f"{key}={value}")


def _request(path: Path) -> dict[str, Any]:
    """What the split at `path`, or else another one beside it, was prepared from; {} where nothing says so."""
    for file in (path / "manifest.json", *sorted(path.parent.glob("*/manifest.json"))):
        try:
            return dict(json.loads(file.read_text())["request"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {}


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"the store {path} is damaged: {what}; {_again(path)}")


def _again(path: Path) -> str:
    return f"delete that directory and run `{command(path)}`"


# Writing ------------------------------------------------------------------------------------------------


def partial_directory(path: Path) -> Path:
    """Where the store at `path` is built."""
    return path.with_name(path.name + ".partial")


class Partial:
    """A store under construction: rows are written in any order, by any process, and survive a kill.

    `plan` says what every row will be. A directory left by a job with the same plan is continued: its
    `done.npy` (n,) uint8 says which rows are there: 0 to do, 1 done, 2 done and enlarged; a row is marked after
    its pixels are written. Anything else left there is deleted.
    """

    def __init__(self, path: Path, n: int, px: int, plan: str) -> None:
        self.path, self.n, self.px, self.plan = path, n, px, plan
        self.directory = partial_directory(path)
        if not self._continues():
            self._start()
        self.done: np.ndarray = np.load(self.directory / "done.npy", mmap_mode="r+")

    @property
    def images_path(self) -> Path:
        return self.directory / "images.npy"

    def _continues(self) -> bool:
        try:
            images = np.load(self.images_path, mmap_mode="r")
            return (self.directory / "plan").read_text() == self.plan and len(images) == self.n
        except (OSError, ValueError):
            return False

    def _start(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True)
        size = self.n * self.px**2 * 3
        require_space(self.directory, size)
        np.save(self.directory / "done.npy", np.zeros(self.n, dtype=np.uint8))
        np.lib.format.open_memmap(self.images_path, "w+", np.uint8, (self.n, self.px, self.px, 3))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and no bus error at a later write
            with open(self.images_path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(self.images_path))
        (self.directory / "plan").write_text(self.plan)

    def close_up(self, keep: np.ndarray) -> None:
        """Drop the rows that are not in `keep`, a bool array (n,)."""
        if keep.all():
            return
        rows, source = np.flatnonzero(keep), np.load(self.images_path, mmap_mode="r")
        target_path = self.directory / "kept.npy"
        shape = (len(rows), *source.shape[1:])
        target = np.lib.format.open_memmap(target_path, "w+", np.uint8, shape)
        for start in range(0, len(rows), COPY_ROWS):
            target[start : start + COPY_ROWS] = source[rows[start : start + COPY_ROWS]]
        target.flush()
        os.replace(target_path, self.images_path)

    def publish(self, labels: np.ndarray, manifest: dict[str, Any], mean: np.ndarray | None = None) -> Store:
        """Write what belongs beside the images, hash it all, rename; the store then exists."""
        np.save(self.directory / "labels.npy", labels.astype(np.int64))
        if mean is not None:
            np.save(self.directory / "mean.npy", mean.astype(np.float32))
        names = ["images.npy", "labels.npy"] + (["mean.npy"] if mean is not None else [])
        manifest = {"format": FORMAT, **manifest}
        manifest["bytes"] = sum(os.path.getsize(self.directory / name) for name in names)
        manifest["sha256"] = {name: sha256(self.directory / name) for name in names}
        write_manifest(self.directory, manifest)
        for name in ("done.npy", "plan"):
            (self.directory / name).unlink()
        for name in [*names, "manifest.json"]:
            _sync(self.directory / name)
        os.rename(self.directory, self.path)
        return open_store(self.path)


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """manifest.json with the hash of its own contents under `self`."""
    text = json.dumps({**manifest, "self": _self_hash(manifest)}, indent=1, ensure_ascii=False)
    (directory / "manifest.json").write_text(text + "\n")


def require_space(directory: Path, size: int) -> None:
    """Raise UserError unless `size` bytes (and a hundredth more) fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if free < size * 1.01:
        raise UserError(
            f"no space left for {directory}: it needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room, or set data_dir to another disk"
        )


def plan_hash(*parts: Any, names: Sequence[str], labels: np.ndarray) -> str:
    """One line that differs whenever any row of a store would."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    digest.update("\n".join(names).encode())
    digest.update(np.ascontiguousarray(labels).tobytes())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _self_hash(manifest: dict[str, Any]) -> str:
    rest = {key: value for key, value in manifest.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
