"""From a source to stores: decode once, in parallel, and never lose a finished row.

Bad files (see pictures.py) are all named, each with its reason. on_corrupt=fail then stops: the good rows are kept, so
mend the files or say skip, and run again. on_corrupt=skip leaves them out and lists them in the manifest.

A store that is finished is left alone, if it was made from the source that is given: number, names and sizes of the
files and a sample of their contents are compared.

The mean image and the colour covariance are those of train without holdout. Their sums are sums of integers below
2^53 in float64, hence exact, and the same whatever the number of workers.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from alexnet.data import sources, synthetic
from alexnet.data.config import DataConfig, SourceKind, cores
from alexnet.data.files import DAMAGE, fingerprint, listing, shown
from alexnet.data.layouts import WNID, Splits, counts, decoded_text
from alexnet.data.pictures import MAX_PIXELS, Payload, Resample, decode, fit, reason
from alexnet.data.sources import Source
from alexnet.data.store import Store, StoreBuilder, holdout_split, open_store, remove_scratch, write_rows
from alexnet.errors import UserError

log = logging.getLogger(__name__)

MOST_DRAWN = 10_000_000  # synthetic images, each of which is listed first
CHUNK = 64  # images handed to a process at a time,
CHUNK_BYTES = 1 << 24  # or fewer, if their files together are larger than this
STATISTICS_CHUNK = 256  # images summed at a time
FEW = 512  # below this many images, starting processes takes longer than decoding
FEW_CLASSES = 10  # that a summary names


OnCorrupt = StrEnum("OnCorrupt", "fail skip")


@dataclass
class PrepareConfig:
    """What to prepare, and where. Every field is a key of `scripts/prepare_data.py`."""

    name: str = "synthetic"  # the store's name; messages and manifests carry it
    root: str = "data/synthetic"  # <data_dir>/<name>: train/ and val/ appear in it
    source: SourceKind = SourceKind.synthetic
    path: str | None = None  # archive or folder; null downloads tiny_imagenet, imagenette, imagewoof
    official: bool = True  # insist on the published checksum and counts
    words: str | None = None  # file of "wnid words" lines, when the source carries none
    splits: Splits = Splits.auto  # are folders named train, val, test splits (top) or classes (none)?
    px: int = 64  # short side, and side of the stored square
    resample: Resample = Resample.area
    min_side: int = 8  # an image with a shorter side is a bad file
    max_pixels: int = MAX_PIXELS  # so is one with more pixels; decoding takes up to 16 bytes for each
    on_corrupt: OnCorrupt = OnCorrupt.fail
    classes: list[str] | None = None  # only these wnids
    class_file: str | None = None  # only the wnids in this file, one per line
    n_classes: int | None = None  # only so many, drawn by seed
    images_per_class: int | None = None  # train images, drawn by seed
    val_fraction: float = 0.0  # share of train that becomes val, for a source without val images
    holdout_fraction: float = 0.05
    holdout_seed: int = 0
    seed: int = 0  # of the subset, of val_fraction, and of the synthetic images
    n_train: int = 6000  # synthetic only
    n_val: int = 1000  # synthetic only
    workers: int | None = None  # decoding processes; null: one per core, 0: none but this one
    verify: bool = False  # check the hashes of what is there instead of preparing

    def __post_init__(self) -> None:
        self.source, self.resample = SourceKind(self.source), Resample(self.resample)
        self.on_corrupt, self.splits = OnCorrupt(self.on_corrupt), Splits(self.splits)
        for key in ("root", "path", "words", "class_file"):
            place = getattr(self, key)
            setattr(self, key, place and os.path.expanduser(place))
        if os.path.isabs(self.name) or ".." in Path(self.name).parts:
            raise UserError(f"name={self.name} must be a name inside data_dir: set data_dir to another place")
        for key, least in (("px", 1), ("min_side", 1), ("max_pixels", 1), ("n_train", 10), ("n_val", 1),
                           ("workers", 0), ("n_classes", 2), ("images_per_class", 1), ("seed", 0),
                           ("holdout_seed", 0)):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key}={value} must be an integer of at least {least}")
        for key in ("n_train", "n_val"):
            if getattr(self, key) > MOST_DRAWN:
                raise UserError(f"{key}={getattr(self, key)} must be at most {MOST_DRAWN:,}")
        for key in ("val_fraction", "holdout_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be in [0, 1)")
        chosen = [key for key in ("classes", "class_file", "n_classes") if getattr(self, key) is not None]
        if len(chosen) > 1:
            raise UserError(f"{chosen[0]} and {chosen[1]} both choose the classes: set one of them to null")

    def request(self) -> dict[str, Any]:
        """The fields that decide what a store holds; two stores with equal requests are the same store."""
        elsewhere = {"name", "root", "path", "official", "words", "workers", "verify", "class_file"}
        if self.source != SourceKind.synthetic:
            elsewhere |= {"n_train", "n_val"}
        names = [entry.name for entry in fields(PrepareConfig)]  # a script's own fields decide nothing
        values = {name: getattr(self, name) for name in names if name not in elsewhere}
        drawn = {"synthetic.VERSION": synthetic.VERSION} if self.source == SourceKind.synthetic else {}
        return values | {"classes": wanted_classes(self)} | drawn


# What stores of before a field was added were made with.
BEFORE = {"splits": Splits.auto, "max_pixels": MAX_PIXELS}


@dataclass
class PrepareData(PrepareConfig):
    """scripts/prepare_data.py: the fields of PrepareConfig, and the data set whose name they take."""

    data: DataConfig = field(default_factory=DataConfig)
    data_dir: str = "data"


class Prepared(NamedTuple):
    """One split: its store, and how fast this call wrote it; empty if it was there."""

    store: Store
    written: str = ""

    def summary(self) -> str:
        """The store in one line, with what its source held."""
        store, found = self.store, self.store.manifest.get("found", {})
        names = [entry["words"].split(",")[0] for entry in store.classes[:FEW_CLASSES]]
        if len(names) < len(store.classes):
            names.append("...")
        parts = [
            f"{len(store):,} images of {store.px} pixels",
            self.written or "already there, nothing done",
            f"{len(store.classes)} classes: {', '.join(names)}",
        ]
        if found.get("read", 0) < found.get("bytes", 0):
            parts.append(
                f"from {found['read'] / 1e6:,.2f} of the source's {found['bytes'] / 1e6:,.2f} MB of pictures"
            )
        bad = len(store.manifest.get("corrupt", []))
        left_out = found.get("left_out", {}) | ({"bad": bad} if bad else {})
        if left_out:
            parts.append(counts(left_out))
        return f"{store.path}: {'; '.join(parts)}"


def prepare(config: PrepareConfig) -> list[Prepared]:
    """Make the stores that `config` asks for; what is already there is left alone.

    Raises:
        UserError: a source that is missing, damaged or of another layout; bad files with on_corrupt=fail; a store
            of another configuration or source in the same place; no space left.
    """
    root = Path(config.root)
    with _locked(root):
        if (finished := _finished(config, root)) is not None:
            log.info("%s is already prepared: nothing to do", root)
            return [Prepared(store) for store in finished]
        source = choose(config)
        if source.left_out:
            log.warning("not taken from %s: %s", source.description, counts(source.left_out))
        few = max(map(len, source.splits.values())) < FEW
        workers = 0 if config.source == SourceKind.synthetic or few else cores()
        with Crew(workers if config.workers is None else config.workers) as crew:
            return [_prepare_split(config, source, split, crew) for split in source.splits]


def verify(config: PrepareConfig) -> list[Store]:
    """Open the stores and compare every hash; UserError says which file is damaged, or that there is none."""
    root, remedy = Path(config.root), DataConfig(config.name, config.root).remedy()
    train = open_store(root / "train", verify=True, px=config.px, remedy=remedy)
    others = [split for split in train.manifest.get("splits", []) if split != "train"]
    return [train, *(open_store(root / split, verify=True, px=config.px, remedy=remedy) for split in others)]


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time per data set: others wait. Directories that nothing came into are taken away again.

    A disk that fills up inside is a UserError.
    """
    from alexnet.system import locked  # not above: every decoding process would load torch

    made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".lock").touch()
    except OSError as error:
        raise UserError(
            f"root={root} cannot be written ({error.strerror}): set data_dir to a place that can"
        ) from error
    with ExitStack() as stack:
        if not stack.enter_context(locked(root, ".lock", wait=0)):
            log.warning("another process prepares %s: waiting for it", root)
            stack.enter_context(locked(root, ".lock", wait=-1))
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no space left for {root}: make room and run again (finished images are kept), "
                "or set data_dir to another disk"
            ) from error
        finally:
            if made and [path.name for path in root.iterdir()] == [".lock"]:
                (root / ".lock").unlink()  # who waits for it makes a new one
                with suppress(OSError):  # not empty
                    for path in made:
                        path.rmdir()


