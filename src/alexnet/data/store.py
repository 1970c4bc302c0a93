"""A store: images decoded once, as memory-mapped uint8, and everything needed to trust them.

    <data_dir>/<name>/train/            <data_dir>/<name>/val/
        images.npy    (N, px, px, 3) uint8, memory-mapped
        labels.npy    (N,) int64
        mean.npy      (px, px, 3) float32, the mean image (train only)
        manifest.json classes, counts, source, rule, hashes, channel mean, covariance

`train` and `holdout` are two index sets of the train store (`holdout_split`); `val` is the other store.
A store appears under its name only when it is complete: it is built in `<split>.partial` (`StoreBuilder`), where the
rows that a killed job has finished wait for the next one, and renamed at the end.
"""

import errno
import hashlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from alexnet.errors import UserError

FORMAT = 1
MANIFEST = {"n": int, "px": int, "classes": list, "sha256": dict}  # what no store can be read without
SCRATCH = ("plan", "done.npy", "moved.npy")  # of a store under construction
COPY_ROWS = 256  # rows moved at a time, at most
MAKE = "make it with scripts/prepare_data.py"


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


def open_store(
    path: str | os.PathLike[str], verify: bool = False, px: int | None = None, remedy: str = MAKE
) -> Store:
    """Open and check one store: sizes, headers, the hashes of the manifest and of the small arrays.

    Args:
        path: the directory of one split, `<data_dir>/<name>/<split>`.
        verify: also read all images and compare their hash.
        px: the side the caller needs; a store of another size is refused.
        remedy: how the store is made, for messages.

    Raises:
        UserError: missing, unfinished, damaged, or of another size; the message names the remedy.
    """
    path = Path(path)
    manifest = _manifest(path, remedy)
    try:
        images = _array(path, "images.npy", (manifest["n"], manifest["px"], manifest["px"], 3), "uint8")
        labels = np.array(_array(path, "labels.npy", (manifest["n"],), "int64"))
        with_mean = "mean.npy" in manifest["sha256"]
        mean = np.array(_array(path, "mean.npy", images.shape[1:], "float32")) if with_mean else None
        for name, expected in manifest["sha256"].items():
            if (verify or name != "images.npy") and sha256(path / name) != expected:
                raise ValueError(f"{name} has another sha256 than its manifest")
    except ValueError as error:
        raise UserError(
            f"the store {path} is damaged: {error}; delete that directory and {remedy}"
        ) from error
    if px is not None and px != manifest["px"]:
        raise UserError(
            f"{path} holds {manifest['px']}-pixel images, not px={px}: prepare it under another name"
        )
    return Store(path, images, labels, manifest, mean)


def _manifest(path: Path, remedy: str) -> dict[str, Any]:
    file = path / "manifest.json"
    if not file.is_file():
        state = "is unfinished" if partial_directory(path).is_dir() else "does not exist"
        raise UserError(f"the store {path} {state}: {remedy}")
    try:
        manifest = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        wrong = "is empty" if not file.stat().st_size else "is no JSON object in UTF-8"
    elif manifest.get("format") != FORMAT:
        wrong = f"has format {manifest.get('format')}, not {FORMAT}"
    elif manifest.get("self") != self_hash(manifest):
        wrong = "was changed after it was written"
    elif missing := [key for key, kind in MANIFEST.items() if not isinstance(manifest.get(key), kind)]:
        wrong = f"has no {missing[0]}"
    else:
        return manifest
    raise UserError(f"the store {path} is damaged: {file} {wrong}; delete that directory and {remedy}")


