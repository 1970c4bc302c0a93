"""What is measured of a finished run, against slow versions and against what the run says itself."""

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.claims.conftest import directory as run

from alexnet.claims.claims import Claim, Features, Figure, Nets, Test
from alexnet.claims.measures import (
    Want,
    _save,
    chroma,
    evidence,
    is_measured,
    measure,
    nearest,
    per_image,
    record_failure,
    spread,
    wanted,
)
from alexnet.data.store import open_store
from alexnet.training.checkpoint import load
from alexnet.training.probe import probe


def test_chroma_is_nothing_for_grey_and_all_for_opponent_colours():
    grey = torch.randn(1, 1, 5, 5).expand(1, 3, 5, 5)
    opponent = torch.randn(1, 1, 5, 5) * torch.tensor([1.0, -3.0, 2.0]).view(1, 3, 1, 1)
    red = torch.randn(1, 1, 5, 5) * torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1)
    found = chroma(torch.cat([grey, opponent, red]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2 / 3]))
    assert chroma(torch.randn(500, 3, 7, 7)).mean() == pytest.approx(2 / 3, abs=0.01)


def test_neighbours_are_the_six_nearest_of_the_gallery_nearest_first(monkeypatch):
    """Against sorting all distances; parts of 16 make the merging visible."""
    monkeypatch.setattr("alexnet.claims.measures.GALLERY_PART", 16)
    rng = np.random.default_rng(0)
    queries, gallery = (rng.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (5, 70))
    rows = np.flatnonzero(rng.random(70) < 0.7)
    found = nearest(lambda x: x.flatten(1), queries, np.array([4, 0, 2]), gallery, rows, torch.device("cpu"))
    for row, query in zip(found, (4, 0, 2), strict=True):
        far = ((gallery[rows].astype(float) - queries[query].astype(float)) ** 2).sum((1, 2, 3))
        np.testing.assert_array_equal(row, rows[far.argsort()[:6]])


def test_spread_takes_from_first_to_last():
    np.testing.assert_array_equal(spread(np.arange(100, 200), 4), [100, 133, 166, 199])
    np.testing.assert_array_equal(spread(np.arange(3), 10), [0, 1, 2])