def _finished(config: PrepareConfig, root: Path) -> list[Store] | None:
    """The stores, when all are there; None when there is work to do; UserError when they are others."""
    if not (root / "train").is_dir():
        return None
    train = open_store(root / "train", remedy=DataConfig(config.name, config.root).remedy())
    there, asked = BEFORE | train.manifest.get("request", {}), config.request()
    for key in asked:
        if there.get(key) != asked[key]:
            raise UserError(
                f"{train.path} was prepared with {key}={there.get(key)}, not {key}={asked[key]}: "
                f"choose another name, or delete {root}"
            )
    _refuse_other_source(config, train)
    paths = [root / split for split in train.manifest.get("splits", ["train"])]
    for path in paths:
        remove_scratch(path)
    return [open_store(path) for path in paths] if all(path.is_dir() for path in paths) else None


def _refuse_other_source(config: PrepareConfig, store: Store) -> None:
    """Compare the source that is given with the one the store was made from. One that is gone cannot be compared."""
    path = Path(config.path) if config.path else None
    if path is None or config.source == SourceKind.synthetic:
        return
    before, now = store.manifest.get("source"), f"{config.source}: {shown(path.name)}"
    origin = store.manifest.get("origin")
    if origin is not None and path.exists():
        given = fingerprint(listing(path))
        differ = [key for key in ("files", "names", "sizes", "contents") if given[key] != origin[key]]
        before = f"{origin['place']}, {origin['files']} files"
        now = f"{given['place']}, {given['files']} files; different: {', '.join(differ)}"
        if not differ:
            if given["place"] != origin["place"]:
                log.warning("%s was prepared from %s, which held the same files", store.path, origin["place"])
            return
    elif before == now or config.source != SourceKind.folder:
        return
    raise UserError(
        f"{store.path} was prepared from another source ({before}; not {now}): choose another name, delete "
        f"{store.path.parent} to prepare it anew, or leave path out to keep it"
    )


