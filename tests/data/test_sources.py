"""Which file belongs to which split and class, from folders and archives alike, and what is refused."""

import io
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet.data import sources
from alexnet.data.config import SourceKind
from alexnet.data.pictures import read
from alexnet.data.sources import (
    Official,
    Source,
    draw_classes,
    open_source,
    with_classes,
    with_images_per_class,
    with_val_fraction,
)
from alexnet.errors import UserError

WNIDS = ("n02000001", "n01000002", "n03000003")  # not in sorted order


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """A smooth colour picture, so that JPEG keeps it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def tiny_files() -> dict[str, bytes]:
    """Tiny ImageNet in small: three classes, four train images each, six val images in a flat folder."""
    files = {
        f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{k}.JPEG": f"{wnid}{k}".encode()
        for wnid in WNIDS
        for k in range(4)
    }
    lines = []
    for k in range(6):
        files[f"tiny-imagenet-200/val/images/val_{k}.JPEG"] = f"val{k}".encode()
        lines.append(f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t0\t9\t9\n")
    files["tiny-imagenet-200/val/val_annotations.txt"] = "".join(lines).encode()
    files["tiny-imagenet-200/words.txt"] = b"n01000002\ttench, Tinca tinca\nn02000001\tgoldfish\n"
    files["tiny-imagenet-200/wnids.txt"] = "\n".join(WNIDS).encode()
    files[f"tiny-imagenet-200/train/{WNIDS[0]}/{WNIDS[0]}_boxes.txt"] = b"no image"
    return files


def class_files(classes=WNIDS, train: int = 4, val: int = 2) -> dict[str, bytes]:
    return {
        f"set/{split}/{name}/{k}.JPEG": f"{split}{name}{k}".encode()
        for split, n in (("train", train), ("val", val))
        for name in classes
        for k in range(n)
    }


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def opened(kind: str, path: Path, official: bool = False, **options) -> Source:
    return open_source(SourceKind(kind), path, official=official, **options)


def contents(source: Source, split: str) -> list[tuple[bytes, int]]:
    """What the items of a split really are, in order."""
    found = dict(source.stream(set(source.splits[split])))
    return [(read(found[name]), label) for name, label in source.splits[split].items()]


WRITERS = {
    "folder": lambda path, files: write_folder(path / "x", files),
    "tar.gz": lambda path, files: write_tar(path / "x.tar.gz", files),
    "tar": lambda path, files: write_tar(path / "x.tar", files, "w"),
    "zip": lambda path, files: write_zip(path / "x.zip", files),
}


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("backwards", [False, True])
def test_tiny_imagenet_gives_train_and_flat_val_the_same_labels(
    tmp_path: Path, form: str, backwards: bool
) -> None:
    files = tiny_files()
    files = dict(reversed(files.items())) if backwards else files
    source = opened("tiny_imagenet", WRITERS[form](tmp_path, files))
    order = sorted(WNIDS)
    assert [entry["wnid"] for entry in source.classes] == order
    assert source.classes[0]["words"] == "tench, Tinca tinca"
    assert source.classes[2]["words"] == "n03000003"
    assert contents(source, "train") == [
        (f"{w}{k}".encode(), order.index(w)) for w in order for k in range(4)
    ]
    assert contents(source, "val") == [
        (f"val{k}".encode(), order.index(WNIDS[k % 3])) for k in (1, 4, 0, 3, 2, 5)
    ]


def test_the_root_itself_or_the_folder_around_it_may_be_given(tmp_path: Path) -> None:
    root = write_folder(tmp_path, tiny_files() | {"tiny-imagenet-200/preview.jpg": b"x"})
    outer, inner = opened("tiny_imagenet", root), opened("tiny_imagenet", root / "tiny-imagenet-200")
    assert contents(outer, "val") == contents(inner, "val")
    assert outer.left_out == inner.left_out == {".txt": 2, "outside train/ and val/": 1}


def refused(kind: str, path: Path, *words: str, **options) -> None:
    with pytest.raises(UserError) as error:
        opened(kind, path, **options)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_tiny_imagenet_with_a_val_image_too_many_or_too_few_is_refused(tmp_path: Path) -> None:
    files = tiny_files()
    refused("tiny_imagenet", write_folder(tmp_path / "a", files | {"tiny-imagenet-200/val/images/odd.JPEG": b"x"}),
            "odd.JPEG", "val_annotations.txt")  # fmt: skip
    del files["tiny-imagenet-200/val/images/val_3.JPEG"]
    refused("tiny_imagenet", write_folder(tmp_path / "b", files), "val_3.JPEG")


def test_the_published_counts_are_insisted_on(tmp_path: Path) -> None:
    path = write_folder(tmp_path, tiny_files())
    refused("tiny_imagenet", path, "3 classes, 12 train and 6 val", "100000", "official=false", official=True)


def test_other_classes_under_the_published_counts_are_noticed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sources.COUNTS, "imagenette", (3, 12, 6))
    refused("imagenette", write_folder(tmp_path, class_files()), "n01000002", official=True)


def test_a_published_name_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_files())
    refused("tiny_imagenet", path, "MD5", "90528d7ca1a48142e341f4ef8d21d0de", "official=false", official=True)
    assert opened("tiny_imagenet", path).splits["val"]


@pytest.mark.parametrize("name", ["../escape.JPEG", "/etc/escape.JPEG", "set/train/../../../escape.JPEG"])
@pytest.mark.parametrize("form", ["tar.gz", "zip"])
def test_an_archive_that_points_outside_is_refused(tmp_path: Path, form: str, name: str) -> None:
    before = sorted(tmp_path.parent.iterdir())
    refused("folder", WRITERS[form](tmp_path, class_files() | {name: b"x"}), name, "outside")
    assert sorted(tmp_path.parent.iterdir()) == before


def test_a_cut_off_archive_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)  # what cannot be compressed: the cut is in the middle of a file
    path = write_tar(tmp_path / "x.tar.gz", {name: noise.bytes(500) for name in class_files()})
    path.write_bytes(path.read_bytes()[:-2000])
    refused("folder", path, "not a whole archive")
    path.write_bytes(b"hello")
    refused("folder", path, "not a whole archive")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    refused("folder", tmp_path / "nowhere", "nowhere", "does not exist")
    with pytest.raises(UserError, match="source=imagenet needs the archive or folder"):
        sources.download(SourceKind.imagenet, 64, tmp_path)


def test_imagenet_with_a_flat_val_is_refused_with_an_explanation(tmp_path: Path) -> None:
    files = class_files(val=0) | {"set/val/ILSVRC2012_val_00000001.JPEG": b"x"}
    refused("imagenet", write_folder(tmp_path, files), "val/ flat", "val/<class>/<image>")


def test_imagenet_folders_are_wnids(tmp_path: Path) -> None:
    path = write_folder(tmp_path, class_files(("cat", "dog")))
    refused("imagenet", path, "'cat'", "source=folder")
    assert [entry["wnid"] for entry in opened("folder", path).classes] == ["cat", "dog"]


def test_imagenet_takes_its_words_from_the_mapping_or_from_a_file(tmp_path: Path) -> None:
    mapping = {"LOC_synset_mapping.txt": b"n01000002 tench, Tinca tinca\n"}
    path = write_folder(tmp_path / "set", class_files() | mapping)
    assert opened("imagenet", path).classes[0]["words"] == "tench, Tinca tinca"
    (tmp_path / "words").write_text("n02000001 goldfish\n")
    assert opened("imagenet", path, words=tmp_path / "words").classes[1]["words"] == "goldfish"
    refused("imagenet", path, "words=", "does not exist", words=tmp_path / "no")


def test_a_folder_of_classes_alone_is_all_train(tmp_path: Path) -> None:
    files = {
        f"pets/{name}/deep/{k}.{suffix}": b"x"
        for name in ("dog", "cat")
        for k, suffix in enumerate(("png", "JPG"))
    }
    files |= {"pets/cat/notes.txt": b"x", "pets/cat/.hidden.png": b"x", "README.md": b"x"}
    source = opened("folder", write_tar(tmp_path / "x.tar", files, "w"))
    assert [entry["wnid"] for entry in source.classes] == ["cat", "dog"]
    assert list(source.splits) == ["train"]
    assert list(source.splits["train"].items()) == [
        (f"pets/{name}/deep/{k}", c) for c, name in enumerate(("cat", "dog")) for k in ("0.png", "1.JPG")
    ]


def test_val_without_train_is_refused(tmp_path: Path) -> None:
    refused("folder", write_folder(tmp_path, class_files(train=0)), "no train/")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refused("folder", write_folder(tmp_path, {"notes.txt": b"x"}), "no train images")


def test_a_class_that_only_one_split_has_is_named(tmp_path: Path) -> None:
    files = {name: data for name, data in class_files().items() if not name.startswith("set/val/n03000003")}
    refused("imagenet", write_folder(tmp_path, files), "n03000003 is in train but not in val")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return opened(
        "imagenet", write_folder(tmp_path, class_files(tuple(f"n0{k}000000" for k in range(6)), train=8))
    )


def test_chosen_classes_are_numbered_anew_in_every_split(source: Source) -> None:
    chosen = with_classes(source, ["n05000000", "n01000000"])
    assert [entry["wnid"] for entry in chosen.classes] == ["n01000000", "n05000000"]
    for split, each in (("train", 8), ("val", 2)):
        assert list(chosen.splits[split].values()) == [0] * each + [1] * each
        assert all(f"n0{1 + 4 * label}000000" in name for name, label in chosen.splits[split].items())


def test_an_unknown_class_is_named_with_its_nearest(source: Source) -> None:
    with pytest.raises(UserError, match=r"'n05000001' is not in .*did you mean n05000000"):
        with_classes(source, ["n05000001"])


def test_fewer_than_two_classes_are_refused(source: Source) -> None:
    for chosen in ([], ["n05000000"]):
        with pytest.raises(UserError, match="must be two or more"):
            with_classes(source, chosen)


def test_a_number_of_classes_is_drawn_by_seed(source: Source) -> None:
    drawn = draw_classes(source, 3, 0)
    assert drawn == draw_classes(source, 3, 0)
    assert len(set(drawn)) == 3
    assert len({tuple(sorted(draw_classes(source, 3, seed))) for seed in range(8)}) > 1
    with pytest.raises(UserError, match=r"n_classes=7.*only 6"):
        draw_classes(source, 7, 0)


def test_images_per_class_are_drawn_by_class_whatever_the_other_classes(source: Source) -> None:
    few = with_images_per_class(source, 3, 0)
    assert list(few.splits["train"].values()) == [c for c in range(6) for _ in range(3)]
    assert few.splits["val"] == source.splits["val"]
    alone = with_images_per_class(with_classes(source, ["n04000000", "n02000000"]), 3, 0)
    assert list(alone.splits["train"]) == [
        name for name, label in few.splits["train"].items() if label in (2, 4)
    ]
    assert few.splits["train"] != with_images_per_class(source, 3, 1).splits["train"]
    with pytest.raises(UserError, match=r"images_per_class=9.*only 8"):
        with_images_per_class(source, 9, 0)


def test_a_val_fraction_cuts_train_and_nothing_is_in_both(source: Source) -> None:
    with pytest.raises(UserError, match="has its own val"):
        with_val_fraction(source, 0.25, 0)
    del source.splits["val"]
    one_each = {label: name for name, label in source.splits["train"].items()}
    singles = replace(source, splits={"train": {name: label for label, name in one_each.items()}})
    with pytest.raises(UserError, match=r"val_fraction=0.25: every class of .* has one image"):
        with_val_fraction(singles, 0.25, 0)
    cut = with_val_fraction(source, 0.25, 0)
    assert list(cut.splits["val"].values()) == [c for c in range(6) for _ in range(2)]
    both = [*cut.splits["train"].items(), *cut.splits["val"].items()]
    assert sorted(both) == sorted(source.splits["train"].items())


@pytest.mark.parametrize(
    ("px", "file"), [(64, "a-160.tgz"), (160, "a-160.tgz"), (256, "a-320.tgz"), (500, "a.tgz")]
)
def test_the_smallest_sufficient_archive_is_fetched_once(
    tmp_path: Path, monkeypatch, capsys, px: int, file: str
) -> None:
    fetched = []

    def fake(url: str, root: str, md5: str) -> None:
        fetched.append((url, md5))
        Path(root, url.rsplit("/", 1)[-1]).touch()
        print("\r 50 % \r100 %", file=sys.stderr)

    published = [Official("https://x/a-160.tgz", "m1", 160), Official("https://x/a-320.tgz", "m2", 320),
                 Official("https://x/a.tgz", "m3", 0)]  # fmt: skip
    monkeypatch.setitem(sources.OFFICIAL, "imagenette", published)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", fake)
    for _ in range(2):
        assert sources.download(SourceKind.imagenette, px, tmp_path) == tmp_path / file
    assert [url for url, _ in fetched] == [f"https://x/{file}"]
    assert "\r" not in capsys.readouterr().err


def test_without_a_network_the_address_and_the_key_are_named(tmp_path: Path, monkeypatch) -> None:
    def unreachable(*_, **__) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    with pytest.raises(UserError, match=r"imagewoof2-160.tgz \(no route to host\).*path="):
        sources.download(SourceKind.imagewoof, 64, tmp_path)
