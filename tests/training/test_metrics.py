"""metrics.csv: what is written is what is read, also from files of before, and it fits the checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_resume import Crash, crash_at, ended

from alexnet.errors import UserError
from alexnet.training import assemble
from alexnet.training.metrics import HEADER, Kind, read_metrics
from alexnet.training.run import train

OLD = (
    HEADER.replace(",kind", "")
    + """\
10,0,0.01,2.25,0.875,,,,300.0,1.0
20,0,0.01,2.0,0.75,,,,100.0,2.0
20,0,0.01,2.125,0.8125,2.5,0.75,0.5,,2.5
30,1,0.01,1.5,0.5,,,,320.0,3.0
40,1,0.01,1.0,0.25,,,,310.0,4.0
40,1,0.01,1.25,0.375,1.5,0.625,0.25,,4.5
"""
)


def new(old: str) -> str:
    lines = old.splitlines()[1:]
    kinds = ["steps", "steps", "epoch"] * 2
    return HEADER + "".join(f"{line},{kind}\n" for line, kind in zip(lines, kinds, strict=True))


def test_rows_say_their_kind_and_files_without_it_are_read_alike(tmp_path: Path) -> None:
    old, path = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text(OLD)
    path.write_text(new(OLD))
    metrics = read_metrics(path)
    assert metrics.rows == read_metrics(old).rows
    assert [row.step for row in metrics.epochs] == [20, 40]
    assert metrics.epochs[-1].holdout == {"loss": 1.5, "top1_error": 0.625, "top5_error": 0.25}
    assert metrics.steps_done == 40
    assert metrics.images_per_second == 305.0
    assert metrics.last_train == {"loss": 1.25, "top1_error": 0.375}


def test_few_epochs_are_drawn_by_steps_and_many_by_their_means_at_their_middles(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(OLD)
    metrics = read_metrics(path)
    assert metrics.curves("loss")["train"] == ([0.5, 1, 1.5, 2], [2.25, 2, 1.5, 1])
    assert metrics.curves("loss")["holdout"] == ([1, 2], [2.5, 1.5])
    assert metrics.train_by_steps("top1_error")[-1] == (2, 0.25)
    epochs = (f"{10 * (e + 1)},{e},0.01,7,0.5,{e},0.5,,,1.0,epoch\n" for e in range(25))
    path.write_text(HEADER + "".join(epochs))
    assert read_metrics(path).curves("loss")["train"] == ([e + 0.5 for e in range(25)], [7.0] * 25)
    assert read_metrics(tmp_path / "none.csv").curves("loss") == {}


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(OLD + "50,2,0.01,1.0,0.2")
    assert read_metrics(tmp_path / "metrics.csv").steps_done == 40


@pytest.mark.parametrize("damage", [b"\xff\xfe", b"50,x,0.01,1.0\n", b"\0\0\0\0\n", b",,,\n"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.csv"
    path.write_bytes(OLD.encode() + damage + b"\n")
    with pytest.raises(UserError, match=r"metrics.csv is damaged") as caught:
        read_metrics(path)
    assert "\n" not in str(caught.value)


def interrupted(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    config = compose("optim.epochs=1", "evaluate=false", *more)
    with monkeypatch.context() as patch:
        crash_at(patch, 4)
        with pytest.raises(Crash):
            train(config)
    return config


@pytest.mark.parametrize("content", [None, b"\0" * 400])
def test_whatever_became_of_the_file_it_fits_the_checkpoint_after_a_resume(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    config = interrupted(compose, monkeypatch)
    path = assemble.run_directory(config) / "metrics.csv"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    train(config)
    rows = read_metrics(path).rows
    assert [(row.step, row.kind) for row in rows] == [
        *((step, Kind.steps) for step in (2, 4, 6)),
        (7, Kind.epoch),
    ]


def as_written_by_4b49d20(directory: Path) -> None:
    """Its checkpoints know how long the file was, which has no column of kinds."""
    checkpoint = directory / "checkpoints" / "last.ckpt"
    content = torch.load(checkpoint, weights_only=True)
    state = content["callbacks"]["MetricsFile"]
    old = "".join(line.rpartition(",")[0] + "\n" for line in state.pop("text").splitlines())
    (directory / "metrics.csv").write_text(old + "6,0,0.01,9,1,,,,1,1\n")
    state["bytes"] = len(old)
    torch.save(content, checkpoint)


def test_a_run_of_before_goes_on_and_a_file_that_is_too_short_is_refused(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = interrupted(compose, monkeypatch)
    directory = assemble.run_directory(config)
    as_written_by_4b49d20(directory)
    path, whole = directory / "metrics.csv", (directory / "metrics.csv").read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"metrics.csv does not fit the last checkpoint .*overwrite=true"):
        train(config)
    path.write_bytes(whole)
    train(config)
    straight = compose("optim.epochs=1", "evaluate=false", "name=straight")
    train(straight)
    assert ended(directory)[1] == ended(assemble.run_directory(straight))[1]


def test_the_rate_on_record_is_that_of_the_weights(compose: Callable[..., Any]) -> None:
    config = compose(
        "optim.epochs=1", "optim.bias_lr_mult=2", "optim.lr=0.03", "optim.schedule=constant", "evaluate=false"
    )
    train(config)
    rows = ended(assemble.run_directory(config))[1]
    assert {row["lr"] for row in rows} == {"0.03"}