def _array(path: Path, name: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    try:
        array = np.load(path / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{name} cannot be read ({error})") from error
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{name} holds {array.dtype}{array.shape}, not {dtype}{shape}")
    return array


def partial_directory(path: Path) -> Path:
    """Where the store at `path` is built."""
    return path.with_name(path.name + ".partial")


def remove_scratch(path: Path) -> None:
    """Delete what the construction of the store at `path` needed; a kill may have left some of it."""
    for name in SCRATCH:
        (path / name).unlink(missing_ok=True)


class StoreBuilder:
    """A store under construction: rows are written in any order, by any process, and survive a kill.

    `plan` says what every row will be. A directory left by a job with the same plan is continued: its
    `done.npy` (n,) uint8 says which rows are there: 0 to do, 1 done, 2 done and enlarged; a row is marked after
    its pixels are written. A directory with another plan is deleted.
    """

    def __init__(self, path: Path, n: int, px: int, plan: str) -> None:
        self.path, self.n, self.px = path, n, px
        self.directory = partial_directory(path)
        self.images_path = self.directory / "images.npy"
        if not self._continues(plan):
            shutil.rmtree(self.directory, ignore_errors=True)
            self.directory.mkdir(parents=True)
            self._allocate()
            np.save(self.directory / "done.npy", np.zeros(n, dtype=np.uint8))
            (self.directory / "plan").write_text(plan)
        self.done: np.ndarray = np.load(self.directory / "done.npy", mmap_mode="r+")

    @property
    def compacting(self) -> bool:
        """Whether rows have begun to move: nothing can be decoded any more, only `publish` is left."""
        return (self.directory / "moved.npy").exists()

    def _continues(self, plan: str) -> bool:
        with suppress(OSError, ValueError, EOFError):
            marks = len(np.load(self.directory / "done.npy", mmap_mode="r"))
            rows = len(np.load(self.images_path, mmap_mode="r"))
            complete = marks == self.n and (rows == self.n or self.compacting)
            return complete and (self.directory / "plan").read_text() == plan
        return False

    def _allocate(self) -> None:
        """The whole images.npy, before the first row is written, so that a full disk is an error at the start."""
        size = len(_header(self.n, self.px)) + self.n * self.px**2 * 3
        free = shutil.disk_usage(self.directory).free
        if free < size * 1.01:  # a hundredth for the rest
            raise UserError(
                f"no space left for {self.directory}: it needs {size / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                "make room, or set data_dir to another disk"
            )
        with open(self.images_path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except (AttributeError, OSError) as error:  # macOS, and file systems that cannot
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                file.truncate(size)
            file.write(_header(self.n, self.px))

    def publish(self, labels: np.ndarray, manifest: dict[str, Any], mean: np.ndarray | None = None) -> Store:
        """Write what belongs beside the images, hash it all, rename; the store then exists."""
        np.save(self.directory / "labels.npy", labels.astype(np.int64))
        if mean is not None:
            np.save(self.directory / "mean.npy", mean.astype(np.float32))
        names = ["images.npy", "labels.npy", *(["mean.npy"] if mean is not None else [])]
        manifest = {"format": FORMAT, **manifest}
        manifest["bytes"] = sum(os.path.getsize(self.directory / name) for name in names)
        manifest["sha256"] = {name: sha256(self.directory / name) for name in names}
        write_manifest(self.directory, manifest)
        for name in [*names, "manifest.json"]:
            with open(self.directory / name, "rb") as file:
                os.fsync(file.fileno())
        os.rename(self.directory, self.path)
        remove_scratch(self.path)  # now: before, a store that lacks only some of this could not be continued
        return open_store(self.path)

    def compact(self, keep: np.ndarray) -> None:
        """Drop the rows that are not in `keep`, a bool array (n,): the others move forward inside the file.

        No second copy of the images is made. `moved.npy` counts the rows that are in their new place, so a killed job
        goes on; a block is never longer than the way it moves, so that moving it twice does no harm.
        """
        if keep.all():
            return
        rows = np.flatnonzero(keep)
        shifts = rows - np.arange(len(rows))  # never decreasing
        if not self.compacting:
            np.save(self.directory / "new.npy", np.searchsorted(shifts, [0], side="right"))
            os.replace(self.directory / "new.npy", self.directory / "moved.npy")
        moved = np.load(self.directory / "moved.npy", mmap_mode="r+")
        start, size = len(_header(self.n, self.px)), self.px**2 * 3
        with open(self.images_path, "r+b") as file:
            while (at := int(moved[0])) < len(rows):
                same_shift = int(np.searchsorted(shifts, shifts[at], side="right"))
                stop = min(same_shift, at + min(int(shifts[at]), COPY_ROWS))
                _move(file, start + int(rows[at]) * size, start + at * size, (stop - at) * size)
                moved[0] = stop
            file.seek(0)
            file.write(_header(len(rows), self.px))
            file.truncate(start + len(rows) * size)


def _move(file: IO[bytes], source: int, target: int, size: int) -> None:
    file.seek(source)
    block = file.read(size)
    file.seek(target)
    file.write(block)
    file.flush()


def _header(n: int, px: int) -> bytes:
    """The head of an .npy file of n images; numpy leaves room in it, so that its length does not depend on n."""
    buffer = io.BytesIO()
    shape = {"descr": "|u1", "fortran_order": False, "shape": (n, px, px, 3)}
    np.lib.format.write_array_header_1_0(buffer, shape)
    return buffer.getvalue()


def write_rows(images_path: Path, px: int, rows: Sequence[int], images: Sequence[np.ndarray]) -> None:
    """Write images (px, px, 3) uint8 to their rows; by `write`, not through a map, where a full disk kills."""
    start, size = len(_header(1, px)), px**2 * 3
    with open(images_path, "r+b") as file:
        for row, image in zip(rows, images, strict=True):
            file.seek(start + row * size)
            file.write(image.tobytes())


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """manifest.json with the hash of its own contents under `self`."""
    text = json.dumps({**manifest, "self": self_hash(manifest)}, indent=1, ensure_ascii=False)
    (directory / "manifest.json").write_text(text + "\n")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def self_hash(manifest: dict[str, Any]) -> str:
    """Of what a JSON file holds beside this hash, which stands in it under `self`."""
    rest = {key: value for key, value in manifest.items() if key != "self"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