def wanted_classes(config: PrepareConfig) -> list[str] | None:
    """The names of `classes` or of the lines of `class_file`, sorted; None means all, or `n_classes` of them."""
    if config.class_file is None:
        return None if config.classes is None else sorted(config.classes)
    file = Path(config.class_file)
    if not file.is_file():
        raise UserError(f"class_file={file} does not exist: give a file with one class per line")
    lines = decoded_text(file.read_bytes(), f"class_file={file}").splitlines()
    # What follows a wnid is taken for its words.
    names = [line.split()[0] if WNID.match(line) else line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"class_file={file} holds no name of a class: give one per line")
    return sorted(set(names))


def choose(config: PrepareConfig) -> Source:
    """The source with the subset that `config` asks for."""
    wanted = wanted_classes(config)
    if config.source == SourceKind.synthetic:
        source = sources.synthetic_source(config.n_train, config.n_val, config.px, config.seed)
    else:
        path = Path(config.path) if config.path else None
        path = path or sources.download(config.source, config.px, Path(config.root).parent / "downloads")
        words = Path(config.words) if config.words else None
        source = sources.open_source(
            config.source, path, official=config.official, words=words, splits=config.splits, wanted=wanted
        )
    if config.n_classes is not None:
        wanted = sources.draw_classes(source, config.n_classes, config.seed)
    if wanted is not None:
        source = sources.with_classes(source, wanted)
    if config.val_fraction > 0:
        source = sources.with_val_fraction(source, config.val_fraction, config.seed)
    if config.images_per_class is not None:
        source = sources.with_images_per_class(source, config.images_per_class, config.seed)
    return replace(source, splits={split: labels for split, labels in source.splits.items() if labels})


