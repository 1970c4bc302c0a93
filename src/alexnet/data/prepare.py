"""From a source to stores: decode once, in parallel, and never lose a finished row.

The rule of 2012 (section 2): scale so that the short side is `px`, keep the central px x px. Both happen in one
antialiased resampling of the central square, so that a panorama costs no more memory than a portrait. The paper
names no filter; the default is that of the author's later code (area average down, cubic up).

What each kind of picture becomes (8-bit RGB, always):

    RGB, YCbCr, LAB, HSV   converted
    grayscale, bilevel     three equal channels
    16-bit grayscale       divided by 257 and rounded (Pillow by itself would clip it to white)
    16-bit RGB             the high byte (Pillow's reading)
    CMYK                   Pillow's conversion, no colour profile; Adobe's inverted files are inverted back
    palette                its colours
    alpha of any kind      laid over white
    several frames         the first
    EXIF orientation       applied
    other colour profiles  ignored, as everybody does with ImageNet
    short side < px        enlarged (counted in the manifest)
    short side < min_side  a bad file
    floating point, truncated, empty, not a picture: a bad file

Bad files are all named, each with its reason. on_corrupt=fail then stops (the good rows are kept: mend the files or
say skip, and run again); on_corrupt=skip leaves them out and lists them in the manifest.

The mean image and the colour covariance are those of train without holdout. Their sums are sums of integers below
2^53 in float64, hence exact, and the same whatever the number of workers.
"""

import io
import logging
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import StrEnum
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from alexnet.data import sources, synthetic
from alexnet.data.config import DataConfig
from alexnet.data.sources import Payload, Source, SourceKind
from alexnet.data.store import Partial, Store, holdout_split, open_store, plan_hash
from alexnet.errors import UserError
from alexnet.system import locked

log = logging.getLogger(__name__)

CHUNK = 64  # images handed to a process at a time
STATISTICS_CHUNK = 256  # images summed at a time
FEW = 512  # below this many images, starting processes takes longer than decoding


class OnCorrupt(StrEnum):
    fail = "fail"
    skip = "skip"


class Resample(StrEnum):
    area = "area"  # area average down, cubic up
    bilinear = "bilinear"
    bicubic = "bicubic"
    lanczos = "lanczos"


FILTERS = {
    Resample.bilinear: Image.Resampling.BILINEAR,
    Resample.bicubic: Image.Resampling.BICUBIC,
    Resample.lanczos: Image.Resampling.LANCZOS,
}


@dataclass
class PrepareConfig:
    """What to prepare, and where. Every field is a key of `scripts/prepare_data.py`."""

    name: str = "synthetic"  # the store's name; messages and manifests carry it
    root: str = "data/synthetic"  # <data_dir>/<name>: train/ and val/ appear in it
    source: SourceKind = SourceKind.synthetic
    path: str | None = None  # archive or folder; null downloads tiny_imagenet, imagenette, imagewoof
    official: bool = True  # insist on the published checksum and counts
    words: str | None = None  # file of "wnid words" lines, when the source carries none
    px: int = 64  # short side, and side of the stored square
    resample: Resample = Resample.area
    min_side: int = 8  # an image with a shorter side is a bad file
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
        self.on_corrupt = OnCorrupt(self.on_corrupt)
        for key, least in (("px", 1), ("min_side", 1), ("n_train", 10), ("n_val", 1), ("workers", 0),
                           ("n_classes", 2), ("images_per_class", 1)):  # fmt: skip
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"{key}={value} is too small: give {least} or more")
        for key in ("val_fraction", "holdout_fraction"):
            if not 0 <= getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} is no share: give 0 or more, and less than 1")
        chosen = [key for key in ("classes", "class_file", "n_classes") if getattr(self, key) is not None]
        if len(chosen) > 1:
            raise UserError(f"{chosen[0]} and {chosen[1]} both choose the classes: set one of them to null")

    def request(self) -> dict[str, Any]:
        """The fields that decide what a store holds; two stores with equal requests are the same store."""
        left_out = {
            "name",
            "root",
            "path",
            "official",
            "words",
            "workers",
            "verify",
            "class_file",
            "n_train",
            "n_val",
        }
        names = [entry.name for entry in fields(PrepareConfig)]  # a script's own fields decide nothing
        values = {name: getattr(self, name) for name in names if name not in left_out}
        drawn = {"n_train": self.n_train, "n_val": self.n_val, "synthetic.VERSION": synthetic.VERSION}
        return (
            values
            | {"classes": wanted_classes(self)}
            | (drawn if self.source == SourceKind.synthetic else {})
        )


