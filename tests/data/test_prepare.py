"""From files to stores: every kind of picture as decided, nothing lost by a kill, nothing done twice."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from test_sources import write_folder, write_tar

from alexnet.data import prepare as module
from alexnet.data.prepare import (
    Crew,
    OnCorrupt,
    PrepareConfig,
    Resample,
    decode,
    fit,
    prepare,
    to_rgb,
    verify,
)
from alexnet.data.sources import SourceKind
from alexnet.data.store import Store, open_store, partial_directory
from alexnet.errors import UserError


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour picture, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def image_set(n: int = 6, classes: tuple[str, ...] = ("cat", "dog"), val: int = 2) -> dict[str, bytes]:
    return {
        f"set/{split}/{name}/{k}.jpg": encoded(picture(100 * label + 10 * ("train", "val").index(split) + k))
        for split, count in (("train", n), ("val", val))
        for label, name in enumerate(classes)
        for k in range(count)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", image_set())


def config_for(images: Path, tmp_path: Path, **changes) -> PrepareConfig:
    root = str(tmp_path / "stores" / "pets")
    values = {
        "name": "pets",
        "root": root,
        "source": SourceKind.folder,
        "path": str(images),
        "px": 16,
        "workers": 0,
    }
    return PrepareConfig(**{**values, **changes})


def stores(config: PrepareConfig) -> list[Store]:
    return [prepared.store for prepared in prepare(config)]


def pixels(store: Store) -> np.ndarray:
    return np.array(store.images)


# Pictures -------------------------------------------------------------------------------------------------


def centre(data: bytes) -> list[int]:
    image = decode(data)
    assert image.mode == "RGB"
    return list(image.getpixel((image.width // 2, image.height // 2)))


FLAT: dict[str, tuple[Callable[[], bytes], list[int]]] = {
    "rgb": (lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)), "PNG"), [200, 30, 90]),
    "grayscale": (lambda: encoded(Image.new("L", (9, 9), 77), "PNG"), [77] * 3),
    "bilevel": (lambda: encoded(Image.new("1", (9, 9), 1), "PNG"), [255] * 3),
    "16-bit": (lambda: encoded(Image.fromarray(np.full((9, 9), 77 * 257 + 3, np.uint16)), "PNG"), [77] * 3),
    "32-bit": (lambda: encoded(Image.fromarray(np.full((9, 9), 30_000, np.int32)), "TIFF"), [117] * 3),
    "palette": (lambda: encoded(Image.new("RGB", (9, 9), (200, 30, 90)).quantize(4), "PNG"), [200, 30, 90]),
    "alpha": (lambda: encoded(Image.new("RGBA", (9, 9), (0, 100, 200, 0)), "PNG"), [255] * 3),
    "half alpha": (lambda: encoded(Image.new("LA", (9, 9), (0, 128)), "PNG"), [127] * 3),
    "transparent": (lambda: encoded(Image.new("L", (9, 9), 77), "PNG", transparency=77), [255] * 3),
    "cmyk": (lambda: encoded(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), "TIFF"), [0, 255, 255]),
    "lab": (lambda: encoded(Image.new("LAB", (9, 9), (255, 128, 128)), "TIFF"), [255, 255, 255]),
}


@pytest.mark.parametrize("kind", FLAT)
def test_every_kind_of_picture_becomes_the_colour_decided(kind: str) -> None:
    data, expected = FLAT[kind]
    np.testing.assert_allclose(centre(data()), expected, atol=2)


def test_a_cmyk_jpeg_has_its_colours() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    np.testing.assert_allclose(centre(data), [254, 0, 0], atol=3)


def test_a_rotated_photograph_is_put_upright() -> None:
    image = Image.new("RGB", (40, 20))
    ImageDraw.Draw(image).rectangle([0, 0, 19, 19], fill=(255, 0, 0))  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    upright = decode(encoded(image, "PNG", exif=exif))
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0)
    assert upright.getpixel((10, 35)) == (0, 0, 0)


def test_only_the_first_frame_counts() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    assert centre(encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])) == [255, 0, 0]


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", encoded(picture(0))[:-300], encoded(Image.new("F", (9, 9)), "TIFF"),
     encoded(Image.fromarray(np.full((9, 9), 70_000, np.int32)), "TIFF")],
    ids=["empty", "text", "truncated", "float", "wide"],
)  # fmt: skip
def test_what_is_no_whole_picture_raises(data: bytes) -> None:
    with pytest.raises((OSError, ValueError)):
        decode(data)


def test_a_picture_below_the_least_side_raises() -> None:
    data = encoded(picture(0, (40, 7)))
    with pytest.raises(ValueError, match="40x7 pixels, below min_side=8"):
        decode(data, min_side=8)
    assert decode(data, min_side=7).size == (40, 7)


@pytest.mark.parametrize("resample", Resample)
@pytest.mark.parametrize("size", [(80, 48), (48, 80), (64, 64), (20, 12)])
def test_fit_is_short_side_then_central_crop(resample: Resample, size: tuple[int, int]) -> None:
    # against the two steps, with sizes where the scaled long side and the crop's offset are whole numbers
    image, px = picture(5, size), 32 if max(size) == 64 else 24
    scale = px / min(size)
    whole = (round(size[0] * scale), round(size[1] * scale))
    kernel = module.FILTERS.get(resample, Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC)
    left, top = (whole[0] - px) // 2, (whole[1] - px) // 2
    expected = image.resize(whole, kernel).crop((left, top, left + px, top + px))
    difference = np.abs(np.asarray(fit(image, px, resample), int) - np.asarray(expected, int))
    assert difference.max() <= 2


def test_a_panorama_costs_no_memory() -> None:
    assert fit(Image.new("RGB", (60_000, 2)), 256, Resample.area).size == (256, 256)


def test_every_mode_of_pillow_is_converted_or_refused() -> None:
    for mode in (
        "1",
        "L",
        "P",
        "RGB",
        "RGBA",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "LA",
        "PA",
        "RGBX",
        "RGBa",
        "I;16",
    ):
        assert to_rgb(Image.new(mode, (4, 4))).mode == "RGB", mode
    with pytest.raises(ValueError, match="floating"):
        to_rgb(Image.new("F", (4, 4)))


# Stores ---------------------------------------------------------------------------------------------------


def test_a_folder_becomes_two_stores(folder: Path, tmp_path: Path) -> None:
    train, val = stores(config_for(folder, tmp_path))
    assert train.path == tmp_path / "stores" / "pets" / "train"
    assert train.labels.tolist() == [0] * 6 + [1] * 6
    assert val.labels.tolist() == [0] * 2 + [1] * 2
    expected = fit(picture(102), 16, Resample.area)
    assert np.abs(train.images[8].astype(int) - np.asarray(expected, int)).mean() < 4  # JPEG
    assert train.manifest["counts"] == [6, 6]
    assert train.manifest["classes"] == val.manifest["classes"] == [
        {"wnid": "cat", "words": "cat"}, {"wnid": "dog", "words": "dog"}]  # fmt: skip
    assert train.manifest["rule"] == {"short_side": 16, "crop": "centre", "resample": "area"}
    assert val.mean is None
    assert sorted(file.name for file in train.path.parent.iterdir()) == [".lock", "train", "val"]


def test_mean_and_covariance_are_those_of_train_without_holdout(folder: Path, tmp_path: Path) -> None:
    train, _ = stores(config_for(folder, tmp_path, holdout_fraction=0.34, holdout_seed=5))
    kept, held = train.holdout()
    assert len(held) == 4
    values = train.images[kept].astype(np.float64)
    np.testing.assert_allclose(train.mean, values.mean(0), rtol=1e-6)
    np.testing.assert_allclose(train.manifest["channel_mean"], values.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(
        train.manifest["covariance"], np.cov(values.reshape(-1, 3).T, bias=True), rtol=1e-9
    )


def test_an_archive_and_its_folder_give_the_same_arrays_with_any_number_of_workers(tmp_path: Path) -> None:
    files = image_set(40)
    folder, archive = write_folder(tmp_path / "source", files), write_tar(tmp_path / "x.tar.gz", files)
    first = stores(config_for(folder, tmp_path / "a"))
    second = stores(config_for(archive, tmp_path / "b", workers=2))
    for one, other in zip(first, second, strict=True):
        assert one.manifest["sha256"] == other.manifest["sha256"]
        assert one.manifest.get("covariance") == other.manifest.get("covariance")


def test_a_second_run_does_nothing_even_without_the_source(folder: Path, tmp_path: Path, caplog) -> None:
    config = config_for(folder, tmp_path)
    assert all(prepared.written for prepared in prepare(config))
    folder.rename(tmp_path / "gone")
    before = {file: file.stat().st_mtime_ns for file in Path(config.root).glob("*/*")}
    with caplog.at_level("INFO"):
        assert not any(prepared.written for prepared in prepare(config))
    assert "nothing to do" in caplog.text
    assert {file: file.stat().st_mtime_ns for file in Path(config.root).glob("*/*")} == before


def test_another_folder_under_the_same_name_is_refused(folder: Path, tmp_path: Path) -> None:
    """Nothing else in the configuration differs, and a folder that was moved is the same folder: its name decides."""
    config = config_for(folder, tmp_path)
    prepare(config)
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    assert not any(split.written for split in prepare(replace(config, path=str(moved))))
    other = shutil.copytree(folder, tmp_path / "others")
    with pytest.raises(
        UserError, match=r"was prepared from another place \(folder: .*, not folder: others\)"
    ):
        prepare(replace(config, path=str(other)))


@pytest.mark.parametrize(("key", "value"), [("px", 24), ("images_per_class", 3), ("holdout_fraction", 0.2)])
def test_another_configuration_in_the_same_place_is_refused(
    folder: Path, tmp_path: Path, key: str, value
) -> None:
    prepare(config_for(folder, tmp_path))
    with pytest.raises(UserError, match=f"{key}={value}.*choose another name"):
        prepare(config_for(folder, tmp_path, **{key: value}))


def test_the_request_holds_plain_values_and_only_what_decides_the_pixels(tmp_path: Path) -> None:
    @dataclass
    class Script(PrepareConfig):
        own: object = None

    config = config_for(tmp_path, tmp_path)
    script = Script(**{**vars(config), "own": object(), "workers": 3, "path": "elsewhere", "root": "x"})
    assert json.loads(json.dumps(script.request())) == config.request()


def test_a_missing_split_is_made_without_touching_the_other(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, tmp_path)
    _, val = stores(config)
    hashes = val.manifest["sha256"]
    val.path.rename(tmp_path / "elsewhere")
    again = prepare(config)
    assert [prepared.written for prepared in again] == [False, True]
    assert again[1].store.manifest["sha256"] == hashes


def spoiled(folder: Path) -> Path:
    cat = folder / "set/train/cat"
    (cat / "1.jpg").write_bytes(b"")
    (cat / "3.jpg").write_bytes((cat / "3.jpg").read_bytes()[:400])
    (cat / "4.jpg").write_bytes(b"<html>")
    (cat / "5.jpg").write_bytes(encoded(picture(0, (5, 90))))
    return folder


def test_bad_files_are_all_named_and_stop_the_work(folder: Path, tmp_path: Path, caplog) -> None:
    config = config_for(spoiled(folder), tmp_path)
    with pytest.raises(UserError) as error:
        prepare(config)
    message = str(error.value)
    assert "4 bad file(s)" in message
    for expected in (
        "cat/1.jpg: empty file",
        "cat/3.jpg: ",
        "cat/4.jpg: not a picture",
        "cat/5.jpg: 5x90",
        "on_corrupt=skip",
    ):
        assert expected in message
    assert "\n" not in message
    assert caplog.text.count("bad file set/train/cat") == 4
    assert not (Path(config.root) / "train").exists()


def test_skipped_files_leave_the_others_in_order_and_are_listed(folder: Path, tmp_path: Path) -> None:
    whole, _ = stores(config_for(folder, tmp_path / "whole"))
    train, _ = stores(config_for(spoiled(folder), tmp_path, on_corrupt=OnCorrupt.skip))
    assert train.labels.tolist() == [0] * 2 + [1] * 6
    assert np.array_equal(pixels(train), pixels(whole)[[0, 2, 6, 7, 8, 9, 10, 11]])
    assert train.manifest["corrupt"] == [f"set/train/cat/{k}.jpg" for k in (1, 3, 4, 5)]
    assert train.manifest["counts"] == [2, 6]


def test_mended_files_are_read_and_only_they(folder: Path, tmp_path: Path, monkeypatch) -> None:
    good = {file: file.read_bytes() for file in folder.rglob("*.jpg")}
    config = config_for(spoiled(folder), tmp_path)
    with pytest.raises(UserError):
        prepare(config)
    for file, data in good.items():
        file.write_bytes(data)
    read = []
    monkeypatch.setattr(
        module, "decode", lambda payload, side: (read.append(payload.name), decode(payload, side))[1]
    )
    prepare(config)
    assert read[:4] == ["1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert len(read) == 4 + 4  # and the four of val


def test_a_class_without_a_good_image_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.glob("set/train/dog/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="class dog has no good image left"):
        prepare(config_for(folder, tmp_path, on_corrupt=OnCorrupt.skip))


def test_small_pictures_are_enlarged_and_counted(folder: Path, tmp_path: Path) -> None:
    (folder / "set/train/cat/0.jpg").write_bytes(encoded(picture(0, (12, 30))))
    train, val = stores(config_for(folder, tmp_path))
    assert train.images.shape[1:] == (16, 16, 3)
    assert (train.manifest["enlarged"], val.manifest["enlarged"]) == (1, 0)


KILLED = """
import time
from pathlib import Path
from alexnet.data import prepare as module
from alexnet.data.prepare import PrepareConfig, prepare

