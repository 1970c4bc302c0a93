"""ImageNet as people have it: every form of the same images gives the same store."""

import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_sources import encoded, picture, write_folder, write_tar, write_zip

from alexnet.data import prepare as module
from alexnet.data.config import SourceKind
from alexnet.data.pictures import Slice
from alexnet.data.prepare import PrepareConfig, Prepared, prepare
from alexnet.errors import UserError

WNIDS = ("n01440764", "n01443537", "n02085620", "n04613696")
IDS = (3, 1, 4, 2)  # of the development kit: in another order than the wnids
NUMBERS = (9, 10, 100, 1001, 2)  # of the training images: in another order than their names


def odd(seed: int) -> bytes:
    """A JPEG, or what else ImageNet has under that name: PNG, CMYK, rotated by EXIF."""
    image = picture(seed, (40, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    forms: dict[int, Callable[[], bytes]] = {
        1: lambda: encoded(image, "PNG"),
        2: lambda: encoded(image.convert("CMYK")),
        3: lambda: encoded(image, exif=exif),
    }
    return forms.get(seed % 7, lambda: encoded(image))()


TRAIN = {f"{w}_{k}": odd(10 * c + i) for c, w in enumerate(WNIDS) for i, k in enumerate(NUMBERS)}
VAL = {f"ILSVRC2012_val_{k:08d}": odd(100 + k) for k in range(1, 9)}
VAL_CLASS = dict(zip(VAL, (2, 0, 3, 1, 1, 2, 0, 3), strict=True))  # the index of each one's wnid
MAPPING = "".join(f"{w} word of {w}\n" for w in WNIDS).encode()


def by_class() -> dict[str, bytes]:
    files = {f"imagenet/train/{name.partition('_')[0]}/{name}.JPEG": data for name, data in TRAIN.items()}
    return files | {f"imagenet/val/{WNIDS[VAL_CLASS[name]]}/{name}.JPEG": data for name, data in VAL.items()}


def kaggle() -> dict[str, bytes]:
    top = "ILSVRC/Data/CLS-LOC"
    files = {f"{top}/train/{name.partition('_')[0]}/{name}.JPEG": data for name, data in TRAIN.items()}
    files |= {f"{top}/val/{name}.JPEG": data for name, data in VAL.items()}
    files[f"{top}/test/ILSVRC2012_test_00000001.JPEG"] = odd(0)
    files["ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml"] = b"<annotation/>"
    rows = [f"{name},{WNIDS[c]} 1 2 3 4 {WNIDS[c]} 5 6 7 8" for name, c in VAL_CLASS.items()]
    files["LOC_val_solution.csv"] = "\n".join(["ImageId,PredictionString", *reversed(rows)]).encode()
    return files | {"LOC_synset_mapping.txt": MAPPING}


def development_kit() -> dict[str, bytes]:
    from scipy.io import savemat

    rows = [(i, w, f"word of {w}", "", 0) for i, w in zip(IDS, WNIDS, strict=True)]
    rows.append((5, "n00001740", "entity", "", 4))  # an ancestor, which is no class
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    truth = "".join(f"{IDS[c]}\n" for c in VAL_CLASS.values()).encode()
    top = "ILSVRC2012_devkit_t12"
    return {
        f"{top}/readme.txt": b"x",
        f"{top}/data/meta.mat": buffer.getvalue(),
        f"{top}/data/ILSVRC2012_validation_ground_truth.txt": truth,
    }


def published(root: Path) -> Path:
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in reversed(WNIDS):
            members = {f"{name}.JPEG": data for name, data in TRAIN.items() if name.startswith(wnid)}
            outer.add(write_tar(root / "one", members, "w"), f"{wnid}.tar")
    (root / "one").unlink()
    write_tar(root / "ILSVRC2012_img_val.tar", {f"{name}.JPEG": data for name, data in VAL.items()}, "w")
    write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", development_kit())
    return root


def shuffled(images: dict[str, bytes], shards: int) -> list[list[str]]:
    names = np.random.default_rng(0).permutation(list(images)).tolist()
    return [names[k::shards] for k in range(shards)]


def class_of(name: str) -> int:
    return VAL_CLASS[name] if name in VAL_CLASS else WNIDS.index(name.partition("_")[0])


def webdataset(root: Path) -> Path:
    root.mkdir()
    for split, images, count in (("train", TRAIN, 3), ("validation", VAL, 2)):
        for k, names in enumerate(shuffled(images, count)):
            members = {}
            for name in names:
                members |= {
                    f"{name}.jpg": images[name],
                    f"{name}.cls": b"%d" % class_of(name),
                    f"{name}.json": b"{}",
                }
            write_tar(root / f"imagenet1k-{split}-{k:04d}.tar", members, "w")
    return root


def parquet(root: Path, suffix: bool = False) -> Path:
    pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "data").mkdir(parents=True)
    for split, images, count in (("train", TRAIN, 3), ("validation", VAL, 2), ("test", {"t": odd(0)}, 1)):
        for k, names in enumerate(shuffled(images, count)):
            labels = [-1 if split == "test" else class_of(name) for name in names]
            ends = [f"_{WNIDS[label]}.JPEG" if suffix else ".JPEG" for label in labels]
            cells = [
                {"bytes": images[name], "path": name + end} for name, end in zip(names, ends, strict=True)
            ]
            table = pa.table({"image": cells, "label": labels})
            pq.write_table(table, root / f"data/{split}-{k:05d}-of-{count:05d}.parquet", row_group_size=3)
    return root


FORMS: dict[str, Callable[[Path], Path]] = {
    "tar.gz of folders": lambda root: write_tar(root / "x.tar.gz", by_class()),
    "kaggle folder": lambda root: write_folder(root / "x", kaggle()),
    "kaggle zip": lambda root: write_zip(root / "x.zip", kaggle()),
    "published": lambda root: published(root / "x"),
    "published, by its train archive": lambda root: published(root / "x") / "ILSVRC2012_img_train.tar",
    "webdataset": lambda root: webdataset(root / "x"),
    "parquet": lambda root: parquet(root / "x"),
    "parquet of older names": lambda root: parquet(root / "x", suffix=True),
}


def prepared(path: Path, root: Path, **changes) -> list[Prepared]:
    values = {"name": "imagenet", "source": SourceKind.imagenet, "px": 16, "workers": 0, "official": False}
    return prepare(PrepareConfig(**{**values, "root": str(root / "stores"), "path": str(path), **changes}))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    root = tmp_path_factory.mktemp("expected")
    return prepared(write_folder(root / "x", by_class()), root)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_store(tmp_path: Path, form: str, expected: list[Prepared]) -> None:
    found = prepared(FORMS[form](tmp_path), tmp_path)
    assert [len(one.store) for one in found] == [20, 8]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.store.manifest["sha256"] == theirs.store.manifest["sha256"]
        assert [entry["wnid"] for entry in ours.store.classes] == list(WNIDS)
        assert ours.store.manifest["corrupt"] == []


def test_the_images_of_a_class_are_in_the_order_of_their_names(expected: list[Prepared]) -> None:
    names = sorted(TRAIN)
    assert expected[0].store.labels.tolist() == [class_of(name) for name in names]
    for row, name in enumerate(names):
        one = module.fit(module.decode(TRAIN[name]), 16, "area")
        assert np.array_equal(expected[0].store.images[row], np.asarray(one))


@pytest.mark.parametrize("form", ["kaggle folder", "published"])
def test_words_come_with_the_form(tmp_path: Path, form: str) -> None:
    train, _ = prepared(FORMS[form](tmp_path), tmp_path)
    assert [entry["words"] for entry in train.store.classes] == [f"word of {wnid}" for wnid in WNIDS]


@pytest.mark.parametrize("kit", [False, True])
def test_numbers_without_wnids_take_them_from_a_list_of_words(
    tmp_path: Path, kit: bool, expected: list[Prepared]
) -> None:
    root = tmp_path / "x"
    for split, images in (("train", TRAIN), ("val", VAL)):
        members = {}
        for k, name in enumerate(sorted(images, key=lambda name: (class_of(name), name))):
            members |= {f"{k:06d}.jpg": images[name], f"{k:06d}.cls": b"%d" % class_of(name)}
        root.mkdir(exist_ok=True)
        write_tar(root / f"{split}-0.tar", members, "w")
    with pytest.raises(UserError, match="class '0', which is no wnid"):
        prepared(root, tmp_path)
    train, _ = prepared(root, tmp_path / "own", source=SourceKind.folder)
    assert [entry["wnid"] for entry in train.store.classes] == ["0", "1", "2", "3"]
    if kit:
        write_tar(root / "ILSVRC2012_devkit_t12.tar.gz", development_kit())
    (tmp_path / "words").write_bytes(MAPPING)
    found = prepared(root, tmp_path, words=None if kit else str(tmp_path / "words"))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.store.manifest["sha256"] == theirs.store.manifest["sha256"]
        assert ours.store.classes[1] == {"wnid": WNIDS[1], "words": f"word of {WNIDS[1]}"}


def test_a_subset_reads_only_its_own_images_and_says_how_much(tmp_path: Path, monkeypatch) -> None:
    read: list[Slice] = []
    monkeypatch.setattr(module, "decode", lambda part, *rest: (read.append(part), REAL(part, *rest))[1])
    train, val = prepared(published(tmp_path / "x"), tmp_path, classes=[WNIDS[3], WNIDS[1]])
    wanted = [name for name in [*sorted(TRAIN), *VAL] if class_of(name) in (1, 3)]
    assert len(read) == len(train.store) + len(val.store) == len(wanted)
    size, whole = (
        sum(len({**TRAIN, **VAL}[name]) for name in wanted),
        sum(map(len, [*TRAIN.values(), *VAL.values()])),
    )
    assert sum(part.size for part in read) == size
    assert f"from {size / 1e6:,.2f} of the source's {whole / 1e6:,.2f} MB of pictures" in train.summary()


REAL = module.decode


@pytest.mark.parametrize("form", ["published", "webdataset", "parquet"])
def test_a_killed_job_continues_in_every_form(tmp_path: Path, monkeypatch, form: str, expected) -> None:
    class Killed(Exception):
        pass

    def write_rows(*given) -> None:
        if next(left, None) is None:
            raise Killed
        real(*given)

    real, left = module.write_rows, iter(range(2))
    path = FORMS[form](tmp_path)
    monkeypatch.setattr(module, "CHUNK", 4)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_rows", write_rows)
        with pytest.raises(Killed):
            prepared(path, tmp_path)
    decoded = []
    monkeypatch.setattr(module, "decode", lambda *given: (decoded.append(1), REAL(*given))[1])
    found = prepared(path, tmp_path)
    assert len(decoded) == 20 - 8 + 8
    assert [one.store.manifest["sha256"] for one in found] == [
        one.store.manifest["sha256"] for one in expected
    ]


def test_validation_images_without_a_list_are_refused(tmp_path: Path) -> None:
    path = published(tmp_path / "x")
    (path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(UserError, match=r"val/ flat.*LOC_val_solution.csv or ILSVRC2012_devkit_t12.tar.gz"):
        prepared(path, tmp_path)
    (path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n01440764 1 2 3 4\n"
    )
    with pytest.raises(UserError, match=r"val_00000002.JPEG is not in the list"):
        prepared(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("meta.mat", b"MATLAB 5.0 MAT-file" + bytes(200)),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\n99\n"),
        ("ILSVRC2012_validation_ground_truth.txt", b"1\nx\n"),
    ],
)
def test_a_damaged_development_kit_is_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    path = published(tmp_path / "x")
    kit = {file: content if file.endswith(name) else data for file, data in development_kit().items()}
    write_tar(path / "ILSVRC2012_devkit_t12.tar.gz", kit)
    with pytest.raises(UserError, match=r"cannot be read .*: fetch it again"):
        prepared(path, tmp_path)


@pytest.mark.parametrize("content", ["ILSVRC2012_val_00000001,\n", "ILSVRC2012_val_00000001\n", "a,b,c\n"])
def test_a_damaged_list_of_kaggle_is_one_line(tmp_path: Path, content: str) -> None:
    path = write_folder(tmp_path / "x", kaggle() | {"LOC_val_solution.csv": content.encode()})
    with pytest.raises(UserError, match=r"cannot be read .*: fetch it again"):
        prepared(path, tmp_path)


def test_a_parquet_file_without_images_names_its_columns(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"its columns are text, label"):
        prepared(tmp_path / "train.parquet", tmp_path)
    (tmp_path / "train.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:-30])
    with pytest.raises(UserError, match="not a whole archive"):
        prepared(tmp_path / "train.parquet", tmp_path)


def test_parquet_classes_have_the_names_that_the_files_carry(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": encoded(picture(k)), "path": None} for k in range(6)]
    features = {"info": {"features": {"label": {"names": ["owl", "cat"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": cells, "label": [0, 1, 0, 1, 0, 1]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": json.dumps(features)}), tmp_path / "train.parquet"
    )
    (train,) = prepared(tmp_path / "train.parquet", tmp_path, source=SourceKind.folder)
    assert [entry["wnid"] for entry in train.store.classes] == ["cat", "owl"]
    rows = [1, 3, 5, 0, 2, 4]  # by class, then as they lie in the file
    expected = [np.asarray(module.fit(module.decode(cells[row]["bytes"]), 16, "area")) for row in rows]
    assert np.array_equal(train.store.images, expected)


def test_a_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(20))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: python -m pip install -e '\.\[parquet\]'"):
        prepared(tmp_path / "train.parquet", tmp_path)
