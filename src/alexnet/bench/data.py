"""Suites `data` and `end_to_end`: from stored images to batches, and from images to steps.

The baseline is the usual pipeline: JPEG files, torchvision's ImageFolder and transforms, a DataLoader with two
workers. The files are generated: 256 pixels, quality 90, crops of 224.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from alexnet.bench import networks
from alexnet.bench.config import Benchmark
from alexnet.bench.timing import Contestant, Kind, Row, interleave
from alexnet.cli import plain
from alexnet.data.augment import Augment, AugmentConfig, statistics_of
from alexnet.data.config import DataConfig, Resident
from alexnet.data.module import Batch, EpochLoader, ImageData, Pixels
from alexnet.data.prepare import PrepareConfig, prepare
from alexnet.data.store import Store, open_store
from alexnet.data.synthetic import blocks
from alexnet.layers import Backend, Backends
from alexnet.optim import OptimConfig, Schedule
from alexnet.training.classifier import Classifier
from alexnet.training.metrics import MetricsFile

Epoch = Callable[[], Iterator[tuple[Tensor, Batch]]]
WORKERS = 2
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # torchvision's customary numbers


class Files:
    """The same images as a store and as a folder of JPEG files, in a temporary directory."""

    def __init__(self, directory: Path, images: int, px: int) -> None:
        self.px = px
        root = directory / "store"
        prepare(PrepareConfig(name="synthetic", root=str(root), px=px, n_train=images, n_val=10, workers=0))
        self.store: Store = open_store(root / "train")
        self.folder = directory / "jpeg"
        for label in range(10):
            (self.folder / str(label)).mkdir(parents=True)
        for first, pixels in blocks(images, px, seed=0, split=0):
            for i, image in enumerate(pixels, start=first):
                Image.fromarray(image).save(self.folder / str(i % 10) / f"{i}.jpg", quality=90)


class StoredImages(Dataset):
    """The store behind torch's own interface: one image at a time."""

    def __init__(self, store: Store, transform: Callable[[Tensor], Tensor]) -> None:
        self.store, self.transform = store, transform

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(np.array(self.store.images[i])).permute(2, 0, 1)
        return self.transform(image), int(self.store.labels[i])