@dataclass
class PrepareData(PrepareConfig):
    """scripts/prepare_data.py: the fields of PrepareConfig, and the data set whose name they take."""

    data: DataConfig = field(default_factory=DataConfig)
    data_dir: str = "data"


class Prepared(NamedTuple):
    """One split: its store, whether this call wrote it, and how fast (0 where nothing was written)."""

    store: Store
    written: bool
    seconds: float
    images_per_second: float


class BadFile(NamedTuple):
    row: int
    name: str
    reason: str


class Decoded(NamedTuple):
    """What a process says about its chunk: the rows it wrote, how many it enlarged, and the bad files."""

    rows: list[int]
    enlarged: list[int]
    bad: list[BadFile]


# The verbs ------------------------------------------------------------------------------------------------


def prepare(config: PrepareConfig) -> list[Prepared]:
    """Make the stores that `config` asks for; what is already there is left alone.

    Raises:
        UserError: a source that is missing, damaged or of another layout; bad files with on_corrupt=fail; a store
            of another configuration in the same place; no space left.
    """
    root = Path(config.root)
    with _locked(root):
        finished = _finished(config, root)
        if finished is not None:
            log.info("%s is already prepared: nothing to do", root)
            return [Prepared(store, False, 0.0, 0.0) for store in finished]
        source = choose(config)
        splits = [split for split, items in source.splits.items() if items]
        with Crew(_workers(config, source)) as crew:
            return [_prepare_split(config, source, split, splits, crew) for split in splits]


def verify(config: PrepareConfig) -> list[Store]:
    """Open the stores and compare every hash; UserError says which file is damaged, or that there is none."""
    root = Path(config.root)
    train = open_store(root / "train", verify=True, px=config.px)
    others = [split for split in train.manifest["splits"] if split != "train"]
    return [train, *(open_store(root / split, verify=True, px=config.px) for split in others)]


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One process at a time per data set: others wait."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        (root / ".lock").touch()
    except OSError as error:
        raise UserError(
            f"root={root} cannot be written ({error.strerror}): set data_dir to a place that can"
        ) from error
    with locked(root, ".lock", wait=-1):
        yield


def _finished(config: PrepareConfig, root: Path) -> list[Store] | None:
    """The stores, when all are there; None when there is work to do; UserError when they are others."""
    if not (root / "train").is_dir():
        return None
    train = open_store(root / "train")
    _refuse_other_request(config, train)
    paths = [root / split for split in train.manifest["splits"]]
    return [open_store(path) for path in paths] if all(path.is_dir() for path in paths) else None


def _refuse_other_request(config: PrepareConfig, store: Store) -> None:
    there, asked = store.manifest["request"], config.request()
    if config.source == SourceKind.folder and config.path is not None:
        before, now = store.manifest["source"], sources.described(config.source, Path(config.path))
        if before != now:
            raise UserError(
                f"{store.path} was prepared from another place ({before}, not {now}): choose another name, or "
                f"delete {store.path.parent}"
            )
    for key in asked:
        if there.get(key) != asked[key]:
            raise UserError(
                f"{store.path} was prepared with {key}={there.get(key)}, not {key}={asked[key]}: "
                f"choose another name, or delete {store.path.parent}"
            )


def wanted_classes(config: PrepareConfig) -> list[str] | None:
    """The wnids that `classes` or `class_file` names, sorted; None means all, or `n_classes` of them."""
    if config.class_file is None:
        return None if config.classes is None else sorted(config.classes)
    file = Path(config.class_file)
    if not file.is_file():
        raise UserError(f"class_file={file} does not exist: give a file with one wnid per line")
    return sorted(line.split()[0] for line in file.read_text().splitlines() if line.strip())


def choose(config: PrepareConfig) -> Source:
    """The source with the subset that `config` asks for."""
    if config.source == SourceKind.synthetic:
        source = sources.synthetic_source(config.n_train, config.n_val, config.px, config.seed)
    else:
        source = sources.open_source(
            config.source,
            Path(config.path) if config.path else None,
            px=config.px,
            downloads=Path(config.root).parent / "downloads",
            official=config.official,
            words=Path(config.words) if config.words else None,
        )
    wanted = wanted_classes(config)
    if config.n_classes is not None:
        wanted = sources.draw_classes(source, config.n_classes, config.seed)
    if wanted is not None:
        source = sources.with_classes(source, wanted)
    if config.val_fraction > 0:
        source = sources.with_val_fraction(source, config.val_fraction, config.seed)
    if config.images_per_class is not None:
        source = sources.with_images_per_class(source, config.images_per_class, config.seed)
    return source