slow = module.decode_chunk
module.CHUNK = 4

def decode_chunk(*arguments):
    time.sleep(0.03)
    return slow(*arguments)

module.decode_chunk = decode_chunk
prepare(PrepareConfig(name="pets", root={root!r}, source="folder", path={path!r}, px=16, workers=0))
"""


@pytest.mark.parametrize("form", ["folder", "archive"])
def test_a_killed_job_continues_and_gives_the_same_arrays(tmp_path: Path, monkeypatch, form: str) -> None:
    files = image_set(80)
    path = write_folder(tmp_path / "s", files) if form == "folder" else write_tar(tmp_path / "s.tgz", files)
    config = config_for(path, tmp_path)
    kill_when_some_are_done(config, 20)
    done = np.load(partial_directory(Path(config.root) / "train") / "done.npy")
    assert 20 <= np.count_nonzero(done) < 160
    decoded = []
    monkeypatch.setattr(module, "decode", lambda payload, side: (decoded.append(1), decode(payload, side))[1])
    continued = stores(config)
    assert len(decoded) == 160 - np.count_nonzero(done) + 4
    untouched = stores(config_for(path, tmp_path / "again"))
    for one, other in zip(continued, untouched, strict=True):
        assert one.manifest["sha256"] == other.manifest["sha256"]
        assert one.manifest["enlarged"] == other.manifest["enlarged"]


def kill_when_some_are_done(config: PrepareConfig, count: int) -> None:
    script = textwrap.dedent(KILLED).format(root=config.root, path=config.path)
    job = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    marks, deadline = partial_directory(Path(config.root) / "train") / "done.npy", time.monotonic() + 60
    while time.monotonic() < deadline and not (marks.is_file() and np.count_nonzero(_marks(marks)) >= count):
        time.sleep(0.01)
    os.kill(job.pid, signal.SIGKILL)
    assert job.communicate()[1] is not None
    assert job.returncode == -signal.SIGKILL


def _marks(file: Path) -> np.ndarray:
    try:
        return np.load(file)
    except (ValueError, EOFError):  # just being written
        return np.zeros(0)


ORPHANED = """
import os, time
from alexnet.data.prepare import Crew
crew = Crew(1)
print(crew.pool.submit(os.getpid).result(), flush=True)
time.sleep(60)
"""


def test_decoding_processes_end_when_their_parent_is_killed() -> None:
    job = subprocess.Popen([sys.executable, "-c", ORPHANED], stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None
    child = int(job.stdout.readline())
    job.kill()
    job.communicate()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(child):
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_decoding_processes_do_not_import_the_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from alexnet.data.prepare import Crew\n"
        "print('imported', flush=True)\n"
        "if __name__ == '__main__':\n"
        "    with Crew(1) as crew:\n"
        "        print(list(crew.map(abs, iter([-3]))))\n"
    )
    job = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert job.stdout.split() == ["imported", "[3]"]


def test_a_killed_decoding_process_is_explained() -> None:
    with (
        Crew(1) as crew,
        pytest.raises(UserError, match=r"killed \(out of memory\?\): run again with workers=1"),
    ):
        list(crew.map(os._exit, iter([3])))


def test_no_space_left_leaves_nothing_half_written(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and _Usage())
    with pytest.raises(UserError, match="no space left"):
        prepare(config_for(folder, tmp_path))
    assert not list((tmp_path / "stores/pets").glob("**/*.npy"))


class _Usage:
    free = 100


def test_verify_finds_a_changed_pixel(folder: Path, tmp_path: Path) -> None:
    config = config_for(folder, tmp_path)
    prepare(config)
    assert [store.path.name for store in verify(config)] == ["train", "val"]
    images = np.load(Path(config.root) / "val" / "images.npy", mmap_mode="r+")
    images[1, 2, 3, 0] ^= 4
    images.flush()
    with pytest.raises(UserError, match=r"val is damaged: images.npy"):
        verify(config)


def test_verify_without_a_store_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare_data\.py data=folder .*name=pets"):
        verify(config_for(tmp_path, tmp_path))


def test_a_subset_keeps_its_classes_and_words(tmp_path: Path) -> None:
    wnids = ("n01000000", "n02000000", "n03000000")
    folder = write_folder(tmp_path / "s", image_set(5, wnids) | {"set/words.txt": b"n03000000\tthird\n"})
    (tmp_path / "chosen.txt").write_text("n03000000\nn01000000 a remark\n\n")
    config = config_for(folder, tmp_path, source="imagenet", official=False, class_file=str(tmp_path / "chosen.txt"),
                        images_per_class=3)  # fmt: skip
    train, val = stores(config)
    assert [entry["words"] for entry in train.classes] == ["n01000000", "third"]
    assert train.labels.tolist() == [0] * 3 + [1] * 3
    assert val.labels.tolist() == [0] * 2 + [1] * 2
    drawn, _ = stores(config_for(folder, tmp_path / "b", source="imagenet", official=False, n_classes=2))
    assert len(drawn.classes) == 2


def test_a_folder_without_val_gives_a_val_store_only_when_asked(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "s", image_set(8, val=0))
    (train,) = stores(config_for(folder, tmp_path / "a"))
    assert len(train) == 16
    train, val = stores(config_for(folder, tmp_path / "b", val_fraction=0.25))
    assert (len(train), len(val)) == (12, 4)


def test_synthetic_is_prepared_like_any_other(tmp_path: Path) -> None:
    config = PrepareConfig(root=str(tmp_path / "synthetic"), n_train=200, n_val=50, px=32)
    train, val = stores(config)
    assert (len(train), len(val), len(train.classes)) == (200, 50, 10)
    assert train.labels.tolist() == list(range(10)) * 20
    assert train.classes[0] == {"wnid": "striped_disc", "words": "striped disc"}
    again, _ = stores(PrepareConfig(root=str(tmp_path / "again"), n_train=200, n_val=50, px=32))
    assert again.manifest["sha256"] == train.manifest["sha256"]
    assert open_store(val.path, px=32).px == 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"px": 0}, "px=0 is too small"),
        ({"workers": -1}, "workers=-1"),
        ({"holdout_fraction": 1.0}, "holdout_fraction=1.0"),
        ({"n_classes": 3, "classes": ["cat"]}, "classes and n_classes both"),
        ({"class_file": "/nowhere"}, "class_file=/nowhere does not exist"),
        ({"path": "/nowhere"}, "path=/nowhere does not exist"),
    ],
)
def test_bad_settings_are_named(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config_for(folder, tmp_path, **changes))


def test_a_directory_that_cannot_be_made_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config_for(folder, tmp_path, root=str(tmp_path / "file" / "pets")))
