"""Runs side by side: sorted by error, with the keys in which they differ."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import SMALL_NET

from alexnet.cli import SCRIPTS, WIDTH, command
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate, evaluate
from alexnet.training.compare import compare, table
from alexnet.training.config import Train
from alexnet.training.run import after_sweep, train


def result(split: str, wrong: int) -> dict[str, Any]:
    interval = {"top1_error_interval": [0, 1], "cross_entropy_interval": [0, 2], "cross_entropy": 1.0}
    protocol = {"split": split, "views": 1, "n": 40, "networks": 1}
    return {**protocol, "top1_error": wrong / 40, "top5_error": None, **interval}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three runs: the holdout and val disagree about the best, and one is not finished."""
    for name, lr, holdout, val in (("a", 0.01, 30, 2), ("b/c", 0.02, 10, 4), ("d", 0.01, None, None)):
        directory = tmp_path / "train" / name / "seed0"
        directory.mkdir(parents=True)
        results = (
            {"holdout": result("holdout", holdout), "val": result("val", val)} if holdout and val else {}
        )
        config = {"name": name, "seed": 0, "optim": {"lr": lr, "epochs": 2}, "model": {"lrn": name == "d"}}
        state = {"state": "finished", "seconds": 90.0} if results else {"state": "interrupted"}
        (directory / "run.json").write_text(json.dumps({"config": config, **state, "results": results}))
    return tmp_path / "train"


def test_runs_are_sorted_by_the_holdout_and_show_what_differs(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(Evaluate(compare=str(runs), output_dir=str(tmp_path)))
    above, head, *lines, _, record = capsys.readouterr().out.splitlines()
    assert above == f"runs below {runs}: 3"
    assert head.split()[:3] == ["run", "lr", "lrn"]
    assert [line.split()[0] for line in lines] == ["b/c/seed0", "a/seed0", "d/seed0"]
    assert lines[0].split() == [
        "b/c/seed0",
        "0.02",
        "False",
        "25.00",
        "(0.0-100.0)",
        "10.00",
        "(0.0-100.0)",
        "1.5",
    ]
    assert lines[2].split() == ["d/seed0", "0.01", "True", "-", "-", "interrupted"]
    written = json.loads(Path(record.removeprefix("record ")).read_text())["runs"]
    assert [row["differs"] for row in written] == [
        {"optim.lr": 0.02, "model.lrn": False},
        {"optim.lr": 0.01, "model.lrn": False},
        {"optim.lr": 0.01, "model.lrn": True},
    ]
    assert written[0]["results"]["val"]["top1_error"] == 0.1


def test_a_table_is_never_wider_than_a_terminal(runs: Path) -> None:
    rows = compare([runs / "a" / "seed0", runs / "b" / "c" / "seed0"])
    rows = [{**row, "differs": {f"group.{'long' * k}": 10**k for k in range(6)}} for row in rows]
    *lines, more = table(rows).splitlines()
    assert max(map(len, lines[1:])) <= WIDTH
    assert "long" in lines[1]
    assert more == "they differ also in group.longlonglonglong, group.longlonglonglonglong"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compare": "nowhere"}, "compare=nowhere holds no run.json"),
        ({"compare": "a", "checkpoint": "b"}, "leave checkpoint out, or compare"),
        ({}, r"use checkpoint=.*compare=<directory>"),
    ],
)
def test_what_cannot_be_compared_is_one_line(settings: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(Evaluate(**settings))


def test_a_sweep_ends_with_the_table_of_its_runs(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = [f"data_dir={data_dir}", f"output_dir={tmp_path}", *SMALL_NET, "optim.epochs=1", "evaluate=false"]
    sweep = ["name=lr${optim.lr}", "optim.lr=0.01,0.02"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "train.py"), "-m", *where, *sweep])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    command("train", Train, after_sweep=after_sweep)(train)()
    said = capsys.readouterr().out.splitlines()
    head = said.index(f"runs below {tmp_path / 'train'}: 2")
    assert {line.split()[0] for line in said[head + 2 : head + 4]} == {"lr0.01/seed0", "lr0.02/seed0"}
    assert said[-1].endswith(f"python scripts/evaluate.py compare={tmp_path / 'train'}")
