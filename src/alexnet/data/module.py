"""Batches: from the store to the device, in an order that depends on (seed, epoch) and on nothing else.

    order of the epoch   one permutation of the training images, drawn from (seed, epoch)
    batch b              images order[b B .. (b+1) B); device r of W takes its r-th part
    draws                the rows of the epoch's table (augment.py) at the same positions

So the batches are the same for any number of devices that divides them (of the epoch's last batch what is left over is
dropped), on any machine, and after any resume: `EpochLoader.state_dict` is two numbers.

The images reach the device in one of two ways, with equal results:

    resident   the whole store lives on the device as uint8 and a batch is one gather
    streamed   the store stays a memory-mapped file; `num_workers` threads read the next batches while this one trains

A thread cuts the crops of one batch straight from the file into one buffer. For a GPU the buffer is pinned memory and
the thread starts its copy to the device on a stream kept for copies; only the device waits for that copy. Labels and
draws go to the device once per epoch.

For crops of 224 of 256 pixels, 20,000 images/s need 3.9 GB/s from the disk (whole images) and 3.0 GB/s to the device.
"""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from alexnet.data.augment import (
    AugmentConfig,
    Draws,
    crop_starts,
    crops_at,
    draw_epoch,
    statistics_of,
    stream,
)
from alexnet.data.config import DataConfig, Resident, cores
from alexnet.data.store import Store, open_store
from alexnet.errors import UserError

MAX_WORKERS = 8  # reader threads by default, if there are as many cores
# Where Linux says how much memory a container or job may take (version 2 and 1 of its control groups).
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
SHARE = 0.4  # of a device's memory that a store may take when resident=auto

T = TypeVar("T")


class Batch(NamedTuple):
    """One device's part of a training batch."""

    images: Tensor  # (N, c, c, 3) uint8: the crops, which is all that is read of a stored image
    labels: Tensor  # (N,) int64
    draws: Draws
    first_row: int  # this part's first row in the batch of all devices; dropout masks are cut there


class EvalBatch(NamedTuple):
    """A batch of an evaluation: nothing is drawn."""

    images: Tensor  # (N, px, px, 3) uint8
    labels: Tensor  # (N,) int64
    rows: Tensor  # (N,) int64, which rows of the store these are