def transforms(crop: int, from_file: bool) -> Any:
    first: list[Any] = [v2.PILToTensor()] if from_file else []
    random = [v2.RandomCrop(crop), v2.RandomHorizontalFlip()]
    return v2.Compose([*first, *random, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def jpeg_loader(files: Files, crop: int, batch: int) -> DataLoader:
    return loader(ImageFolder(str(files.folder), transforms(crop, from_file=True)), batch)


def loader(images: Dataset, batch: int) -> DataLoader:
    return DataLoader(images, batch, shuffle=True, num_workers=WORKERS, persistent_workers=True)


def our_batches(files: Files, crop: int, batch: int, resident: Resident) -> Epoch:
    """One epoch of augmented batches: crops, flips and colour as in the paper."""
    config = AugmentConfig(crop_px=crop)
    pixels = Pixels(files.store, torch.device("cpu"), resident)
    epochs = EpochLoader(pixels, torch.arange(len(files.store)), files.px, config, batch, seed=0)
    augment = Augment(config, files.px, statistics_of(files.store), in_one_pass=True)  # as under backend=fast

    def epoch() -> Iterator[tuple[Tensor, Batch]]:
        for taken in epochs:
            yield augment.from_crops(taken.images, taken.draws), taken

    return epoch


def drain(batches: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for _ in batches():
            pass

    return run


def data_rows(config: Benchmark) -> Iterator[Row]:
    images, crop, batch = (256 if config.quick else 1024), 224, config.batch_of()
    row = "images -> augmented batches, 256 -> 224"
    if config.only not in row:
        return
    with tempfile.TemporaryDirectory() as directory:
        files = Files(Path(directory), images, px=256)
        jpeg = jpeg_loader(files, crop, batch)
        stored = loader(StoredImages(files.store, transforms(crop, from_file=False)), batch)
        kinds = {
            "store, resident": (Kind.ours, our_batches(files, crop, batch, Resident.always)),
            "store, memory-mapped": (Kind.ours, our_batches(files, crop, batch, Resident.never)),
            "ImageFolder + DataLoader": (Kind.baseline, lambda: iter(jpeg)),
            "store in a plain DataLoader": (Kind.yardstick, lambda: iter(stored)),
        }
        contestants = [Contestant(name, kind, drain(batches)) for name, (kind, batches) in kinds.items()]
        rounds = config.interleaved_rounds
        yield from interleave("data", row, "float32", contestants, rounds, images)


def end_to_end_rows(config: Benchmark) -> Iterator[Row]:
    """An epoch of `mini` on 64-pixel images, and what Lightning adds to it."""
    model, dtype = "mini", config.dtypes[-1]
    batch = config.batch_of(model)
    images = batch * (4 if config.quick else 8)
    whole, trainer = f"epoch of mini, 64 -> 56, batch {batch}", f"the trainer, mini, batch {batch}"
    if config.only not in whole and config.only not in trainer:
        return
    with tempfile.TemporaryDirectory() as directory:
        files, rounds = Files(Path(directory), images, px=64), config.interleaved_rounds
        if config.only in whole:
            contestants = _epochs(files, model, batch, dtype)
            yield from interleave("end_to_end", whole, dtype, contestants, rounds, images)
        if config.only in trainer:
            # The same LightningModule in both, so that the difference is the trainer's alone.
            loop = Loop(files, model, batch, dtype)
            contestants = [
                Contestant("Lightning", Kind.ours, loop.lightning),
                Contestant("bare loop", Kind.baseline, loop.bare),
            ]
            trained = len(loop.data.split[0])  # without the holdout images
            yield from interleave("end_to_end", trainer, dtype, contestants, rounds, trained)


class Loop:
    """One epoch of our LightningModule, with and without a Trainer, timed from the end of the first step."""

    def __init__(self, files: Files, model: str, batch: int, dtype: str) -> None:
        data = DataConfig(root=str(files.store.path.parent), batch_size=batch, resident=Resident.always)
        augment = AugmentConfig(crop_px=networks.model_config(model).image_px)
        self.data = ImageData(data, augment)
        self.data.setup("fit")
        self.directory = files.folder
        self.classifier = Classifier(
            model=plain(networks.model_config(model)),
            augment=plain(augment),
            optim=plain(OptimConfig(lr=1e-6, schedule=Schedule.constant)),
            backend=Backends(default=Backend.fastest).resolve("cpu"),
            classes=[{"wnid": str(i), "words": str(i)} for i in range(networks.CLASSES)],
            px=files.px,
            seed=0,
            statistics=self.data.statistics,
            master_weights=dtype != "float32",
        )

    def bare(self) -> float:
        optimizer = self.classifier.make_optimizer()
        ends = []
        for i, batch in enumerate(self.data.train_dataloader()):
            loss = self.classifier.training_step(batch, i)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ends.append(time.perf_counter())
        return _per_epoch(ends)

    def lightning(self) -> float:
        ends: list[float] = []
        clock = LambdaCallback(on_train_batch_end=lambda *_: ends.append(time.perf_counter()))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            precision="32-true",
            max_epochs=1,
            callbacks=[MetricsFile(self.directory / "metrics.csv"), clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            use_distributed_sampler=False,
        )
        trainer.fit(self.classifier, self.data)
        return _per_epoch(ends)


def _per_epoch(ends: list[float]) -> float:
    return (ends[-1] - ends[0]) * len(ends) / (len(ends) - 1)


def _epochs(files: Files, model: str, batch: int, dtype: str) -> list[Contestant]:
    """Our network on the store and on one batch again and again; the stock network on JPEG files."""
    fed, fixed, read = (networks.task(model, batch, dtype, "cpu") for _ in range(3))
    stored = our_batches(files, fed.config.image_px, batch, Resident.always)
    jpeg = jpeg_loader(files, fed.config.image_px, batch)
    on_store, on_noise = networks.ours(fed, "fastest", own_input=True), networks.ours(fixed, "fastest")
    net = networks.stock_network(read.config)
    net = net if dtype == "float32" else networks.bfloat16_weights(net)
    on_jpeg = networks.stock_step(net, read, tuned=True, compiled=True, own_input=True)

    def bare_loop() -> None:
        for x, taken in stored():
            fed.images, fed.labels = x, taken.labels
            on_store.run()

    def steps_only() -> None:
        for _ in range(len(files.store) // batch):
            on_noise.run()

    def stock_loop() -> None:
        for read.images, read.labels in jpeg:
            on_jpeg()

    return [
        Contestant("store, bare loop", Kind.ours, bare_loop),
        Contestant("the same without data", Kind.yardstick, steps_only),
        Contestant("JPEG, stock compiled", Kind.baseline, stock_loop),
    ]