# Processes -----------------------------------------------------------------------------------------------


class Crew:
    """The processes of one call of `prepare`; with 0 workers all is done in this one."""

    def __init__(self, workers: int) -> None:
        # spawn: the parent has threads (the progress bar, torch), and forking a process with threads can hang it
        context = multiprocessing.get_context("spawn")
        self.workers = workers
        self.pool = ProcessPoolExecutor(workers, context, _end_with_parent) if workers else None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, job: Callable[[Any], Any], chunks: Iterator[Any]) -> Iterator[Any]:
        """`map(job, chunks)`, in any order, with few chunks under way (they hold the bytes of their images)."""
        if self.pool is None:
            yield from map(job, chunks)
            return
        try:
            with _without_script():
                pending = {self.pool.submit(job, chunk) for chunk in islice(chunks, 2 * self.workers + 2)}
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                pending |= {self.pool.submit(job, chunk) for chunk in islice(chunks, len(finished))}
                yield from (future.result() for future in finished)
        except BrokenProcessPool as error:
            raise UserError(
                f"a decoding process was killed (out of memory?): run again with workers={max(self.workers // 2, 1)}, "
                "finished images are kept"
            ) from error


@contextmanager
def _without_script() -> Iterator[None]:
    """A spawned process imports the script that started it, and with it torch and lightning: seconds, for nothing."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _end_with_parent() -> None:
    """In a decoding process: stop when the parent was killed; otherwise it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_exit_after, args=(parent,), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


# One split ------------------------------------------------------------------------------------------------


def _prepare_split(
    config: PrepareConfig, source: Source, split: str, splits: list[str], crew: Crew
) -> Prepared:
    path = Path(config.root) / split
    if path.is_dir():
        return Prepared(open_store(path), False, 0.0, 0.0)
    items = source.splits[split]
    names, labels = [item.name for item in items], np.array([item.label for item in items])
    plan = plan_hash(_rule(config), config.min_side, source.description, names=names, labels=labels)
    building = Partial(path, len(items), config.px, plan)
    started, already = time.perf_counter(), int(np.count_nonzero(building.done))
    bad = _decode_all(config, source, names, building, crew)
    seconds = time.perf_counter() - started
    _report_bad(config, bad, path)
    store = _publish(config, source, split, splits, building, bad, crew)
    return Prepared(store, True, seconds, (len(items) - already) / max(seconds, 1e-9))


def _publish(
    config: PrepareConfig,
    source: Source,
    split: str,
    splits: list[str],
    building: Partial,
    bad: list[BadFile],
    crew: Crew,
) -> Store:
    """Leave the bad rows out, add labels, statistics and manifest, and give the store its name."""
    keep = building.done > 0
    labels = _kept_labels(source, split, keep, building.path)
    building.close_up(keep)
    mean, statistics = _statistics(config, building, labels, crew) if split == "train" else (None, {})
    manifest = {
        "name": config.name,
        "split": split,
        "splits": splits,
        "px": config.px,
        "n": len(labels),
        "classes": source.classes,
        "counts": np.bincount(labels, minlength=len(source.classes)).tolist(),
        "source": source.description,
        "rule": _rule(config),
        "request": config.request(),
        "enlarged": int((building.done == 2).sum()),
        "corrupt": [file.name for file in bad],
    }
    return building.publish(labels, manifest | statistics, mean)


def _rule(config: PrepareConfig) -> dict[str, Any]:
    return {"short_side": config.px, "crop": "centre", "resample": str(config.resample)}


def _workers(config: PrepareConfig, source: Source) -> int:
    if config.workers is not None:
        return config.workers
    if config.source == SourceKind.synthetic or max(map(len, source.splits.values())) < FEW:
        return 0
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _decode_all(
    config: PrepareConfig, source: Source, names: list[str], building: Partial, crew: Crew
) -> list[BadFile]:
    """Fill the rows that are not done; returns the bad files in store order."""
    row_of = {names[row]: row for row in np.flatnonzero(building.done == 0)}
    job = partial(decode_chunk, building.images_path, config.px, config.resample, config.min_side)
    chunks = _chunks((row_of[name], name, payload) for name, payload in source.files.stream(set(row_of)))
    bad: list[BadFile] = []
    with _bar(building.path.name, len(names), len(names) - len(row_of)) as bar:
        for decoded in crew.map(job, chunks):
            building.done[decoded.rows] = 1
            building.done[decoded.enlarged] = 2
            bad += decoded.bad
            bar.update(len(decoded.rows) + len(decoded.bad))
    return sorted(bad)