class Pixels:
    """The images and labels of a store, ready to be gathered: on `device` when resident, else read by threads.

    Args:
        copies: how many processes keep the store in the same memory (those of one machine, on the CPU).
        num_workers: reader threads of a streamed store; 0 chooses.

    Raises:
        UserError: the store does not fit on the device, or num_workers is negative.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        resident: Resident = Resident.auto,
        copies: int = 1,
        num_workers: int = 0,
    ) -> None:
        if num_workers < 0:
            raise UserError(
                f"data.num_workers={num_workers} must be a positive integer, or 0 for one thread per core"
            )
        self.device, self.num_workers = device, num_workers or min(cores(), MAX_WORKERS)
        self.resident = is_resident(store.images.nbytes * copies, device, resident)
        with warnings.catch_warnings():  # torch warns that the map is read-only; nothing writes to it
            warnings.simplefilter("ignore", UserWarning)
            self.images = torch.from_numpy(store.images)
        if self.resident:
            try:
                self.images = self.images.clone() if device.type == "cpu" else self.images.to(device)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                    raise
                raise UserError(
                    f"the store's {store.images.nbytes / 1e9:.2f} GB do not fit on {device}: set data.resident=never"
                ) from error
        self.labels = torch.from_numpy(np.array(store.labels, dtype=np.int64))  # on the CPU: see `send`
        streamed_to_gpu = device.type == "cuda" and not self.resident
        self.copy_stream = torch.cuda.Stream(device) if streamed_to_gpu else None

    def take(self, rows: Tensor) -> Tensor:
        """rows (N,) int64, where the images are -> images (N, px, px, 3) uint8."""
        return torch.index_select(self.images, 0, rows, out=self._buffer(len(rows), *self.images.shape[1:]))

    def take_crops(self, starts: Tensor, side: int) -> Tensor:
        """starts (N,) int64 as `crop_starts` makes them, where the images are -> crops (N, side, side, 3) uint8."""
        return crops_at(self.images, starts, side, out=self._buffer(len(starts), side, side, 3))

    def _buffer(self, *shape: int) -> Tensor:
        """Memory for a batch. Torch keeps pinned memory for reuse, and reuses it only after its copies have ended."""
        device = self.images.device
        return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=self.copy_stream is not None)

    def batches(self, take: Callable[[int], Tensor], numbers: Iterable[int]) -> Iterator[Tensor]:
        """take(b) for each b in order, on the device; taken ahead of time by threads if the images are streamed.

        For a GPU the threads also start the copies. The device waits for them where it needs them, the host never.
        """
        if self.resident:
            yield from map(take, numbers)
        elif (copies := self.copy_stream) is None:
            for images in ahead_of_time(take, numbers, self.num_workers):
                yield images.to(self.device)
        else:

            def take_and_send(number: int) -> tuple[Tensor, torch.cuda.Event]:
                with torch.cuda.stream(copies):
                    images = take(number).to(self.device, non_blocking=True)
                    return images, copies.record_event()

            for images, copied in ahead_of_time(take_and_send, numbers, self.num_workers):
                consumer = torch.cuda.current_stream(self.device)
                consumer.wait_event(copied)
                # Or its memory could be given to the next copy while it is in use.
                images.record_stream(consumer)
                yield images


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. To a GPU by pinned memory, so that the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def is_resident(size: int, device: torch.device, resident: Resident) -> bool:
    """Does a store of `size` bytes live on the device?"""
    if resident != Resident.auto:
        return resident == Resident.always
    if device.type == "cuda":
        return size < SHARE * torch.cuda.get_device_properties(device).total_memory
    memory = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file; "max"
            memory.append(int(Path(path).read_text()))
    return size < SHARE * min(memory)


def ahead_of_time(make: Callable[[int], T], numbers: Iterable[int], threads: int) -> Iterator[T]:
    """make(b) for each b, in order, made by threads at most threads + 1 ahead of the consumer.

    An error in a thread is raised here, in the place of its batch. The threads end with the iterator, even if it is
    abandoned.
    """
    # Torch keeps this number for each thread. Without it every reader would bring a team of threads of its own.
    pool = ThreadPoolExecutor(threads, "read-ahead", torch.set_num_threads, (1,))
    pending: deque[Future[T]] = deque()
    try:
        for number in numbers:
            pending.append(pool.submit(make, number))
            if len(pending) > threads + 1:
                yield pending.popleft().result()
        pool.shutdown(wait=False)  # all is asked for: threads may end before the last batch is consumed
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(eq=False)
class EpochLoader:
    """The training batches of one epoch after the other; in each, every image once.

    Lightning calls `sampler.set_epoch` before each epoch and keeps `state_dict` in its checkpoints. Iterating starts
    at the epoch's first batch, except once after `load_state_dict`, when it goes on where the state was taken.

    Raises:
        UserError: the devices do not divide the batch, or there is no batch.
    """

    pixels: Pixels
    rows: Tensor  # (n,) int64, the rows of the store that are trained on
    px: int  # side of the stored images
    augment: AugmentConfig
    batch_size: int  # images per step of all devices; a multiple of `world_size`
    seed: int
    drop_last: bool = False
    world_size: int = 1  # number of devices
    rank: int = 0  # which one this is

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, len(self.rows), self.drop_last, self.world_size)
        self.epoch, self.position, self._resumed = 0, 0, False

    @property
    def sampler(self) -> "EpochLoader":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.position, self._resumed = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """The epoch and the number of its batches already handed out."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position, self._resumed = state["epoch"], state["position"], True

    def __len__(self) -> int:
        """Batches per epoch. The last may be smaller: what is left, as far as all devices get the same number."""
        full, rest = divmod(len(self.rows), self.batch_size)
        return full + (not self.drop_last and rest >= self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Nothing happens before the first batch is asked for: Lightning makes iterators that it never uses."""
        first = self.position if self._resumed else 0
        self.position, self._resumed = first, False
        order = torch.randperm(len(self.rows), generator=stream(self.seed, self.epoch, "order"))
        rows, device = self.rows[order], self.pixels.device
        draws = draw_epoch(self.augment, order, self.px, self.seed, self.epoch)
        starts = send(crop_starts(rows, draws.top, draws.left, self.px, self.px), self.pixels.images.device)
        labels = send(self.pixels.labels[rows], device)
        draws = Draws(*(send(table, device) for table in draws))

        def take(number: int) -> Tensor:
            start, stop, _ = self._part(number)
            return self.pixels.take_crops(starts[start:stop], self.augment.crop_px)

        numbers = range(first, len(self))
        for number, images in zip(numbers, self.pixels.batches(take, numbers), strict=True):
            start, stop, first_row = self._part(number)
            self.position += 1
            yield Batch(images, labels[start:stop], draws.rows(start, stop), first_row)

    def _part(self, number: int) -> tuple[int, int, int]:
        """This device's positions [start, stop) in the order, and its first row in the batch of all devices."""
        begin = number * self.batch_size
        size = min(self.batch_size, len(self.rows) - begin) // self.world_size
        first_row = self.rank * size
        return begin + first_row, begin + first_row + size, first_row


def check_batch_size(batch_size: int, n: int, drop_last: bool, world_size: int) -> None:
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"data.batch_size={batch_size} is all devices together and {world_size} devices do not divide it: "
            f"use a multiple of {world_size}, or set trainer.devices to a divisor"
        )
    if n < (batch_size if drop_last else world_size):
        raise UserError(
            f"data.batch_size={batch_size} leaves no batch of the {n} training images: "
            "lower it, or set data.drop_last=false"
        )


