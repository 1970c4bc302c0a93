"""What a store promises: whole or absent, checked when opened, split the same way for ever."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from alexnet.data.sources import SourceKind
from alexnet.data.store import (
    KNOWN,
    Partial,
    holdout_split,
    open_store,
    partial_directory,
    require_space,
    write_manifest,
)
from alexnet.errors import UserError

PX = 8


def publish(path: Path, n: int = 12, mean: bool = True):
    random = np.random.default_rng(0)
    building = Partial(path, n, PX, "plan")
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


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tiny_imagenet", "data=tiny_imagenet"),
        ("imagenette_few", "data=imagenette name=imagenette_few"),
        ("pets", "data=folder path=<folder or archive> name=pets"),
        ("2012", "data=folder path=<folder or archive> name=2012"),
    ],
)
def test_a_missing_store_names_the_command_that_makes_it(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(
        tmp_path / name / "train",
        "does not exist",
        f"`python scripts/prepare_data.py {command} data_dir={tmp_path}`",
    )
    monkeypatch.chdir(tmp_path)
    refused(Path("data") / name / "train", f"`python scripts/prepare_data.py {command}`")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("imagenet100", "data=imagenet path=<folder or archive> name=imagenet100 n_classes=100"),
        ("tiny_imagenet_20", "data=tiny_imagenet name=tiny_imagenet_20 n_classes=20"),
        ("synthetic_500", "data=synthetic name=synthetic_500 n_train=500"),
    ],
)
def test_a_missing_subset_names_the_command_that_makes_it(
    name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path("data") / name / "train", f"`python scripts/prepare_data.py {command}`")


def test_every_source_is_known_by_its_name() -> None:
    assert {*KNOWN, SourceKind.folder} == set(SourceKind)


def test_a_lost_split_is_made_again_as_the_other_one_was(tmp_path: Path) -> None:
    request = {
        "source": "folder",
        "px": 32,
        "n_classes": None,
        "classes": ["cats", "dogs"],
        "images_per_class": 7,
    }
    path = publish(tmp_path / "pets" / "val", mean=False).path
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["self"]
    write_manifest(path, {**manifest, "request": request})
    refused(path.with_name("train"), "name=pets", "px=32 images_per_class=7 'classes=[cats,dogs]'`")
    request["classes"] = [f"n{i}" for i in range(11)]
    write_manifest(path, {**manifest, "request": request})
    refused(path.with_name("train"), "class_file=<file with its 11 wnids>`")


def test_an_unfinished_store_says_so(tmp_path: Path) -> None:
    partial_directory(tmp_path / "pets" / "train").mkdir(parents=True)
    refused(tmp_path / "pets" / "train", "unfinished", "name=pets")


def test_a_store_of_another_size_is_refused(path: Path) -> None:
    refused(path, "8-pixel", "px=64", px=64)


def test_changed_labels_are_found_at_once(path: Path) -> None:
    labels = np.load(path / "labels.npy")
    labels[0] = 2
    np.save(path / "labels.npy", labels)
    refused(path, "labels.npy", "sha256", "delete", "name=pets")


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


def test_an_edited_manifest_is_found_at_once(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["holdout"]["fraction"] = 0.0
    (path / "manifest.json").write_text(json.dumps(manifest))
    refused(path, "manifest.json", "changed")
    (path / "manifest.json").write_text("{")
    refused(path, "not JSON")


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
    Partial(path, 5, PX, "a").done[2] = 1
    assert Partial(path, 5, PX, "a").done.tolist() == [0, 0, 1, 0, 0]
    assert Partial(path, 5, PX, "b").done.tolist() == [0] * 5


def test_closing_up_keeps_the_good_rows_in_order(tmp_path: Path) -> None:
    building = Partial(tmp_path / "train", 5, PX, "plan")
    np.load(building.images_path, mmap_mode="r+")[:] = np.arange(5, dtype=np.uint8)[:, None, None, None]
    building.done[:] = 1
    building.close_up(np.array([True, False, True, True, False]))
    images = np.load(building.images_path)
    assert images.shape == (3, PX, PX, 3)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3]
    assert Partial(tmp_path / "train", 5, PX, "plan").done.tolist() == [0] * 5  # begun anew: rows have moved


def test_no_space_left_is_said_before_anything_is_written(tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(UserError, match=r"no space left.*data_dir"):
        require_space(tmp_path, 2000)
    with pytest.raises(UserError, match="no space left"):
        Partial(tmp_path / "train", 100, PX, "plan")
    assert not (partial_directory(tmp_path / "train") / "images.npy").exists()