def _bar(split: str, total: int, initial: int) -> tqdm:
    # a batch job's log gets a line every half minute, a terminal five updates a second
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(total=total, initial=initial, unit=" images", desc=split, mininterval=interval)


def _chunks(rows: Iterator[Any]) -> Iterator[list[Any]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _report_bad(config: PrepareConfig, bad: list[BadFile], path: Path) -> None:
    for file in bad:
        log.warning("bad file %s: %s", file.name, file.reason)
    if bad and config.on_corrupt == OnCorrupt.fail:
        named = "; ".join(f"{file.name}: {file.reason}" for file in bad[:5])
        more = f"; and {len(bad) - 5} more, see above" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} bad file(s) for {path} ({named}{more}): mend them, or leave them out with on_corrupt=skip, "
            "and run again; finished images are kept"
        )


def _kept_labels(source: Source, split: str, keep: np.ndarray, path: Path) -> np.ndarray:
    labels = np.array([item.label for item in source.splits[split]], dtype=np.int64)
    lost = np.setdiff1d(labels, labels[keep])
    if len(lost):
        wnid = source.classes[lost[0]]["wnid"]
        raise UserError(f"{path}: class {wnid} has no good image left; leave it out with classes")
    return labels[keep]


# One image ------------------------------------------------------------------------------------------------


def decode_chunk(
    images_path: Path, px: int, resample: Resample, min_side: int, chunk: list[tuple[int, str, Payload]]
) -> Decoded:
    """Decode some (row, name, payload) and write them into their rows of the array file."""
    images = np.load(images_path, mmap_mode="r+")
    decoded = Decoded([], [], [])
    for row, name, payload in chunk:
        try:
            picture = payload if isinstance(payload, np.ndarray) else decode(payload, min_side)
        except Exception as error:  # Pillow's plugins raise almost anything at damaged files
            decoded.bad.append(BadFile(row, name, _reason(error, payload)))
            continue
        if not isinstance(picture, np.ndarray):
            if min(picture.size) < px:
                decoded.enlarged.append(row)
            picture = np.asarray(fit(picture, px, resample))
        images[row] = picture
        decoded.rows.append(row)
    return decoded


def _reason(error: Exception, payload: Any) -> str:
    size = payload.stat().st_size if isinstance(payload, Path) and payload.exists() else len(payload or b"")
    if size == 0:
        return "empty file"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    return " ".join(str(error).split()) or type(error).__name__


def decode(payload: bytes | Path, min_side: int = 1) -> Image.Image:
    """An encoded picture -> 8-bit RGB, by the table above. Raises what Pillow raises, and ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ImageNet has files with odd EXIF blocks; their pixels are fine
        with Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload) as picture:
            if min(picture.size) < min_side:
                raise ValueError(f"{picture.size[0]}x{picture.size[1]} pixels, below min_side={min_side}")
            picture.load()
            return to_rgb(ImageOps.exif_transpose(picture))


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB. Raises ValueError for floating point and for integers above 16 bits."""
    if picture.mode.startswith(
        "I"
    ):  # I;16 and its byte orders, and I, in which older Pillow opens 16-bit PNG
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("integers of more than 16 bits")
        picture = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ValueError("floating-point picture")
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def fit(picture: Image.Image, px: int, resample: Resample) -> Image.Image:
    """Short side to `px`, central square: the two steps of 2012 in one resampling."""
    width, height = picture.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    if resample == Resample.area:
        kernel = Image.Resampling.BOX if side >= px else Image.Resampling.BICUBIC
    else:
        kernel = FILTERS[resample]
    return picture.resize((px, px), kernel, box=(left, top, left + side, top + side))


# Statistics of train --------------------------------------------------------------------------------------


def _statistics(
    config: PrepareConfig, building: Partial, labels: np.ndarray, crew: Crew
) -> tuple[np.ndarray, dict[str, Any]]:
    """Mean image (px, px, 3), and the manifest's channel mean and covariance in units of 0..255.

    covariance[a][b] = mean of x_a x_b over all pixels - mean of x_a * mean of x_b
    """
    train, _ = holdout_split(labels, config.holdout_fraction, config.holdout_seed)
    starts = (train[at : at + STATISTICS_CHUNK] for at in range(0, len(train), STATISTICS_CHUNK))
    total, products = np.zeros((config.px, config.px, 3)), np.zeros((3, 3))
    for sums, moments in crew.map(partial(_sums, building.images_path), starts):
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