class EvalLoader:
    """The images `rows` of a store in the order given, each exactly once over all devices.

    Device r of W takes the r-th of W consecutive parts, which differ in length by at most one image.
    """

    def __init__(
        self, pixels: Pixels, rows: Tensor, batch_size: int, world_size: int = 1, rank: int = 0
    ) -> None:
        if batch_size < 1:
            raise UserError(f"data.eval_batch_size={batch_size} must be a positive integer")
        n = len(rows)
        self.pixels, self.batch_size = pixels, batch_size
        self.rows = rows[n * rank // world_size : n * (rank + 1) // world_size]

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[EvalBatch]:
        pixels = self.pixels
        to_read = send(self.rows, pixels.images.device).split(self.batch_size)
        rows = send(self.rows, pixels.device).split(self.batch_size)
        labels = send(pixels.labels[self.rows], pixels.device).split(self.batch_size)
        images = pixels.batches(lambda number: pixels.take(to_read[number]), range(len(self)))
        for number, taken in enumerate(images):
            yield EvalBatch(taken, labels[number], rows[number])


class ImageData(LightningDataModule):
    """The three splits of a data set: `train` and `holdout` from its train store, `val` from its val store.

    For Lightning, `fit` and `validate` see train and holdout, `test` sees val; training never opens val.
    Without a trainer the loaders are for one process on the CPU. Stores open when first used (UserError if they
    are missing or damaged).
    """

    def __init__(self, config: DataConfig, augment: AugmentConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, self.augment, self.seed = config, augment, seed
        self._pixels: dict[tuple[str, torch.device], Pixels] = {}

    @cached_property
    def train_store(self) -> Store:
        return open_store(Path(self.config.root) / "train", remedy=self.config.remedy())

    @cached_property
    def val_store(self) -> Store:
        return open_store(Path(self.config.root) / "val", remedy=self.config.remedy())

    @cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """Rows of the train store in train and in holdout, each sorted."""
        train, holdout = self.train_store.holdout()
        return torch.from_numpy(train), torch.from_numpy(holdout)

    @property
    def px(self) -> int:
        return self.train_store.px

    @property
    def classes(self) -> list[dict[str, str]]:
        """wnid and words of each label."""
        return self.train_store.classes

    @property
    def resample(self) -> str:
        """How the stored images were made smaller: a key of `data.prepare.Resample`."""
        return self.train_store.manifest["rule"]["resample"]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """The mean image, channel means and covariance of the training images, for `Augment`."""
        return statistics_of(self.train_store)

    def setup(self, stage: str) -> None:
        """Open the store of the stage and check that the crop fits, so that mistakes show before training."""
        self.augment.margin(self.val_store.px if stage == "test" else self.px)

    def train_dataloader(self) -> EpochLoader:
        world_size, rank, device = self._place()
        pixels, place = self.pixels("train", device), (self.config.drop_last, world_size, rank)
        rows, batch_size = self.split[0], self.config.batch_size
        return EpochLoader(pixels, rows, self.px, self.augment, batch_size, self.seed, *place)

    def val_dataloader(self) -> EvalLoader:
        return self.eval_loader("holdout")

    def test_dataloader(self) -> EvalLoader:
        return self.eval_loader("val")

    def eval_loader(self, split: str) -> EvalLoader:
        """The images of `train`, `holdout` or `val`, in the order of their store."""
        world_size, rank, device = self._place()
        if split == "val":
            pixels, rows = self.pixels("val", device), torch.arange(len(self.val_store))
        elif split in ("train", "holdout"):
            pixels, rows = self.pixels("train", device), self.split[split == "holdout"]
        else:
            raise UserError(f"split={split} must be one of train, holdout, val")
        return EvalLoader(pixels, rows, self.config.eval_batch_size, world_size, rank)

    def pixels(self, store: str, device: torch.device) -> Pixels:
        """The images of the store `train` or `val`, placed once for all loaders on this device."""
        key = store, device
        if key not in self._pixels:
            opened = self.val_store if store == "val" else self.train_store
            copies = self._place()[0] if device.type == "cpu" else 1
            self._pixels[key] = Pixels(opened, device, self.config.resident, copies, self.config.num_workers)
        return self._pixels[key]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The loaders hand batches out on the device already."""
        return batch

    def teardown(self, stage: str) -> None:
        self._pixels.clear()

    def _place(self) -> tuple[int, int, torch.device]:
        """(world size, rank, device) of this process."""
        if self.trainer is None:
            return 1, 0, torch.device("cpu")
        return self.trainer.world_size, self.trainer.global_rank, self.trainer.strategy.root_device