class Crew(AbstractContextManager["Crew"]):
    """The processes of one call of `prepare`; with 0 workers all is done in this one."""

    def __init__(self, workers: int) -> None:
        # spawn: the parent has threads (the progress bar, torch), and forking a process with threads can hang it
        context = multiprocessing.get_context("spawn")
        self.workers = workers
        self.pool = ProcessPoolExecutor(workers, context, _end_with_parent) if workers else None

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, job: Callable[[Any], Any], chunks: Iterator[Any]) -> Iterator[Any]:
        """`map(job, chunks)`, in any order, with few chunks under way (they hold the bytes of their images)."""
        if self.pool is None:
            yield from map(job, chunks)
            return
        try:
            # A spawned process imports the script that started it, and with it torch and lightning, for nothing.
            script = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                pending = {self.pool.submit(job, chunk) for chunk in islice(chunks, 2 * self.workers + 2)}
            finally:
                sys.modules["__main__"] = script
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {self.pool.submit(job, chunk) for chunk in islice(chunks, len(finished))}
                yield from (future.result() for future in finished)
        except BrokenProcessPool as error:
            raise UserError(
                f"a decoding process was killed (out of memory?): run again with workers={max(self.workers // 2, 1)}, "
                "finished images are kept"
            ) from error


def _end_with_parent() -> None:
    """In a decoding process: stop when the parent was killed; otherwise it would wait for work for ever."""

    def wait_and_exit(parent: Any) -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait_and_exit, args=(multiprocessing.parent_process(),), daemon=True).start()


def _prepare_split(config: PrepareConfig, source: Source, split: str, crew: Crew) -> Prepared:
    """Decode what is to do, leave the bad rows out, add labels, statistics and manifest; the store then exists."""
    path = Path(config.root) / split
    if path.is_dir():
        return Prepared(open_store(path))
    names, labels = list(source.splits[split]), np.array(list(source.splits[split].values()))
    rule = {"short_side": config.px, "crop": "centre", "resample": str(config.resample)}
    made_by = (rule, config.min_side, config.max_pixels, source.description, source.origin.get("place"))
    plan = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode())  # differs whenever any row would
    plan.update("\0".join(names).encode(errors="surrogatepass"))
    plan.update(labels.tobytes())
    building = StoreBuilder(path, len(names), config.px, plan.hexdigest())
    started, already = time.perf_counter(), int(np.count_nonzero(building.done))
    if not building.compacting:
        _decode_all(config, source, names, building, crew)
    seconds = time.perf_counter() - started

    keep = building.done > 0
    lost = np.setdiff1d(labels, labels[keep])
    if len(lost):
        wnid = source.classes[lost[0]]["wnid"]
        raise UserError(f"{path}: class {wnid} has no good image left; leave it out with classes")
    building.compact(keep)
    labels = labels[keep]
    of_train = split == "train"
    mean, statistics = _statistics(config, building.images_path, labels, crew) if of_train else (None, {})
    manifest = {
        "name": config.name,
        "split": split,
        "splits": list(source.splits),
        "px": config.px,
        "n": len(labels),
        "classes": source.classes,
        "counts": np.bincount(labels, minlength=len(source.classes)).tolist(),
        "source": source.description,
        "origin": source.origin or None,
        "found": {
            "bytes": sum(source.sizes.values()),
            "read": sum(source.sizes.get(name, 0) for labels in source.splits.values() for name in labels),
            "left_out": dict(source.left_out),
        },
        "rule": rule,
        "request": config.request(),
        "enlarged": int((building.done == 2).sum()),
        "corrupt": [shown(names[row]) for row in np.flatnonzero(building.done == 0)],
    }
    store = building.publish(labels, manifest | statistics, mean)
    return Prepared(store, f"{(len(names) - already) / max(seconds, 1e-9):,.0f} images/s, {seconds:.1f} s")


