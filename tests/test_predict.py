"""Predictions of pictures are those of evaluation; what cannot be read is named."""

import csv
import io
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet.cli import SCRIPTS
from alexnet.errors import UserError
from alexnet.predict import Predict, predict
from alexnet.training.checkpoint import load
from alexnet.training.scoring import log_probabilities


def written(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "predict/predictions.json").read_text())


@pytest.mark.parametrize("views", [1, 10])
def test_predictions_equal_evaluation_on_a_store_of_the_same_files(
    views: int, photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    from alexnet.data.store import open_store

    assert predict(Predict(str(checkpoint), str(photos), views=views, top=3, output_dir=str(tmp_path)))
    stored = np.concatenate([open_store(photos.parent / f"data/photos/{s}").images for s in ("train", "val")])
    classifier = load(checkpoint)
    p = log_probabilities(classifier.net, classifier.augment, stored, views).exp().topk(3)
    expected = sorted(zip(p.indices.tolist(), p.values.tolist(), strict=True), key=str)
    wnids = [c["wnid"] for c in classifier.classes]
    found = [
        ([wnids.index(one["wnid"]) for one in row["top"]], [one["probability"] for one in row["top"]])
        for row in written(tmp_path)["predictions"]
    ]
    for (labels, values), (right, exact) in zip(sorted(found, key=str), expected, strict=True):
        assert labels == right
        assert values == pytest.approx(exact, rel=1e-5)


def test_table_csv_and_contact_sheet_say_the_same(
    photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(Predict(str(checkpoint), str(photos / "*/1.jpg"), top=2, output_dir=str(tmp_path)))
    rows = list(csv.DictReader((tmp_path / "predict/predictions.csv").read_text().splitlines()))
    first = written(tmp_path)["predictions"][0]
    assert [row["image"] for row in rows] == [
        str(photos / f"{c}/1.jpg") for c in ["cat", "cat", "dog", "dog", "owl", "owl"]
    ]
    assert float(rows[0]["probability"]) == pytest.approx(first["top"][0]["probability"], abs=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert f"{first['top'][0]['words']} {100 * first['top'][0]['probability']:.1f} %" in lines[0]
    assert max(len(line) for line in lines[:3]) <= 100
    with Image.open(tmp_path / "predict/predictions.png") as sheet:
        assert sheet.width > sheet.height / 2


def test_an_unreadable_picture_is_named_and_the_rest_goes_on(
    photos: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes((photos / "cat/0.jpg").read_bytes()[:300])
    images = [str(bad), str(photos / "dog/0.jpg")]
    assert not predict(Predict(str(checkpoint), images, output_dir=str(tmp_path)))
    assert list(written(tmp_path)["unreadable"]) == [str(bad)]
    assert [row["image"] for row in written(tmp_path)["predictions"]] == images[1:]
    assert str(bad) in capsys.readouterr().err


@pytest.mark.parametrize("names", [False, True])
def test_standard_input_is_a_picture_or_names_of_pictures(
    names: bool, photos: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = photos / "owl/2.jpg"
    content = f"{file}\n\n".encode() if names else file.read_bytes()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    predict(Predict(str(checkpoint), "-", output_dir=str(tmp_path)))
    (row,) = written(tmp_path)["predictions"]
    assert row["image"] == (str(file) if names else "standard input")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("nowhere.jpg", "images=nowhere.jpg: there is no such file or folder"),
        ("{empty}", "holds no picture"),
        ("{text}", "none of 1 pictures can be read"),
    ],
)
def test_what_cannot_be_predicted_is_one_line(
    images: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no picture")
    given = images.format(empty=tmp_path / "empty", text=tmp_path / "text.jpg")
    with pytest.raises(UserError, match=message) as error:
        predict(Predict(str(checkpoint), given, output_dir=str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("views", 5, "views=5 must be 1"),
        ("top", 0, "top=0 must be a positive integer"),
        ("images", None, "images is not given"),
        ("checkpoint", None, "checkpoint is not given"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Predict(**{"checkpoint": "a", "images": "b", key: value})


def seconds(*command: str) -> float:
    """CPU seconds of a process of its own: other processes do not lengthen them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_lightning_and_other_slow_imports_are_not_for_a_prediction(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    code = f"""
import sys
from alexnet.evaluate import Evaluate
from alexnet.predict import Predict, predict
assert predict(Predict({str(checkpoint)!r}, {str(photos / "cat/1.jpg")!r}, output_dir={str(tmp_path)!r}))
slow = {{"lightning", "torchmetrics", "torchvision", "torch._dynamo", "scipy.stats"}}
assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    assert seconds("-c", code)


@pytest.mark.slow
def test_a_prediction_takes_hardly_longer_than_to_import_torch(
    photos: Path, checkpoint: Path, tmp_path: Path
) -> None:
    picture = [f"checkpoint={checkpoint}", f"images={photos / 'cat/1.jpg'}", f"output_dir={tmp_path}"]
    torch_alone = min(seconds("-c", "import torch") for _ in range(2))
    # 1.7 times when this was written, 3.3 times with Lightning.
    assert min(seconds(str(SCRIPTS / "predict.py"), *picture) for _ in range(2)) < 2.5 * torch_alone
