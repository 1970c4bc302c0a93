"""Evaluation against slow, obvious versions."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from alexnet.data.store import Store
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate, _write, evaluate
from alexnet.training.scoring import PAPER_ROWS, average, log_probabilities, paper_rows, score, table

CLASSES = 7


class Flips(nn.Module):
    """Ten views made by hand: the image, brightened by 0, 1, ..., 9."""

    def centre(self, images):
        return images.permute(0, 3, 1, 2).float()

    def ten_views(self, images):
        return torch.stack([self.centre(images) + view for view in range(10)], 1)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(27, CLASSES), nn.Dropout(0.5))


def pictures(n=11):
    return np.random.default_rng(0).integers(0, 8, (n, 3, 3, 3)).astype(np.uint8)


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("batch_size", [1, 40, 1000])
def test_probabilities_are_averaged_over_views_before_the_logarithm(views, batch_size):
    model, images = network(), pictures()
    actual = log_probabilities(model, Flips(), images, views, batch_size)
    for n, image in enumerate(images):
        x = torch.from_numpy(image).permute(2, 0, 1).float()
        p = sum(model.eval()(x[None] + view).softmax(1) for view in range(views)) / views
        torch.testing.assert_close(actual[n], p.log()[0].detach())


def test_index_reads_its_rows_of_a_read_only_map_in_order(tmp_path):
    np.save(tmp_path / "images.npy", pictures())
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    everything = log_probabilities(network(), Flips(), torch.from_numpy(pictures()))
    some = log_probabilities(network(), Flips(), mapped, batch_size=2, index=np.array([9, 2, 5]))
    torch.testing.assert_close(some, everything[[9, 2, 5]])


def test_training_mode_is_restored_and_not_used():
    model = network().train()
    frozen = next(module for module in model.modules() if module is not model).eval()
    twice = [log_probabilities(model, Flips(), pictures()) for _ in range(2)]
    assert model.training
    assert not frozen.training
    torch.testing.assert_close(*twice, rtol=0, atol=0)  # dropout was off


def test_ensemble_averages_probabilities():
    log_probs = [torch.randn(5, CLASSES).log_softmax(1) for _ in range(3)]
    expected = torch.stack([p.exp() for p in log_probs]).mean(0)
    torch.testing.assert_close(average(log_probs).exp(), expected)


def test_score_counts_by_hand():
    log_probs = torch.tensor([[6, 5, 4, 3, 2, 1, 0.0]] * 4).log_softmax(1)
    result = score(log_probs, torch.tensor([0, 4, 5, 6]))  # right; in the top five; twice outside it
    assert (result.top1_error.value, result.top5_error.value) == (0.75, 0.5)
    assert result.cross_entropy.value == pytest.approx(-sum(log_probs[0, c].item() for c in (0, 4, 5, 6)) / 4)


def test_intervals_are_wilson_and_normal():
    n, wrong = 200, 3
    log_probs = torch.randn(n, CLASSES, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    labels = log_probs.argmax(1)
    labels[:wrong] = log_probs[:wrong].argmin(1)
    result = score(log_probs, labels)
    p, z = wrong / n, 1.959964
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    assert result.top1_error == pytest.approx((p, centre - half, centre + half))
    losses = [-log_probs[i, label].item() for i, label in enumerate(labels)]
    mean, half = np.mean(losses), z * np.std(losses, ddof=1) / math.sqrt(n)
    assert result.cross_entropy == pytest.approx((mean, mean - half, mean + half))


@pytest.mark.parametrize(("classes", "reported"), [(5, False), (6, True)])
def test_top5_is_left_out_where_it_means_nothing(classes, reported):
    result = score(torch.randn(4, classes).log_softmax(1), torch.zeros(4))
    assert (result.top5_error is not None) == reported
    assert table([result])
    assert json.loads(json.dumps(result.as_dict()))["top1_error"] == result.top1_error.value


@pytest.mark.parametrize(
    ("log_probs", "labels", "words"),
    [
        (torch.zeros(2, 3), [0, 3], "3 outputs"),
        (torch.full((2, 3), torch.nan), [0, 1], "not a number for 2 of 2"),
        (torch.zeros(2, 3), [0, 1, 1], "3 labels"),
        (torch.zeros(1, 3), [0], "at least two"),
    ],
)
def test_score_refuses_what_it_cannot_measure(log_probs, labels, words):
    with pytest.raises(UserError, match=words):
        score(log_probs, torch.tensor(labels))


def test_other_numbers_of_views_and_unequal_networks_are_refused():
    with pytest.raises(UserError, match="views=5"):
        log_probabilities(network(), Flips(), pictures(), views=5)
    with pytest.raises(UserError, match="split is empty"):
        log_probabilities(network(), Flips(), pictures(0))
    with pytest.raises(UserError, match="same classes"):
        average([torch.zeros(2, 3), torch.zeros(2, 4)])


def test_paper_rows_need_imagenet_and_the_same_protocol():
    wnids = [f"n{i:08d}" for i in range(1000)]
    assert [r.top1_error for r in paper_rows(wnids, 1, 10)] == [0.407, 0.375]
    assert [r.top1_error for r in paper_rows(wnids, 1, 1)] == [0.390]
    assert [r.top5_error for r in paper_rows(wnids, 5, 10)] == [0.164]
    assert paper_rows(wnids[:200], 1, 10) == []
    assert paper_rows([f"class{i}" for i in range(1000)], 1, 10) == []


def test_table_is_at_most_100_columns_and_in_percent():
    log_probs = torch.randn(100_000, CLASSES, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    labels = torch.zeros(len(log_probs))
    result = score(log_probs, labels, split="holdout", views=10, networks=5, name="a/very/long/" * 9 + "end")
    text = table([result, score(log_probs, labels)], PAPER_ROWS)
    assert max(map(len, text.splitlines())) <= 100
    assert f"{100 * result.top1_error.value:.2f} (" in text
    assert "/end  holdout" in text
    assert "38.1" in text


def records(tmp_path, *checkpoints, views=1, **keys):
    """The records that evaluating these checkpoints leaves, by their path under tmp_path."""
    store = Store(tmp_path / "val", *[np.zeros(1)] * 2, {"sha256": {}}, None)
    config = Evaluate(list(checkpoints), views=views, output_dir=str(tmp_path), **keys)
    written = _write(config, [tmp_path / c for c in checkpoints], store, [], [], {})
    return written.relative_to(tmp_path)


def test_no_record_takes_the_place_of_another(tmp_path):
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "run.json").touch()
    best, last, other = "a/checkpoints/best.ckpt", "a/checkpoints/last.ckpt", "b/checkpoints/best.ckpt"
    loose = [["x.ckpt"], ["c/x.ckpt"], ["y.ckpt"]]  # of no run
    asked = [[best], [last], [other], [best, last], [best, other], [best, last, other], *loose]
    names = [records(tmp_path, *checkpoints) for checkpoints in asked]
    assert len(set(names)) == len(asked)
    assert names == [records(tmp_path, *reversed(checkpoints)) for checkpoints in asked]  # and again the same
    assert records(tmp_path, best, last, views=10) not in names
    assert str(names[0]) == "a/evaluate-val-1view.json"
    assert str(names[1]) == "a/evaluate-last-val-1view.json"


def test_a_copy_of_the_record_goes_where_json_says(tmp_path):
    record = records(tmp_path, "x.ckpt", json=str(tmp_path / "here" / "mine.json"))
    assert (tmp_path / "here" / "mine.json").read_text() == (tmp_path / record).read_text()


def test_errors_by_class_stand_beside_the_record(photos, checkpoint, tmp_path, capsys):
    data = str(photos.parent / "data")
    config = Evaluate(str(checkpoint), per_class=True, data_dir=data, output_dir=str(tmp_path))
    (result,) = evaluate(config)
    (record,) = (tmp_path / "evaluate").glob("*.json")
    rows = list(csv.DictReader(record.with_name(f"{record.stem}-classes.csv").read_text().splitlines()))
    assert {row["wnid"] for row in rows} == {"cat", "dog", "owl"}
    total = sum(float(row["error"]) * int(row["images"]) for row in rows) / result.n
    assert total == pytest.approx(result.top1_error.value)
    assert [float(row["error"]) for row in rows] == sorted(
        (float(row["error"]) for row in rows), reverse=True
    )
    assert sum(b["n"] for b in json.loads(record.read_text())["calibration"]["bins"]) == result.n
    assert record.with_name(f"{record.stem}-classes.png").exists()
    assert "taken for" in capsys.readouterr().out