def _decode_all(
    config: PrepareConfig, source: Source, names: list[str], building: StoreBuilder, crew: Crew
) -> None:
    """Fill the rows that are not done. Bad files are named; UserError for them with on_corrupt=fail."""
    row_of = {names[row]: int(row) for row in np.flatnonzero(building.done == 0)}
    bad: dict[int, str] = {}  # {row: reason}
    look = {"file": sources.progress_stream(), "desc": building.path.name, "unit": " images"}
    with tqdm(total=len(names), initial=len(names) - len(row_of), **look) as bar:
        job = partial(decode_chunk, config, building.images_path)
        for marks, reasons in crew.map(job, _chunks(source, row_of)):
            building.done[list(marks)] = list(marks.values())
            bad |= reasons
            bar.update(len(marks) + len(reasons))
    lines = [f"{shown(names[row])}: {shown(why)}" for row, why in sorted(bad.items())]
    for line in lines:
        log.warning("bad file %s", line)
    if bad and config.on_corrupt == OnCorrupt.fail:
        more = f"; and {len(bad) - 5} more, see above" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} bad file(s) for {building.path} ({'; '.join(lines[:5])}{more}): mend them, or leave them out "
            "with on_corrupt=skip, and run again; finished images are kept"
        )


def _chunks(source: Source, row_of: dict[str, int]) -> Iterator[list[tuple[int, Payload]]]:
    """(row, payload) of every file, in lists that stay small in memory."""
    chunk: list[tuple[int, Payload]] = []
    size = 0
    try:
        for name, payload in source.stream(set(row_of)):
            chunk.append((row_of[name], payload))
            size += len(payload) if isinstance(payload, bytes) else 0
            if len(chunk) == CHUNK or size > CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    except DAMAGE as error:
        raise UserError(
            f"{source.description} cannot be read to its end ({error}): fetch it again"
        ) from error
    if chunk:
        yield chunk


def decode_chunk(
    config: PrepareConfig, images_path: Path, chunk: list[tuple[int, Payload]]
) -> tuple[dict[int, int], dict[int, str]]:
    """Decode (row, payload) into the rows of the array file: {row: 1, or 2 where enlarged}, {row: why it is bad}."""
    marks: dict[int, int] = {}
    images, bad = [], {}
    for row, payload in chunk:
        try:
            if isinstance(payload, np.ndarray):
                image, enlarged = payload, False
            else:
                picture = decode(payload, config.min_side, config.max_pixels)
                image = np.asarray(fit(picture, config.px, config.resample))
                enlarged = min(picture.size) < config.px
        except Exception as error:  # Pillow's plugins raise almost anything at damaged files
            bad[row] = reason(error)
        else:
            images.append(image)
            marks[row] = 2 if enlarged else 1
    write_rows(images_path, config.px, list(marks), images)
    return marks, bad


def _statistics(
    config: PrepareConfig, images_path: Path, labels: np.ndarray, crew: Crew
) -> tuple[np.ndarray, dict[str, Any]]:
    """Mean image (px, px, 3), and the manifest's channel mean and covariance in units of 0..255.

    covariance[a][b] = mean of x_a x_b over all pixels - mean of x_a * mean of x_b
    """
    train, _ = holdout_split(labels, config.holdout_fraction, config.holdout_seed)
    starts = (train[at : at + STATISTICS_CHUNK] for at in range(0, len(train), STATISTICS_CHUNK))
    total, products = np.zeros((config.px, config.px, 3)), np.zeros((3, 3))
    for sums, moments in crew.map(partial(_sums, images_path), starts):
        total, products = total + sums, products + moments
    mean = total / len(train)
    channel = mean.mean((0, 1))
    covariance = products / (len(train) * config.px**2) - np.outer(channel, channel)
    return mean.astype(np.float32), {
        "holdout": {"fraction": config.holdout_fraction, "seed": config.holdout_seed},
        "channel_mean": channel.tolist(),
        "covariance": covariance.tolist(),
    }


def _sums(images_path: Path, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the images, sum over pixels of x x'): integers, exact in float64."""
    images = np.load(images_path, mmap_mode="r")[rows]
    pixels = images.reshape(-1, 3).astype(np.float64)
    return images.sum(0, dtype=np.float64), pixels.T @ pixels