def test_a_kill_while_writing_leaves_no_measure(tmp_path):
    class Broken:
        def __array__(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _save(tmp_path / Want.one_view, {"labels": np.arange(2), "log_probs": Broken()})
    assert list(tmp_path.iterdir()) == []
    assert not is_measured(tmp_path, [Want.one_view])


def test_claims_ask_for_what_their_tests_need():
    claim = Claim(
        "c",
        "",
        "",
        "",
        tests={"a": Test(views=10), "b": Test(features=Features.pixels)},
        figure=Figure.retrieval,
    )
    every = {Want.basic, Want.ten_views, Want.hidden}
    assert wanted(claim, 1) == every | {Want.pixels, Want.figure4}
    assert wanted(claim, 2) == every
    assert wanted(Claim("c", "", "", "", figure=Figure.kernels), 1) == {Want.basic, Want.kernels}


def test_val_is_measured_without_a_view_that_no_claim_asks_for(finished, tmp_path, compose):
    shutil.copytree(run(finished, "base"), moved := tmp_path / "seed1")
    said = json.loads((moved / Want.basic).read_text())["results"]["val"]
    for want in (Want.one_view, Want.basic):
        (moved / want).unlink()
    measure(moved, compose("data.name=synthetic"), [Want.basic])
    assert json.loads((moved / Want.basic).read_text())["results"]["val"] == said
    assert not (moved / Want.one_view).exists()


def test_one_view_of_val_is_what_the_measures_say_of_it(finished):
    said = json.loads((run(finished, "base") / Want.basic).read_text())["results"]["val"]
    values = per_image(Test(), [run(finished, "base")])
    assert values["val/top1_error"].shape == (1, 40)
    assert values["val/top1_error"].mean() == said["top1_error"]
    assert values["val/cross_entropy"].mean() == pytest.approx(said["cross_entropy"], rel=1e-6)
    assert values["val/top5_error"].mean() == said["top5_error"]


def test_every_measure_is_of_the_network_at_the_end_of_training(finished, tmp_path, compose):
    """Not of the epoch with the lowest holdout error: with a broken best.ckpt nothing changes."""
    directory = run(finished, "base")
    moved = tmp_path / "seed1"
    shutil.copytree(directory, moved)
    (moved / "checkpoints" / "best.ckpt").write_bytes(b"")
    for want in (Want.one_view, Want.basic):
        (moved / want).unlink()
    measure(moved, compose("data.name=synthetic"), [Want.basic, Want.one_view])
    there, here = (json.loads((d / Want.basic).read_text())["results"] for d in (directory, moved))
    for split in ("train", "holdout", "val"):
        assert here[split]["cross_entropy"] == pytest.approx(there[split]["cross_entropy"], rel=1e-6)
    rows = (directory / "metrics.csv").read_text().splitlines()
    last = dict(zip(rows[0].split(","), rows[-1].split(","), strict=True))
    assert here["holdout"]["cross_entropy"] == pytest.approx(float(last["holdout/loss"]), rel=1e-4)


def test_ten_views_are_another_answer_to_the_same_images(finished):
    one, ten = (per_image(Test(views=v), [run(finished, "base")])["val/cross_entropy"] for v in (1, 10))
    assert one.shape == ten.shape
    assert np.abs(one - ten).max() > 0
    assert np.abs(one - ten).mean() < 0.5


def canned(directory: Path, probabilities: list[list[float]]) -> Path:
    directory.mkdir()
    np.savez(directory / Want.one_view, log_probs=np.log(np.float32(probabilities)), labels=np.array([0, 1]))
    return directory


def test_an_ensemble_averages_probabilities(tmp_path):
    """Logits averaged would say class 1 for the first image: geometric means .30 and .39."""
    runs = [
        canned(tmp_path / "a", [[0.90, 0.10], [0.2, 0.8]]),
        canned(tmp_path / "b", [[0.02, 0.98], [0.2, 0.8]]),
        canned(tmp_path / "c", [[0.65, 0.35], [0.8, 0.2]]),
    ]
    single = per_image(Test(nets=Nets.one), runs)["val/top1_error"]
    np.testing.assert_array_equal(single, [[0, 0], [1, 0], [0, 1]])
    together = per_image(Test(nets=Nets.all), runs)
    np.testing.assert_array_equal(together["val/top1_error"], [[0, 0]])
    assert together["val/cross_entropy"][0, 0] == pytest.approx(-math.log((0.90 + 0.02 + 0.65) / 3), rel=1e-6)
    assert "val/top5_error" not in together  # of two classes the top five are never wrong


def test_retrieval_counts_neighbours_of_the_query_s_class(finished):
    values = per_image(Test(features=Features.hidden), [run(finished, "base", seed) for seed in (1, 2)])
    precision = values["retrieval/precision_at_6"]
    assert precision.shape == (2, 40)
    found = np.load(run(finished, "base") / Want.hidden)
    synthetic = Path(finished.data_dir) / "synthetic"
    train, val = (np.load(synthetic / split / "labels.npy") for split in ("train", "val"))
    same = train[found["neighbours"]] == val[found["queries"]][:, None]
    np.testing.assert_array_equal(precision[0], same.mean(1))
    holdout = open_store(synthetic / "train").holdout()[1]
    assert not np.isin(found["neighbours"], holdout).any()


def test_training_images_are_seen_once_more_in_evaluation_mode(finished):
    directory = run(finished, "base")
    result = json.loads((directory / Want.basic).read_text())["results"]["train"]
    classifier = load(directory)
    store = open_store(Path(finished.data_dir) / "synthetic" / "train")
    rows = store.holdout()[0]
    assert result["n"] == len(rows) == 110  # without the ten of the holdout
    images, labels = torch.from_numpy(store.images[rows]), torch.from_numpy(store.labels[rows])
    with torch.inference_mode():
        loss = torch.nn.functional.cross_entropy(classifier(classifier.augment.centre(images)), labels)
    assert result["cross_entropy"] == pytest.approx(float(loss), rel=1e-5)


def test_the_probe_sees_the_network_before_training(finished, compose):
    from alexnet.training import assemble

    directory = run(finished, "base")
    config = compose("data.name=synthetic")
    measure(directory, config, [Want.probe])
    said = json.loads((directory / Want.probe).read_text())
    (directory / Want.probe).unlink()
    trained = load(directory)
    fresh = type(trained)(**trained.arguments, statistics=assemble.image_data(config).statistics)
    rows = spread(assemble.image_data(config).split[0].numpy(), 64)
    store = assemble.image_data(config).train_store
    images, labels = torch.from_numpy(store.images[rows]), torch.from_numpy(store.labels[rows])
    assert said["loss"] == pytest.approx(
        probe(fresh.net, fresh.augment.centre(images), labels).loss, rel=1e-5
    )
    assert said["loss"] != pytest.approx(
        probe(trained.net, trained.augment.centre(images), labels).loss, rel=1e-5
    )


def test_evidence_joins_the_record_and_the_measures(finished):
    found = evidence(run(finished, "base"))
    assert {
        "val/top1_error",
        "train_eval/top1_error",
        "holdout/top1_error",
        "conv1/chroma_split",
    } <= found.results.keys()
    assert found.classes == 10
    assert [epoch for epoch, _ in found.curves["train/loss"]] == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_diverged_run_is_evidence_of_nothing_but_its_curves(finished, tmp_path):
    record = json.loads((run(finished, "base") / "run.json").read_text()) | {"state": "running"}
    del record["self"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "metrics.csv").write_bytes((run(finished, "base") / "metrics.csv").read_bytes())
    assert evidence(tmp_path) is None
    record_failure(tmp_path, "the loss is nan")
    found = evidence(tmp_path)
    assert math.isnan(found.results["val/top1_error"])
    assert math.isnan(found.results["train_eval/cross_entropy"])
    assert len(found.curves["train/loss"]) == 3
    assert found.diverged
    assert is_measured(tmp_path, [Want.ten_views])


@pytest.mark.parametrize("column", ["train/loss", "holdout/loss"])
def test_a_run_that_ends_finished_with_a_loss_that_is_no_number_has_diverged(finished, tmp_path, column):
    """watchdog=warn goes on to the end, and best.ckpt is of an epoch before."""
    shutil.copytree(run(finished, "base"), tmp_path / "seed1")
    assert not evidence(tmp_path / "seed1").diverged
    with (tmp_path / "seed1" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    rows[-1][column] = "nan"
    with (tmp_path / "seed1" / "metrics.csv").open("w") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    found = evidence(tmp_path / "seed1")
    assert found.diverged
    assert math.isnan(found.results["val/top1_error"])
