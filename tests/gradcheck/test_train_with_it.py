"""A path is a backend: training, evaluation and the checks with the reader's own gradient."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.claims.conftest import REDUCED, reduced
from tests.gradcheck.test_reader import written

from alexnet.claims.jobs import claims_of, jobs_of
from alexnet.claims.measures import evidence
from alexnet.claims.runner import run_job
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate, evaluate
from alexnet.gradcheck import run as gradcheck
from alexnet.gradcheck.config import CheckGradients
from alexnet.gradcheck.exercises import exercise_named
from alexnet.layers import Backends
from alexnet.layers.pair import PAIRS
from alexnet.training import assemble
from alexnet.training.checkpoint import load
from alexnet.training.run import train

RELU = """
def relu_forward(x):
    y = x.clamp(min=0)
    return y, y


def relu_backward(dy, y):
    return dy.masked_fill(y <= 0, 0)
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A right ReLU, in the reader's file."""
    path = tmp_path / "own.py"
    path.write_text(RELU)
    return path


def weights(directory: Path) -> dict[str, Any]:
    content = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    return {"epoch": content["epoch"], **content["state_dict"]}


def assert_equal_bits(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])), name


@pytest.mark.parametrize("operation", ["linear", "local_response_norm", "max_pool2d"])
def test_a_run_with_a_copied_right_gradient_has_the_bits_of_the_ordinary_one(
    operation: str, compose: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.py"
    path.write_text(written(exercise_named(operation)))
    short = ("optim.epochs=1", "evaluate=false")
    ordinary = compose("name=ordinary", *short)
    mine = compose("name=mine", f"backend.{operation}={path}", *short)
    for config in (ordinary, mine):
        train(config)
    assert_equal_bits(assemble.run_directory(mine), assemble.run_directory(ordinary))
    assert f"gradients   yours: {operation} from own.py (sha256 " in capsys.readouterr().out
    record = json.loads((assemble.run_directory(mine) / "run.json").read_text())
    assert record["config"]["backend"][operation] == record["resolved"]["yours"][operation]
    assert record["resolved"]["backend"][operation] == str(path)


def test_resuming_with_a_changed_file_is_refused_with_the_difference(
    own: Path, compose: Callable[..., Any]
) -> None:
    config = (f"backend.relu={own}", "optim.epochs=1", "evaluate=false")
    train(compose(*config))
    assemble.build_run(compose(*config))
    own.write_text(RELU + "\n")
    different = r"backend\.relu: own\.py \(sha256 \w{16}\) there, own\.py \(sha256 \w{16}\) now"
    with pytest.raises(UserError, match=different):
        assemble.build_run(compose(*config))


def test_a_path_in_a_checkpoint_or_a_record_is_never_imported(
    own: Path, compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose(f"backend.relu={own}", "optim.epochs=1", "evaluate=false")
    train(config)
    directory, marker = assemble.run_directory(config), tmp_path / "it ran"
    own.write_text(f"open({str(marker)!r}, 'w').close()\n{RELU}")
    monkeypatch.delitem(PAIRS, ("relu", str(own)))  # as in another process
    record = json.loads((directory / "run.json").read_text())
    message = r"own\.py is a file, and a file is run only where the command line names it"
    for backend in (None, record["resolved"]["backend"]):
        with pytest.raises(UserError, match=message):
            load(directory, backend)
    evaluate(Evaluate(checkpoint=str(directory), data_dir=config.data_dir))
    assert not marker.exists()
    Backends(relu=str(own)).resolve("cpu")  # named by the person
    assert marker.exists()


def test_evaluate_takes_the_readers_pair(own: Path, compose: Callable[..., Any]) -> None:
    config = compose("optim.epochs=1", "evaluate=false")
    train(config)
    asked = {"checkpoint": str(assemble.run_directory(config)), "data_dir": config.data_dir}
    (ours,), (mine,) = (
        evaluate(Evaluate(**asked, backend=backend)) for backend in (Backends(), Backends(relu=str(own)))
    )
    assert ours == mine


def test_reproduce_takes_the_readers_pair(own: Path, data_dir: Path, tmp_path: Path) -> None:
    found = []
    for name, override in (("ordinary", []), ("mine", [f"backend.linear={own}"])):
        own.write_text(written(exercise_named("linear")))
        settings = reduced(data_dir, tmp_path / name, "s5_decay", overrides=[*REDUCED, *override])
        job = jobs_of(claims_of(settings), settings)[0]
        run_job(job)
        found.append((job.directory, evidence(job.directory)))
    (ordinary, ours), (mine, theirs) = found
    assert_equal_bits(mine, ordinary)
    assert ours.results == theirs.results
    record = json.loads((mine / "run.json").read_text())
    assert record["resolved"]["yours"] == {"linear": record["config"]["backend"]["linear"]}


def test_the_checks_take_the_readers_pair(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "alexnet.gradcheck.lesson", None)
    backend = Backends(relu=str(own))
    config = CheckGradients(operations=["relu"], backend=backend, output_dir=str(tmp_path), mutants=True)
    proof = gradcheck.prove(config, lambda line: None)
    assert proof.passed
    assert {result.backend for result in proof.results} == {str(own)}
    own.write_text(RELU.replace("<= 0", "<= 1"))
    assert not gradcheck.prove(config, lambda line: None).passed


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"relu": "foo"}, r"backend\.relu=foo must be one of reference, .*, auto, or a path to a \.py file"),
        ({"default": "own.py"}, r"backend\.default=own\.py must be one of reference, .*, auto$"),
    ],
)
def test_what_is_neither_a_name_nor_a_path_is_refused(choice: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Backends(**choice)


def test_a_file_without_the_pair_is_refused(own: Path) -> None:
    message = r"own\.py must define tanh_forward; exercise=tanh writes a file that does"
    with pytest.raises(UserError, match=message):
        Backends(tanh=str(own)).resolve("cpu")
    with pytest.raises(UserError, match=r"gone\.py does not exist"):
        Backends(tanh="gone.py").resolve("cpu")
