"""What a store promises: whole or absent, checked when opened, split the same way for ever."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alexnet.data import store as store_module
from alexnet.data.config import DataConfig
from alexnet.data.store import (
    StoreBuilder,
    holdout_split,
    open_store,
    partial_directory,
    write_manifest,
    write_rows,
)
from alexnet.errors import UserError

PX = 8


def publish(path: Path, n: int = 12, mean: bool = True):
    random = np.random.default_rng(0)
    building = StoreBuilder(path, n, PX, "plan")
    images = np.load(building.images_path, mmap_mode="r+")
    images[:] = random.integers(0, 256, images.shape)
    labels = np.arange(n) % 3
    manifest = {
        "name": path.parent.name,
        "split": path.name,
        "px": PX,
        "n": n,
        "classes": [{"wnid": f"n0000000{c}", "words": f"class {c}"} for c in range(3)],
        "holdout": {"fraction": 0.25, "seed": 3},
    }
    return building.publish(labels, manifest, images.mean(0) if mean else None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return publish(tmp_path / "pets" / "train").path


def test_an_opened_store_is_what_was_written(path: Path) -> None:
    store = open_store(path, verify=True, px=PX)
    assert store.images.shape == (12, PX, PX, 3)
    assert store.images.dtype == np.uint8
    assert not store.images.flags.writeable
    assert store.labels.tolist() == [0, 1, 2] * 4
    assert store.labels.dtype == np.int64
    assert store.px == PX
    assert store.classes[2] == {"wnid": "n00000002", "words": "class 2"}
    np.testing.assert_allclose(store.mean, np.asarray(store.images, dtype=np.float64).mean(0), rtol=1e-6)
    assert sorted(file.name for file in path.iterdir()) == [
        "images.npy", "labels.npy", "manifest.json", "mean.npy"]  # fmt: skip


def test_a_val_store_has_no_mean(tmp_path: Path) -> None:
    assert publish(tmp_path / "pets" / "val", mean=False).mean is None


def refused(path: Path, *words: str, **options) -> None:
    with pytest.raises(UserError) as error:
        open_store(path, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_missing_store_says_what_makes_it(tmp_path: Path) -> None:
    refused(tmp_path / "pets" / "train", "does not exist: make it with scripts/prepare_data.py")
    refused(tmp_path / "pets" / "train", "does not exist: do this", remedy="do this")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tiny_imagenet", "data=tiny_imagenet"),
        ("imagenette_few", "data=imagenette name=imagenette_few"),
        ("imagenet100", "data=imagenet path=<folder or archive> n_classes=100 name=imagenet100"),
        ("tiny_imagenet_20", "data=tiny_imagenet n_classes=20 name=tiny_imagenet_20"),
        ("synthetic_500", "data=synthetic name=synthetic_500"),
        ("pets", "data=folder path=<folder or archive> name=pets"),
    ],
)
def test_the_command_that_makes_a_store_follows_from_its_name(name: str, words: str) -> None:
    command = f"make it with `python scripts/prepare_data.py {words}"
    assert DataConfig(name, f"data/{name}").remedy() == f"{command}`"
    assert DataConfig(name, f"/else/{name}").remedy() == f"{command} data_dir=/else`"


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    partial_directory(tmp_path / "pets" / "train").mkdir(parents=True)
    refused(tmp_path / "pets" / "train", "unfinished", "prepare_data")


def test_a_store_of_another_size_is_refused(path: Path) -> None:
    refused(path, "8-pixel", "px=64", px=64)


def test_changed_labels_are_found_at_once(path: Path) -> None:
    labels = np.load(path / "labels.npy")
    labels[0] = 2
    np.save(path / "labels.npy", labels)
    refused(path, "labels.npy", "sha256", "delete", "prepare_data")


def test_a_changed_pixel_is_found_by_the_full_check_only(path: Path) -> None:
    images = np.load(path / "images.npy", mmap_mode="r+")
    images[7, 3, 2, 1] ^= 1
    images.flush()
    open_store(path)
    refused(path, "images.npy", "sha256", verify=True)


def test_a_cut_off_array_is_found_at_once(path: Path) -> None:
    with open(path / "images.npy", "r+b") as file:
        file.truncate(500)
    refused(path, "images.npy", "cannot be read")


def test_an_array_of_another_shape_is_found_at_once(path: Path) -> None:
    np.save(path / "mean.npy", np.zeros((PX, PX), dtype=np.float32))
    refused(path, "mean.npy", "float32(8, 8)")


def test_a_changed_mean_image_is_found_at_once(path: Path) -> None:
    mean = np.load(path / "mean.npy")
    mean[0, 0, 0] += 1
    np.save(path / "mean.npy", mean)
    refused(path, "mean.npy", "sha256")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "manifest.json is empty"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b"{\xff", "no JSON object in UTF-8"),
        (b"[" * 100_000, "no JSON object"),
        (b"{}", "format None"),
    ],
)
def test_a_manifest_of_another_shape_is_one_line(path: Path, content: bytes, words: str) -> None:
    (path / "manifest.json").write_bytes(content)
    refused(path, words, str(path / "manifest.json"))


@pytest.mark.parametrize("key", ["n", "px", "classes", "sha256"])
def test_a_manifest_that_lacks_a_key_is_one_line(path: Path, key: str) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"], manifest[key]
    write_manifest(path, manifest)
    refused(path, f"has no {key}")


def test_an_edited_manifest_is_found_at_once(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["holdout"]["fraction"] = 0.0
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, "manifest.json", "changed")
    (path / "manifest.json").write_text("{")
    refused(path, "manifest.json is no JSON object")


def test_a_store_of_another_format_is_refused(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"]
    write_manifest(path, {**manifest, "format": 99})
    refused(path, "format 99")


def test_holdout_is_the_same_share_of_every_class_and_never_empty_of_one() -> None:
    labels = np.repeat([0, 1, 2, 3], [40, 100, 2, 1])
    train, held = holdout_split(labels[::-1], 0.05, 0)
    assert np.bincount(labels[::-1][held], minlength=4).tolist() == [2, 5, 1, 0]
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(143))
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(held) > 0)
    assert train.dtype == held.dtype == np.int64


def test_holdout_depends_on_its_seed_and_on_nothing_else() -> None:
    labels = np.arange(80) % 4
    _, held = holdout_split(labels, 0.05, 0)
    assert held.tolist() == [29, 35, 44, 58]  # must never change: runs rely on it
    assert not np.array_equal(held, holdout_split(labels, 0.05, 1)[1])
    assert holdout_split(labels, 0.0, 0)[1].size == 0


def test_the_store_splits_by_its_manifest(path: Path) -> None:
    store = open_store(path)
    expected = holdout_split(store.labels, 0.25, 3)
    for ours, theirs in zip(store.holdout(), expected, strict=True):
        assert np.array_equal(ours, theirs)
    assert len(expected[1]) == 3


def test_an_unfinished_store_is_continued_only_under_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "train"
    StoreBuilder(path, 5, PX, "a").done[2] = 1
    assert StoreBuilder(path, 5, PX, "a").done.tolist() == [0, 0, 1, 0, 0]
    assert StoreBuilder(path, 5, PX, "b").done.tolist() == [0] * 5


GOOD = np.array([True, False, True, True, True, False, True, True, True, True])  # runs longer than their way


def numbered_builder(path: Path) -> StoreBuilder:
    """Rows filled with their own number; those that are not GOOD stay to be done."""
    building = StoreBuilder(path, len(GOOD), PX, "plan")
    images = [np.full((PX, PX, 3), row, dtype=np.uint8) for row in np.flatnonzero(GOOD)]
    write_rows(building.images_path, PX, np.flatnonzero(GOOD), images)
    building.done[GOOD] = 1
    return building


def test_compacting_keeps_the_good_rows_in_order_and_makes_no_copy(tmp_path: Path) -> None:
    building = numbered_builder(tmp_path / "train")
    building.compact(GOOD)
    images = np.load(building.images_path)
    assert images.shape == (8, PX, PX, 3)
    assert (images == np.flatnonzero(GOOD)[:, None, None, None]).all()
    expected = tmp_path / "expected.npy"
    np.save(expected, images)
    assert building.images_path.read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("moves", range(5))
def test_compacting_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch, moves: int) -> None:
    class Killed(Exception):
        pass

    def move(*arguments) -> None:
        real(*arguments)  # the block is in its place, but this is not on record yet
        calls.append(arguments)
        if len(calls) > moves:
            raise Killed

    real, calls = store_module._move, []
    building = numbered_builder(tmp_path / "train")
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(store_module, "_move", move)
        building.compact(GOOD)
    again = StoreBuilder(tmp_path / "train", len(GOOD), PX, "plan")
    assert again.compacting
    assert again.done.astype(bool).tolist() == GOOD.tolist()
    again.compact(GOOD)
    assert np.load(again.images_path)[:, 0, 0, 0].tolist() == np.flatnonzero(GOOD).tolist()


@pytest.mark.parametrize(
    "left", [("plan", "done.npy", "moved.npy"), ("done.npy", "moved.npy"), ("moved.npy",)]
)
def test_a_store_whose_scratch_files_a_kill_left_behind_is_whole(tmp_path: Path, monkeypatch, left) -> None:
    def killed(path: Path) -> None:
        raise InterruptedError

    with monkeypatch.context() as patch, contextlib.suppress(InterruptedError):
        patch.setattr(store_module, "remove_scratch", killed)
        publish(tmp_path / "train")
    for name in {*store_module.SCRATCH} - {*left}:
        (tmp_path / "train" / name).unlink(missing_ok=True)
    assert len(open_store(tmp_path / "train", verify=True)) == 12


def test_no_space_left_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"no space left.*data_dir"):
        StoreBuilder(tmp_path / "train", 100, PX, "plan")
    assert not (partial_directory(tmp_path / "train") / "images.npy").exists()
