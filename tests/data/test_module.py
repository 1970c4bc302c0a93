"""Batches: the same for any way of reading, any number of devices, and after any resume."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from alexnet.data import module
from alexnet.data.augment import Augment, AugmentConfig
from alexnet.data.config import DataConfig, Resident
from alexnet.data.module import (
    MAX_WORKERS,
    Batch,
    EpochLoader,
    EvalBatch,
    EvalLoader,
    ImageData,
    Pixels,
    ahead_of_time,
    is_resident,
)
from alexnet.data.store import FORMAT, Store, sha256, write_manifest
from alexnet.errors import UserError

PX, CLASSES = 6, 4
CPU = torch.device("cpu")
AUGMENT = AugmentConfig(crop_px=4)
NO_GPU_NEEDED = pytest.mark.filterwarnings("ignore:GPU available but not used")


def write_store(path: Path, n: int, with_mean: bool) -> None:
    """n images; the first two bytes of each pixel say which row it is."""
    path.mkdir(parents=True)
    images = np.random.default_rng(n).integers(0, 256, (n, PX, PX, 3), dtype=np.uint8)
    number = np.arange(n)[:, None, None]
    images[..., 0], images[..., 1] = number % 256, number // 256
    arrays: dict[str, np.ndarray] = {
        "images.npy": images,
        "labels.npy": np.arange(n, dtype=np.int64) % CLASSES,
    }
    if with_mean:
        arrays["mean.npy"] = images.mean(0).astype(np.float32)
    for name, array in arrays.items():
        np.save(path / name, array)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": "toy",
        "split": path.name,
        "px": PX,
        "n": n,
        "classes": [{"wnid": f"n{i}", "words": f"thing {i}"} for i in range(CLASSES)],
        "sha256": {name: sha256(path / name) for name in arrays},
    }
    if with_mean:
        flat = images.reshape(-1, 3).astype(np.float64)
        manifest |= {"channel_mean": flat.mean(0).tolist(), "covariance": np.cov(flat.T).tolist()}
        manifest["holdout"] = {"fraction": 0.1, "seed": 0}
    write_manifest(path, manifest)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    write_store(root / "train", 80, with_mean=True)
    write_store(root / "val", 30, with_mean=False)
    return root


@pytest.fixture
def data(root: Path) -> ImageData:
    return ImageData(DataConfig("toy", str(root), batch_size=8, eval_batch_size=7), AUGMENT, seed=3)


def loader_of(
    data: ImageData, resident: Resident = Resident.always, num_workers: int = 1, **fields: Any
) -> EpochLoader:
    pixels = Pixels(data.train_store, CPU, resident, num_workers=num_workers)
    arguments = {"batch_size": 8, "seed": 3} | fields
    return EpochLoader(pixels, data.split[0], PX, AUGMENT, **arguments)


def rows_of(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0].long() + 256 * images[:, 0, 0, 1].long()).tolist()


def tensors_of(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, *batch.draws]


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, tensors_of(a), tensors_of(b)))
        assert a.first_row == b.first_row


# One epoch ------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_training_image_once(data: ImageData) -> None:
    loader = loader_of(data)
    batches = list(loader)
    visited = [row for batch in batches for row in rows_of(batch.images)]
    assert visited != sorted(visited)
    assert sorted(visited) == data.split[0].tolist()
    assert [len(batch.labels) for batch in batches] == [8] * 9
    for batch in batches:
        assert (batch.labels == torch.tensor(rows_of(batch.images)) % CLASSES).all()


@pytest.mark.parametrize("resident", [Resident.always, Resident.never])
def test_the_loader_cuts_what_augment_would_have_cut(data: ImageData, resident: Resident) -> None:
    augment = Augment(AUGMENT, PX, data.statistics)
    for batch in loader_of(data, resident):
        assert batch.images.shape[1] == AUGMENT.crop_px < PX
        whole = torch.from_numpy(np.array(data.train_store.images))[rows_of(batch.images)]
        assert torch.equal(augment.from_crops(batch.images, batch.draws), augment(whole, batch.draws))


def test_seed_and_epoch_decide_the_batches(data: ImageData) -> None:
    first, again, other = loader_of(data), loader_of(data), loader_of(data, seed=4)
    assert_same(list(first), list(again))
    zero = [rows_of(batch.images) for batch in first]
    assert zero != [rows_of(batch.images) for batch in other]
    first.set_epoch(1)
    assert zero != [rows_of(batch.images) for batch in first]
    first.set_epoch(0)
    assert zero == [rows_of(batch.images) for batch in first]


def test_an_images_draws_do_not_depend_on_the_batch_size(data: ImageData) -> None:
    def draws(batch_size: int) -> dict[int, list[float]]:
        batches = list(loader_of(data, batch_size=batch_size))
        rows = [row for batch in batches for row in rows_of(batch.images)]
        return dict(zip(rows, torch.cat([batch.draws.colour for batch in batches]).tolist(), strict=True))

    assert draws(8) == draws(12)


@pytest.mark.parametrize(
    ("batch_size", "drop_last", "world_size", "sizes"),
    [
        (10, False, 1, [10] * 7 + [2]),
        (10, True, 1, [10] * 7),
        (20, False, 5, [4] * 3 + [2]),
        (70, False, 5, [14]),  # two images are left, which five devices cannot share
        (28, False, 7, [4, 4, 2]),  # sixteen are left, of which seven devices share fourteen
    ],
)
def test_length_and_the_last_batch(
    data: ImageData, batch_size: int, drop_last: bool, world_size: int, sizes: list[int]
) -> None:
    loader = loader_of(data, batch_size=batch_size, drop_last=drop_last, world_size=world_size)
    assert [len(batch.labels) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("world_size", [2, 4])
def test_parts_of_the_devices_make_the_whole_batch(data: ImageData, world_size: int) -> None:
    parts = [list(loader_of(data, world_size=world_size, rank=rank)) for rank in range(world_size)]
    for number, whole in enumerate(loader_of(data)):
        pieces = [part[number] for part in parts]
        for name in ("images", "labels"):
            assert torch.equal(torch.cat([getattr(p, name) for p in pieces]), getattr(whole, name))
        assert torch.equal(torch.cat([p.draws.colour for p in pieces]), whole.draws.colour)
        assert [p.first_row for p in pieces] == list(range(0, 8, 8 // world_size))


# Resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [Resident.always, Resident.never])
@pytest.mark.parametrize("taken", [1, 4, 9])
def test_a_state_taken_in_mid_epoch_continues_exactly(
    data: ImageData, taken: int, resident: Resident
) -> None:
    loader = loader_of(data, resident)
    loader.set_epoch(2)
    whole = list(loader)
    running = iter(loader)
    for _ in range(taken):
        next(running)
    resumed = loader_of(data, resident)
    resumed.load_state_dict(loader.state_dict())
    iter(resumed)  # Lightning makes an iterator to see whether it can, and drops it
    resumed.set_epoch(2)
    assert_same(list(resumed), whole[taken:])
    assert_same(list(resumed), whole)  # and the next pass starts at the front


class Recorder(pl.LightningModule):
    """Writes down which images each step saw; its one weight makes it a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[int], list[float]]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, rows_of(batch.images), batch.draws.colour[:, 0].tolist()))
        return self.weight * 1.0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(rows_of(batch.images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(
    data: ImageData, keep: Path | None = None, resume: Path | None = None, max_epochs: int = 3
) -> Recorder:
    """Train, with a checkpoint in `keep` after every step and every epoch."""
    model = Recorder()
    every: list[pl.Callback] = [
        ModelCheckpoint(keep, "{step}-step", save_top_k=-1, every_n_train_steps=1),
        ModelCheckpoint(keep, "{step}-epoch", save_top_k=-1, save_on_train_epoch_end=True),
    ]
    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=max_epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=every,
    ).fit(model, data, ckpt_path=resume, weights_only=True)
    return model


@NO_GPU_NEEDED
@pytest.mark.filterwarnings("ignore:Checkpoint directory")  # it is not empty: there lies what we resume from
def test_lightning_resumes_from_every_checkpoint_exactly(root: Path, tmp_path: Path) -> None:
    """After each step, the last of an epoch included, and after each epoch: the same images and draws follow."""
    data = ImageData(DataConfig("toy", str(root), batch_size=24), AUGMENT, seed=3)
    whole = fit(data, tmp_path).seen
    assert [epoch for epoch, _, _ in whole] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert whole[0][1] != whole[3][1] != whole[6][1]
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 9 + 3
    for checkpoint in checkpoints:
        done = torch.load(checkpoint, weights_only=True)["global_step"]
        assert fit(data, tmp_path, checkpoint).seen == whole[done:], checkpoint.name


# Reading --------------------------------------------------------------------------------------------------


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_streamed_batches_equal_resident_ones(data: ImageData, num_workers: int) -> None:
    """The last, smaller batch included."""
    streamed = loader_of(data, Resident.never, num_workers, batch_size=10)
    assert_same(list(streamed), list(loader_of(data, batch_size=10)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_streamed_to_a_gpu_equal_those_of_the_cpu(data: ImageData) -> None:
    """Through pinned memory that is used again: four epochs allocate no more of it than the first."""
    streamed = EpochLoader(
        Pixels(data.train_store, torch.device("cuda", 0), Resident.never, num_workers=3),
        *(data.split[0], PX, AUGMENT),
        batch_size=10,
        seed=3,
    )
    for epoch in range(4):
        expected = loader_of(data, batch_size=10)
        expected.set_epoch(epoch)
        streamed.set_epoch(epoch)
        batches = list(streamed)
        assert {tensor.device.type for batch in batches for tensor in tensors_of(batch)} == {"cuda"}
        on_cpu = [
            Batch(batch.images.cpu(), batch.labels.cpu(), batch.draws.to("cpu"), batch.first_row)
            for batch in batches
        ]
        assert_same(on_cpu, list(expected))
        if epoch == 0:
            allocated = torch.cuda.host_memory_stats()["num_host_alloc"]
    assert torch.cuda.host_memory_stats()["num_host_alloc"] <= allocated + 3
    assert not readers()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_streamed_evaluation_equals_resident(data: ImageData, num_workers: int) -> None:
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(0))

    def batches(resident: Resident) -> list[EvalBatch]:
        return list(EvalLoader(Pixels(data.val_store, CPU, resident, num_workers=num_workers), rows, 7))

    streamed, resident = batches(Resident.never), batches(Resident.always)
    assert torch.cat([batch.rows for batch in streamed]).equal(rows)
    for ours, theirs in zip(streamed, resident, strict=True):
        assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_streaming_reads_ahead_in_threads_that_end(data: ImageData, num_workers: int) -> None:
    for _ in loader_of(data, Resident.never, num_workers):
        assert 1 <= len(readers()) <= num_workers  # a reader that is idle already is taken again
        break  # an abandoned epoch
    assert not readers()
    list(loader_of(data, Resident.never, num_workers))
    assert not readers()


def test_reading_stays_a_little_ahead_and_stops_when_abandoned() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        return number

    for threads in (1, 3):
        made.clear()
        numbers = ahead_of_time(make, range(100), threads)
        assert [next(numbers), next(numbers)] == [0, 1]
        assert isinstance(numbers, Iterator)
        numbers.close()  # type: ignore[attr-defined]
        assert len(made) <= 2 + threads + 1
        assert not readers()


def test_threads_read_at_the_same_time_and_keep_the_order() -> None:
    """Batch 0 is finished only after batch 1 has been: one thread alone would wait for ever."""
    later = threading.Event()

    def make(number: int) -> int:
        assert number != 0 or later.wait(timeout=60)
        if number == 1:
            later.set()
        return number

    assert list(ahead_of_time(make, range(4), 2)) == [0, 1, 2, 3]


def test_readers_bring_no_threads_of_torch_and_take_none_away() -> None:
    ours = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert list(ahead_of_time(lambda number: torch.get_num_threads(), range(4), 2)) == [1] * 4
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(ours)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_failing_read_reaches_the_training_loop(threads: int) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise OSError("disk gone")
        return number

    numbers = ahead_of_time(make, range(5), threads)
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(OSError, match="disk gone"):
        next(numbers)
    assert not readers()


def test_the_number_of_readers_is_the_users_or_one_per_core(data: ImageData) -> None:
    assert Pixels(data.val_store, CPU, num_workers=7).num_workers == 7
    assert 1 <= Pixels(data.val_store, CPU).num_workers <= MAX_WORKERS
    with pytest.raises(UserError, match=r"data\.num_workers=-1 must be a positive integer, or 0"):
        Pixels(data.val_store, CPU, num_workers=-1)


def test_num_workers_of_the_configuration_reaches_the_loaders(root: Path) -> None:
    config = DataConfig("toy", str(root), resident=Resident.never, num_workers=3)
    data = ImageData(config, AUGMENT)
    assert data.train_dataloader().pixels.num_workers == data.test_dataloader().pixels.num_workers == 3


def test_resident_is_the_users_word_or_a_share_of_the_memory() -> None:
    assert is_resident(10**6, CPU, Resident.auto)
    assert not is_resident(10**16, CPU, Resident.auto)
    assert is_resident(10**16, CPU, Resident.always)
    assert not is_resident(1, CPU, Resident.never)


def test_the_memory_of_a_job_is_its_limit_and_not_the_machine_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000000\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, memory in (("none", machine), ("limit", 1_000_000)):
        monkeypatch.setattr(module, "CGROUP_LIMITS", [tmp_path / limit, tmp_path / "max"])
        assert is_resident(int(module.SHARE * memory) - 1, CPU, Resident.auto)
        assert not is_resident(int(module.SHARE * memory) + 1, CPU, Resident.auto)


def test_a_store_that_cannot_be_copied_is_an_error_with_a_remedy() -> None:
    images = np.broadcast_to(np.zeros((), dtype=np.uint8), (2**50, 1, 1, 3))
    store = Store(Path("huge"), images, np.zeros(1), {}, None)
    with pytest.raises(UserError, match=r"do not fit on cpu: set data.resident=never"):
        Pixels(store, CPU, Resident.always)


# Evaluation and the splits --------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_sees_every_image_once_over_all_devices(data: ImageData, world_size: int) -> None:
    pixels = Pixels(data.val_store, CPU)
    loaders = [EvalLoader(pixels, torch.arange(30), 7, world_size, rank) for rank in range(world_size)]
    batches = [batch for loader in loaders for batch in loader]
    assert [row for batch in batches for row in rows_of(batch.images)] == list(range(30))
    assert torch.cat([batch.rows for batch in batches]).tolist() == list(range(30))
    assert (torch.cat([batch.labels for batch in batches]) == torch.arange(30) % CLASSES).all()
    assert sum(map(len, loaders)) == len(batches)


def test_splits_are_train_holdout_and_val(data: ImageData) -> None:
    def rows(split: str) -> list[int]:
        return torch.cat([batch.rows for batch in data.eval_loader(split)]).tolist()

    assert len(rows("holdout")) == 8
    assert sorted(rows("train") + rows("holdout")) == list(range(80))
    assert rows("val") == list(range(30))
    with pytest.raises(UserError, match="split=test must be one of train, holdout, val"):
        data.eval_loader("test")


@NO_GPU_NEEDED
def test_training_validates_on_holdout_and_never_opens_val(
    data: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: ImageData) -> Store:
        raise AssertionError("training opened val")

    monkeypatch.setattr(ImageData, "val_store", property(refuse))
    model = fit(data, tmp_path, max_epochs=1)
    assert sorted(row for rows in model.validated for row in rows) == data.split[1].tolist()


def test_evaluation_needs_only_the_val_store(root: Path, tmp_path: Path) -> None:
    (tmp_path / "val").symlink_to(root / "val")
    data = ImageData(DataConfig("toy", str(tmp_path)), AUGMENT)
    data.setup("test")
    assert sum(len(batch.labels) for batch in data.test_dataloader()) == 30


# Errors ---------------------------------------------------------------------------------------------------


def test_a_batch_the_devices_do_not_divide_is_refused(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=8 .* 3 devices .* multiple of 3"):
        loader_of(data, world_size=3)


def test_a_batch_larger_than_the_data_is_refused_when_the_last_is_dropped(data: ImageData) -> None:
    with pytest.raises(UserError, match=r"data\.batch_size=100 .* 72 training images"):
        loader_of(data, batch_size=100, drop_last=True)
    assert [len(batch.labels) for batch in loader_of(data, batch_size=100)] == [72]


def test_a_crop_too_large_for_the_store_is_refused_before_training(root: Path) -> None:
    with pytest.raises(UserError, match=r"augment\.crop_px"):
        ImageData(DataConfig("toy", str(root)), AugmentConfig(crop_px=7)).setup("fit")
