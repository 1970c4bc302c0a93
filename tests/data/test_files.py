"""Folders and archives as people have them: everything is taken, or it is counted, or one line says what is wrong."""

import gzip
import io
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from test_sources import encoded, opened, picture, refused, write_folder, write_tar, write_zip

from alexnet.data import files as module
from alexnet.data.files import Folder, shown
from alexnet.data.pictures import Unreadable
from alexnet.data.sources import Source

CLASSES = ("cat", "dog", "owl")
IMAGES = [encoded(picture(seed, (12, 12))) for seed in range(12)]
FILES = {f"set/{name}/{k}.jpg": IMAGES[4 * c + k] for c, name in enumerate(CLASSES) for k in range(4)}


def counts(source: Source) -> list[int]:
    labels = list(source.splits["train"].values())
    return [labels.count(label) for label in range(len(source.classes))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "x", FILES) / "set"


# Archives -------------------------------------------------------------------------------------------------


def sixth_file(data: bytes) -> tarfile.TarInfo:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return [member for member in archive if member.isfile()][5]


def changed(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "header": lambda data: changed(data, sixth_file(data).offset, b"\x55" * 512),
    "one byte of a header": lambda data: changed(data, sixth_file(data).offset + 3, b"\xff"),
    "header of zeros": lambda data: changed(data, sixth_file(data).offset, bytes(512)),
    "cut between members": lambda data: data[: sixth_file(data).offset],
    "cut in a header": lambda data: data[: sixth_file(data).offset + 200],
    "cut in a member": lambda data: data[: sixth_file(data).offset_data + 100],
    "cut before its end": lambda data: data.rstrip(b"\0"),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["tar", "tar.gz"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_tar_that_is_not_whole_is_refused(tmp_path: Path, damage: str, pack) -> None:
    data = write_tar(tmp_path / "whole.tar", FILES, "w").read_bytes()
    (tmp_path / "x.tar").write_bytes(pack(DAMAGES[damage](data)))
    refused("folder", tmp_path / "x.tar", "not a whole archive")


def test_each_damaged_byte_of_a_compressed_tar_is_found(tmp_path: Path) -> None:
    packed = gzip.compress(write_tar(tmp_path / "whole.tar", FILES, "w").read_bytes())
    for at in range(20, len(packed), len(packed) // 20):
        (tmp_path / "x.tgz").write_bytes(changed(packed, at, bytes([packed[at] ^ 0x10])))
        refused("folder", tmp_path / "x.tgz", "not a whole archive")
    for end in (len(packed) // 2, len(packed) - 8, len(packed) - 1):
        (tmp_path / "x.tgz").write_bytes(packed[:end])
        refused("folder", tmp_path / "x.tgz", "not a whole archive")


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_recognised_by_its_content(tmp_path: Path, mode: str) -> None:
    assert counts(opened("folder", write_tar(tmp_path / "X.ZIP", FILES, mode))) == [4, 4, 4]
    assert counts(opened("folder", write_zip(tmp_path / "x.tar", FILES))) == [4, 4, 4]


def test_a_zip_of_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            info = zipfile.ZipInfo("x")
            info.filename = name.replace("/", "\\")
            archive.writestr(info, data)
    assert counts(opened("folder", path)) == [4, 4, 4]


def test_a_zip_with_a_password_is_refused_and_a_wrong_checksum_is_one_bad_file(tmp_path: Path) -> None:
    data = write_zip(tmp_path / "x.zip", FILES).read_bytes()
    at = data.index(IMAGES[5])
    (tmp_path / "x.zip").write_bytes(changed(data, at + 100, bytes([data[at + 100] ^ 1])))
    source = opened("folder", tmp_path / "x.zip")
    payloads = dict(source.stream(set(source.splits["train"])))
    bad = {name: p.reason for name, p in payloads.items() if isinstance(p, Unreadable)}
    assert list(bad) == ["set/dog/1.jpg"]
    assert "CRC" in bad["set/dog/1.jpg"]
    for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for part in range(data.count(mark)):
            at = [i for i in range(len(data)) if data.startswith(mark, i)][part] + offset
            data = changed(data, at, bytes([data[at] | 1]))
    (tmp_path / "x.zip").write_bytes(data)
    refused("folder", tmp_path / "x.zip", "protected by a password")


def test_members_are_bounded_before_they_are_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 1000)
    files = {**FILES, "set/cat/9.jpg": IMAGES[0] + bytes(2000)}
    for path in (write_zip(tmp_path / "x.zip", files), write_tar(tmp_path / "x.tgz", files)):
        source = opened("folder", path)
        payloads = dict(source.stream({"set/cat/0.jpg", "set/cat/9.jpg"}))
        assert payloads["set/cat/0.jpg"] == IMAGES[0]
        assert isinstance(payloads["set/cat/9.jpg"], Unreadable)


def test_links_and_second_copies_in_an_archive_are_counted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", FILES, "w")
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("set/cat/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        again = tarfile.TarInfo("set/cat/0.jpg")
        archive.addfile(again, io.BytesIO(b""))
    source = opened("folder", path)
    assert counts(source) == [4, 4, 4]
    assert source.left_out == {"link or device in an archive": 1, "a second time": 1}
    with (
        zipfile.ZipFile(write_zip(tmp_path / "x.zip", FILES), "a") as archive,
        pytest.warns(UserWarning, match="Duplicate"),
    ):
        archive.writestr("set/cat/0.jpg", b"")
    assert opened("folder", tmp_path / "x.zip").left_out == {"a second time": 1}


def test_a_folder_of_one_tar_for_each_class_is_read(tmp_path: Path) -> None:
    for name in CLASSES:
        one = {f"{k}.jpg": FILES[f"set/{name}/{k}.jpg"] for k in range(4)}
        write_tar(tmp_path / f"{name}.tar.gz", one)
    source = opened("folder", tmp_path)
    assert [entry["wnid"] for entry in source.classes] == list(CLASSES)
    assert counts(source) == [4, 4, 4]


# Folders --------------------------------------------------------------------------------------------------


def test_pictures_are_recognised_by_content_and_the_rest_is_counted(folder: Path) -> None:
    for k in range(4):
        (folder / f"owl/{k}.jpg").rename(folder / f"owl/{k}.jfif")
    (folder / "dog/0.jpg").rename(folder / "dog/0")
    (folder / "cat/0.jpg").write_bytes(encoded(picture(0), "GIF"))
    (folder / "cat/0.jpg").rename(folder / "cat/0.gif")
    write_folder(folder, {"cat/notes.txt": b"x", "cat/.hidden.jpg": b"x", "read me": b"x", "cat/empty": b""})
    source = opened("folder", folder)
    assert counts(source) == [4, 4, 4]
    assert source.left_out == {".txt": 1, "hidden": 1, "without ending": 2}


@pytest.mark.parametrize("links", [{"cat/all": ".."}, {"cat/all": "..", "dog/all": ".."}, {"dog/cat": "../cat"},
                                   {"cat/up": "../../.."}, {"cat/root": "/"}])  # fmt: skip
def test_each_real_folder_is_read_once(folder: Path, links: dict[str, str]) -> None:
    for name, target in links.items():
        os.symlink(target, folder / name)
    source = opened("folder", folder)
    assert counts(source) == [4, 4, 4]
    assert source.left_out == {"duplicate by link": len(links)}


def test_a_linked_folder_is_a_class(folder: Path, tmp_path: Path) -> None:
    (folder / "owl").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", folder / "owl")
    assert counts(opened("folder", folder)) == [4, 4, 4]


def test_broken_links_pipes_and_odd_names_hang_nothing(folder: Path) -> None:
    os.symlink("/nowhere/9.jpg", folder / "cat/9.jpg")
    os.symlink("/nowhere/list", folder / "cat/list")
    os.symlink("self", folder / "cat/self")
    os.mkfifo(folder / "dog/pipe.jpg")
    shutil.copy(folder / "cat/0.jpg", os.fsencode(folder / "owl") + b"/caf\xe9\n.jpg")
    source = opened("folder", folder)
    assert counts(source) == [5, 4, 5]  # the broken link will be a bad file
    assert source.left_out == {"broken link": 2, "neither file nor folder": 1}
    odd = [name for name in source.splits["train"] if "caf" in name]
    assert shown(odd[0]) == r"owl/caf\udce9\n.jpg"


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch) -> None:
    def scandir(path, real=os.scandir):
        if Path(path).name == "owl":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused("folder", folder, "the folder owl cannot be read (Permission denied)")


@pytest.mark.parametrize(("train", "val"), [("Train", "Val"), ("training", "validation"), ("TRAIN", "valid")])
def test_usual_spellings_of_splits_are_splits(tmp_path: Path, train: str, val: str) -> None:
    files = {name.replace("set", f"set/{top}"): data for top in (train, val) for name, data in FILES.items()}
    source = opened("folder", write_folder(tmp_path, files))
    assert [len(source.splits[split]) for split in ("train", "val")] == [12, 12]
    assert [entry["wnid"] for entry in source.classes] == list(CLASSES)


@pytest.mark.parametrize("test", ["test", "Testing"])
def test_a_split_that_is_not_used_is_counted(tmp_path: Path, test: str) -> None:
    files = {name.replace("set", top): data for top in ("train", test) for name, data in FILES.items()}
    source = opened("folder", write_folder(tmp_path, files))
    assert list(source.splits) == ["train"]
    assert source.left_out == {
        f"of a test split ({test}/cat/0.jpg, {test}/cat/1.jpg, {test}/cat/2.jpg and 9 more)": 12
    }


def test_a_picture_beside_the_splits_is_left_out_and_named(tmp_path: Path) -> None:
    files = {
        name.replace("set", f"a/{top}"): data for top in ("train", "val") for name, data in FILES.items()
    }
    source = opened(
        "folder", write_folder(tmp_path, {**files, "a/preview.jpg": IMAGES[0], "top.png": IMAGES[0]})
    )
    assert counts(source) == [4, 4, 4]
    assert source.left_out == {"beside the splits (a/preview.jpg, top.png)": 2}


@pytest.mark.parametrize("flat", [False, True])
def test_a_class_named_like_a_split_needs_a_decision(folder: Path, flat: bool) -> None:
    if flat:
        (folder / "owl").rename(folder / "train")
    else:
        write_folder(
            folder, {f"train/{name}/{k}.jpg": IMAGES[k] for name in ("diesel", "steam") for k in range(2)}
        )
    refused("folder", folder, "holds train beside cat, dog", "splits=none", "splits=top")
    expected = ["cat", "dog", "train"] if flat else ["cat", "dog", "owl", "train"]
    assert [entry["wnid"] for entry in opened("folder", folder, splits="none").classes] == expected
    if not flat:
        source = opened("folder", folder, splits="top")
        assert [entry["wnid"] for entry in source.classes] == ["diesel", "steam"]
        assert sum(source.left_out.values()) == 12


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"val/cat/0.jpg": b"x", "val/dog/0.jpg": b"x"}, "no train/"),
        ({"train/a/0.jpg": b"x", "Train/b/0.jpg": b"x"}, "two are the same split"),
        ({"Cat/0.jpg": b"x", "Cat/1.jpg": b"x"}, "holds one class, Cat"),
        ({"train/cat/0.jpg": b"x"}, "holds one class, cat"),
        ({"0.jpg": b"x", "1.jpg": b"x"}, "no train images"),
        (
            {"cat/0.jpg": b"x", "dog/0.jpg": b"x", "owl/0.xyz": b"x"},
            "owl hold(s) no picture (left out: 1 .xyz)",
        ),
        (
            {f"{c}/{s}/0.jpg": b"x" for c in ("cat", "dog") for s in ("train", "val")},
            "same folders train, val",
        ),
    ],
    ids=["val alone", "two trains", "one class", "one class of train", "flat", "no picture", "class first"],
)
def test_a_layout_that_leaves_doubt_is_refused(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    refused("folder", write_folder(tmp_path / "set", files), words)


def test_an_empty_folder_of_a_class_that_is_not_wanted_does_not_matter(folder: Path) -> None:
    (folder / "bat").mkdir()
    refused("folder", folder, "bat hold(s) no picture", "classes=[...]")
    assert counts(opened("folder", folder, wanted=["cat", "dog"])) == [4, 4, 4]


def test_a_folder_lists_itself_in_one_order(folder: Path) -> None:
    assert list(Folder(folder).pictures) == list(Folder(folder).pictures)
