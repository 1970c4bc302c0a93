"""From files to stores: nothing lost by a kill, nothing done twice, nothing left out without a word."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from test_sources import encoded, picture, write_folder, write_tar

from alexnet.data import prepare as module
from alexnet.data import sources
from alexnet.data import store as store_module
from alexnet.data.config import DataConfig, SourceKind
from alexnet.data.pictures import Resample, decode, fit
from alexnet.data.prepare import Crew, OnCorrupt, PrepareConfig, prepare, verify, wanted_classes
from alexnet.data.store import Store, open_store, partial_directory, write_rows
from alexnet.errors import UserError


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


def test_a_finished_store_is_compared_with_the_source_given(folder: Path, tmp_path: Path, caplog) -> None:
    config = config_for(folder, tmp_path)
    prepare(config)
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert not any(split.written for split in prepare(replace(config, path=str(moved))))
    assert f"was prepared from {folder}, which held the same files" in caplog.text
    (moved / "set/train/cat/0.jpg").write_bytes(b"x" * (moved / "set/train/cat/0.jpg").stat().st_size)
    with pytest.raises(
        UserError, match=r"another source .*source, 16 files; not .*, 16 files; different: contents"
    ):
        prepare(replace(config, path=str(moved)))
    (folder / "set/train/cat/more.jpg").write_bytes(encoded(picture(3)))
    with pytest.raises(UserError, match=r"17 files; different: files, names, sizes.*leave path out"):
        prepare(config)
    assert not any(split.written for split in prepare(replace(config, path=None)))


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
    assert [bool(prepared.written) for prepared in again] == [False, True]
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
        module, "decode", lambda payload, *rest: (read.append(payload.name), decode(payload, *rest))[1]
    )
    prepare(config)
    assert read[:4] == ["1.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert len(read) == 4 + 4  # and the four of val


def test_a_source_that_is_refused_leaves_no_directory(tmp_path: Path, monkeypatch) -> None:
    config = config_for(tmp_path / "nowhere", tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        prepare(config)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("urllib.request.urlopen", full_disk)  # no network
    with pytest.raises(UserError, match="cannot download"):
        prepare(replace(config, source=SourceKind.imagenette, path=None))
    assert not list(tmp_path.iterdir())
    Path(config.root).mkdir(parents=True)  # somebody else's
    with pytest.raises(UserError, match="nowhere"):
        prepare(config)
    assert Path(config.root).is_dir()


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
from alexnet.data import sources
from alexnet.data import store as store_module
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
    monkeypatch.setattr(module, "decode", lambda *given: (decoded.append(1), decode(*given))[1])
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
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="no space left"):
        prepare(config_for(folder, tmp_path))
    assert not list((tmp_path / "stores/pets").glob("**/*.npy"))


def test_few_bytes_of_an_archive_are_in_memory_at_a_time(tmp_path: Path, monkeypatch) -> None:
    files = image_set(20)
    largest = max(map(len, files.values()))
    monkeypatch.setattr(module, "CHUNK_BYTES", 3 * largest)
    sizes = []
    real = module.decode_chunk
    monkeypatch.setattr(
        module,
        "decode_chunk",
        lambda *given: (sizes.append(sum(len(p) for _, p in given[2])), real(*given))[1],
    )
    train, _ = stores(config_for(write_tar(tmp_path / "x.tgz", files), tmp_path))
    assert len(train) == 40
    assert max(sizes) <= 4 * largest
    assert len(sizes) > 5


def full_disk(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["allocating", "images", "publish"])
def test_a_disk_that_fills_up_is_one_line_and_the_next_run_continues(
    folder: Path, tmp_path: Path, monkeypatch, where: str
) -> None:
    first = config_for(folder, tmp_path, name="first", root=str(tmp_path / "stores" / "first"))
    expected = [store.manifest["sha256"] for store in stores(first)]
    before = {file: file.read_bytes() for file in Path(first.root).glob("*/*")}
    config = config_for(folder, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "CHUNK", 4)
        writes = iter([write_rows, write_rows, full_disk])
        if where == "allocating":
            patch.setattr("os.posix_fallocate", full_disk)
        elif where == "images":
            patch.setattr(module, "write_rows", lambda *given: next(writes)(*given))
        else:
            patch.setattr(store_module.StoreBuilder, "publish", full_disk)
        with pytest.raises(UserError, match=r"no space left for .*run again"):
            prepare(config)
    assert {file: file.read_bytes() for file in Path(first.root).glob("*/*")} == before
    decoded = []
    monkeypatch.setattr(module, "decode", lambda *given: (decoded.append(1), decode(*given))[1])
    assert [store.manifest["sha256"] for store in stores(config)] == expected
    assert len(decoded) == {"allocating": 16, "images": 8, "publish": 4}[where]


def test_the_disk_space_is_taken_before_the_first_image(folder: Path, tmp_path: Path, monkeypatch) -> None:
    class Stop(Exception):
        pass

    def stop(*_) -> None:
        raise Stop

    monkeypatch.setattr(module, "decode_chunk", stop)
    with pytest.raises(Stop):
        prepare(config_for(folder, tmp_path, px=256))
    status = os.stat(partial_directory(tmp_path / "stores/pets/train") / "images.npy")
    assert status.st_blocks * 512 >= status.st_size > 12 * 256 * 256 * 3


@pytest.mark.parametrize("when", ["_move", "_statistics", "publish"])
def test_a_kill_while_bad_rows_are_left_out_loses_nothing(
    folder: Path, tmp_path: Path, monkeypatch, when: str
) -> None:
    config = config_for(spoiled(folder), tmp_path, on_corrupt=OnCorrupt.skip)
    expected = [store.manifest["sha256"] for store in stores(replace(config, root=str(tmp_path / "whole")))]
    holder = {"_move": store_module, "_statistics": module, "publish": store_module.StoreBuilder}[when]
    with monkeypatch.context() as patch:
        patch.setattr(holder, when, interrupted)
        with pytest.raises(InterruptedError):
            prepare(config)
    decoded = []
    monkeypatch.setattr(module, "decode", lambda *given: (decoded.append(given[0]), decode(*given))[1])
    train, val = stores(config)
    assert not [path for path in decoded if "train" in path.parts]
    assert [train.manifest["sha256"], val.manifest["sha256"]] == expected
    assert train.manifest["corrupt"] == [f"set/train/cat/{k}.jpg" for k in (1, 3, 4, 5)]


def interrupted(*_) -> None:
    raise InterruptedError


def test_a_summary_counts_what_was_taken_and_what_was_not(folder: Path, tmp_path: Path) -> None:
    write_folder(folder, {"set/train/cat/a.txt": b"x", "set/train/cat/b.txt": b"x", "set/train/cat/.c": b"x"})
    config = config_for(spoiled(folder), tmp_path, on_corrupt=OnCorrupt.skip)
    for state in (r"[0-9,]+ images/s, [0-9.]+ s", "already there, nothing done"):
        assert re.fullmatch(
            rf".*pets/train: 8 images of 16 pixels; {state}; 2 classes: cat, dog; "
            r"left out: 2 \.txt, 4 bad, 1 hidden",
            prepare(config)[0].summary(),
        )
    names = tuple(f"c{k:02d}" for k in range(12))
    many = config_for(write_folder(tmp_path / "many", image_set(1, names)), tmp_path / "b")
    assert prepare(many)[0].summary().endswith(f"12 classes: {', '.join(names[:10])}, ...")


def test_a_second_process_waits_and_says_so(folder: Path, tmp_path: Path, monkeypatch, caplog) -> None:
    waits = []

    @contextlib.contextmanager
    def locked(directory: Path, name: str, wait: float) -> Iterator[bool]:
        waits.append(wait)
        yield wait != 0

    monkeypatch.setattr("alexnet.system.locked", locked)
    assert len(stores(config_for(folder, tmp_path))) == 2
    assert waits == [0, -1]
    assert "another process prepares" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"cat\ndog\n", b"cat\r\ndog\r\n", b"\xef\xbb\xbfcat\ndog", "cat\r\ndog".encode("utf-16"),
     b"\xfe\xff" + "cat\ndog".encode("utf-16-be"), b"\n dog \n\ncat\ncat\n"],
)  # fmt: skip
def test_a_list_of_classes_is_read_in_any_encoding(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list").write_bytes(content)
    assert wanted_classes(PrepareConfig(class_file=str(tmp_path / "list"))) == ["cat", "dog"]


def test_a_line_of_a_list_is_one_name(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("tabby cat\ngolden retriever\nn01440764 tench, Tinca tinca\n")
    names = ["golden retriever", "n01440764", "tabby cat"]
    assert wanted_classes(PrepareConfig(class_file=str(tmp_path / "list"))) == names
    for content, words in (
        (b"", "holds no name"),
        (b" \n", "holds no name"),
        (b"caf\xe9", "save it as UTF-8"),
    ):
        (tmp_path / "list").write_bytes(content)
        with pytest.raises(UserError, match=words):
            wanted_classes(PrepareConfig(class_file=str(tmp_path / "list")))


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


def test_progress_in_a_file_is_lines_without_carriage_returns(folder: Path, tmp_path: Path, capsys) -> None:
    stores(config_for(folder, tmp_path))
    said = capsys.readouterr().err
    assert "\r" not in said
    assert [line.split(":")[0] for line in said.splitlines()] == ["train", "val"]
    assert "12/12" in said


def test_a_long_preparation_says_a_line_a_minute(capsys) -> None:
    stream = sources.Lines(sys.stderr)
    for minute in range(4):
        stream.write(f"\r {minute} of 3 ")
        stream.last -= 61 * (minute == 1)
    stream.write("\n")
    assert capsys.readouterr().err.splitlines() == ["2 of 3", "3 of 3"]


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
        ({"n_train": 10**9}, "n_train=1000000000 must be at most"),
        ({"px": 0}, "px=0 must be an integer of at least 1"),
        ({"workers": -1}, "workers=-1"),
        ({"holdout_fraction": 1.0}, r"holdout_fraction=1.0 must be in \[0, 1\)"),
        ({"n_classes": 3, "classes": ["cat"]}, "classes and n_classes both"),
        ({"name": "../pets"}, "name=../pets must be a name inside data_dir"),
        ({"class_file": "/nowhere"}, "class_file=/nowhere does not exist"),
        ({"path": "/nowhere"}, "path=/nowhere does not exist"),
    ],
)
def test_bad_settings_are_named(folder: Path, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config_for(folder, tmp_path, **changes))


def test_the_home_directory_may_be_written_short(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = PrepareConfig(root="~/stores/pets", path="~/pets.zip", class_file="~/list", words="~/words")
    assert (config.root, config.path) == ("/home/me/stores/pets", "/home/me/pets.zip")
    assert (config.class_file, config.words) == ("/home/me/list", "/home/me/words")
    assert DataConfig(root="~/stores/pets").root == "/home/me/stores/pets"


def test_a_directory_that_cannot_be_made_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(config_for(folder, tmp_path, root=str(tmp_path / "file" / "pets")))
