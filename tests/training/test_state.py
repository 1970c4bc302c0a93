"""What lies on the disk: never half written, never another run's, never lost without a word."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SMALL_NET
from tests.training.test_resume import Crash, assert_same_bits, crash_at, ended

from alexnet import evaluate as evaluation
from alexnet import system
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate, evaluate
from alexnet.system import full_precision_name, replaced, write_json, write_whole
from alexnet.training import assemble
from alexnet.training.callbacks import AtomicCheckpointIO
from alexnet.training.checkpoint import find, load, read
from alexnet.training.config import compose_train
from alexnet.training.record import RunRecord
from alexnet.training.run import train

SHORT = ["optim.epochs=1", "evaluate=false", "checkpoint_every=2"]


@pytest.fixture(scope="module")
def runs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The directories of a run that went to its end, and of one that crashed after step 5."""
    shared = ["experiment=quickstart", f"data_dir={data_dir}", "name=test", *SMALL_NET, *SHORT]
    straight, broken = (
        compose_train([*shared, f"output_dir={tmp_path_factory.mktemp(name)}"])
        for name in ("straight", "broken")
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet.training.run._picture", lambda *_: "not drawn")
        train(straight)
        crash_at(patch, 5)
        with pytest.raises(Crash):
            train(broken)
    return assemble.run_directory(straight), assemble.run_directory(broken)


@pytest.fixture
def crashed(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of the second, where `compose` expects it: last.ckpt of step 4, previous.ckpt of step 2."""
    return shutil.copytree(runs[1], tmp_path / "train" / "test" / "seed0")


def flip(path: Path, share: float) -> None:
    """One bit of the file, at this share of its length."""
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 1
    path.write_bytes(content)


def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(
    compose: Callable[..., Any], runs: tuple[Path, Path], crashed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(crashed / "checkpoints" / "last.ckpt", 0.5)
    train(compose(*SHORT))
    said = capsys.readouterr().out
    assert "last.ckpt is damaged" in said
    assert "Going on from previous.ckpt" in said
    assert_same_bits(ended(runs[0])[0], ended(crashed)[0])
    assert not (crashed / "checkpoints" / "previous.ckpt").exists()  # the run is finished


def test_a_kill_before_the_record_is_closed_leaves_no_checkpoint_behind(
    compose: Callable[..., Any], crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(self: RunRecord, **values: Any) -> None:
        update(self, **values)
        if values.get("state") == "finished":
            raise Crash

    update = RunRecord.update
    with monkeypatch.context() as patch:
        patch.setattr(RunRecord, "update", killed)
        with pytest.raises(Crash):
            train(compose(*SHORT))
    train(compose(*SHORT))
    assert {p.name for p in (crashed / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}


def test_a_checkpoint_that_was_copied_from_another_run_is_refused(
    compose: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "train" / "test" / "seed1")
    best = load(run)
    record = json.loads((run / "run.json").read_text())
    del record["self"]  # its own checksum
    record["config"]["seed"] = 1
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"best.ckpt is of a run with another .*seed: 0 there, 1 now"):
        load(run)
    shutil.copy(run / "checkpoints" / "best.ckpt", tmp_path / "elsewhere.ckpt")
    assert torch.equal(load(tmp_path / "elsewhere.ckpt").net.conv1.weight, best.net.conv1.weight)


def test_two_damaged_checkpoints_are_one_line(compose: Callable[..., Any], crashed: Path) -> None:
    for name in ("last.ckpt", "previous.ckpt"):
        flip(crashed / "checkpoints" / name, 0.5)
    with pytest.raises(UserError, match=r"previous.ckpt is damaged") as caught:
        train(compose(*SHORT))
    assert "\n" not in str(caught.value)


def test_no_bit_of_the_weights_can_change_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    content = {
        "hyper_parameters": dict.fromkeys(("model", "augment", "optim", "classes")),
        "w": torch.rand(5000),
    }
    torch.save(content, path)
    whole = path.read_bytes()
    start = whole.index(content["w"].numpy().tobytes()[:16])
    for at in range(start, start + 20_000, 997):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"x.ckpt is damaged"):
            read(path)


def test_a_checkpoint_of_another_run_is_refused_also_without_run_json(
    compose: Callable[..., Any], crashed: Path
) -> None:
    (crashed / "run.json").unlink()
    refusal = r"last.ckpt is of a run with another .*optim.lr: 0.01 there, 0.02 now"
    with pytest.raises(UserError, match=refusal):
        assemble.build_run(compose(*SHORT, "optim.lr=0.02")).start()
    path = crashed / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del (
        content["identity"],
        content["hyper_parameters"]["resample"],
    )  # as checkpoints were until November 2026
    torch.save(content, path)
    with pytest.raises(UserError, match=refusal):
        assemble.build_run(compose(*SHORT, "optim.lr=0.02")).start()
    assert not (crashed / "run.json").exists()  # nothing was written
    assemble.build_run(compose(*SHORT)).start()


def test_no_figure_of_a_record_can_change_unnoticed(
    compose: Callable[..., Any], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "train" / "test" / "seed0")
    text = (run / "run.json").read_text()
    for changed in (
        text.replace('"seed": 0', '"seed": 1'),
        text.replace('"top1_error": 0.', '"top1_error": 1.'),
    ):
        assert changed != text
        (run / "run.json").write_text(changed)
        with pytest.raises(
            UserError, match=r"run.json was changed after it was written: restore it, or delete it"
        ):
            assemble.build_run(compose(*SHORT))
    (run / "run.json").write_text(text)
    assert assemble.build_run(compose(*SHORT)).record.finished


def test_a_best_checkpoint_that_is_gone_is_not_replaced_by_the_last_in_silence(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    (run / "checkpoints" / "best.ckpt").unlink()
    with pytest.raises(
        UserError, match=r"lacks the file that its run.json names: .*last.ckpt for the last epoch"
    ):
        find(run)
    assert find(run / "checkpoints" / "last.ckpt").name == "last.ckpt"
    assert (
        find(shutil.copytree(runs[1], tmp_path / "young")).name == "last.ckpt"
    )  # its first epoch is not over


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"7", b"\xff\xfe{}", b"{}", b'{"config": 3, "state": "running"}']
)
def test_a_damaged_record_is_named_in_one_line(compose: Callable[..., Any], content: bytes) -> None:
    config = compose()
    path = assemble.run_directory(config) / "run.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"run.json is damaged") as caught:
        assemble.build_run(config)
    assert "\n" not in str(caught.value)


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(OSError, match="No space") as caught, replaced(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "link", tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="must be a regular file"):
            write_whole(path, "new")
    assert (tmp_path / "file").read_text() == "kept"


def test_checkpoints_do_not_travel_through_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "mkstemp", None)
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "new" / "last.ckpt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last.ckpt"]


def test_a_full_disk_leaves_what_was_there_and_the_next_run_goes_on(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, runs: tuple[Path, Path], crashed: Path
) -> None:
    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"last\.ckpt"):
            train(compose(*SHORT))
    assert {p.name for p in (crashed / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert torch.load(crashed / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    train(compose(*SHORT))
    assert_same_bits(ended(runs[0])[0], ended(crashed)[0])


def test_the_function_that_a_checkpoint_names_is_neither_imported_nor_called(
    compose: Callable[..., Any], runs: tuple[Path, Path], crashed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CVE-2026-58659: Lightning up to 2.6.5 imports and calls the `_instantiator` of the hyper-parameters."""
    (crashed / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(crashed))
    path = crashed / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["_instantiator"] = content["_instantiator"] = "evil.call"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"is refused: its hyper_parameters hold _instantiator"):
        load(path)
    train(compose(*SHORT))
    assert_same_bits(ended(runs[0])[0], ended(crashed)[0])


def test_a_damaged_val_store_is_said_before_training(
    compose: Callable[..., Any], data_dir: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(data_dir, tmp_path / "data")
    flip(data / "synthetic" / "val" / "labels.npy", 0.99)
    with pytest.raises(UserError, match=r"val.* labels.npy"):
        assemble.build_run(compose(f"data_dir={data}"))
    assemble.build_run(compose(f"data_dir={data}", "evaluate=false"))


@pytest.mark.parametrize("name", ["../../elsewhere", "/elsewhere", "a/../../b", ""])
def test_a_name_stays_in_output_dir(compose: Callable[..., Any], name: str) -> None:
    config = compose()
    config.name = name
    with pytest.raises(UserError, match="must be a name"):
        assemble.build_run(config)
    config.name = "a/b"
    assert assemble.run_directory(config).parts[-4:] == ("train", "a", "b", "seed0")


def test_overwriting_deletes_only_a_run(compose: Callable[..., Any]) -> None:
    config = compose("overwrite=true", *SHORT)
    directory = assemble.run_directory(config)
    directory.mkdir(parents=True)
    (directory / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"overwrite=true would delete .*holds no run but thesis.tex"):
        assemble.build_run(config).start()
    assert (directory / "thesis.tex").exists()


def test_overwriting_never_looks_at_the_checkpoint_that_it_deletes(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, crashed: Path
) -> None:
    """Another process of the same run may be at any point of deleting it."""
    monkeypatch.setattr(assemble, "resume_point", None)
    rank_1 = assemble.build_run(compose(*SHORT, "overwrite=true"))
    assert (crashed / "checkpoints" / "last.ckpt").exists()
    assert rank_1.resume_point is None


def test_a_run_that_may_only_be_read_is_evaluated(
    runs: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = runs[0]

    def write(path: Path, content: Any) -> None:
        if path.is_relative_to(directory) or path.name == "mine.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        write_json(path, content)

    monkeypatch.setattr(evaluation, "write_json", write)
    where = {"data_dir": str(data_dir), "output_dir": str(tmp_path / "out"), "device": "cpu"}
    evaluate(Evaluate(str(directory), **where))
    (record,) = (tmp_path / "out" / "evaluate").iterdir()
    assert json.loads(record.read_text())["results"][0]["n"] == 40
    capsys.readouterr()
    with pytest.raises(PermissionError, match=r"mine.json"):
        evaluate(Evaluate(str(directory), json=str(tmp_path / "mine.json"), **where))
    assert "top-1 error" in capsys.readouterr().out  # the table is there all the same


@pytest.mark.parametrize(
    ("short", "full"),
    [("32", "32-true"), (32, "32-true"), ("bf16", "bf16-mixed"), ("bf16-masters", "bf16-master-weights")],
)
def test_short_names_of_precisions_mean_what_they_mean_in_lightning(
    compose: Callable[..., Any], short: Any, full: str
) -> None:
    assert full_precision_name(short) == full
    run = assemble.build_run(compose(f"trainer.precision={short}"))
    assert run.resolved["precision"] == full
    run.start()
    record = json.loads((run.directory / "run.json").read_text())
    del record["self"]
    record["config"]["trainer"]["precision"] = short  # as a run of before says it
    (run.directory / "run.json").write_text(json.dumps(record))
    assemble.build_run(compose(f"trainer.precision={full}"))


def test_a_precision_that_the_device_does_not_have_is_refused(compose: Callable[..., Any]) -> None:
    """On a CPU, Lightning's 16-mixed computes in bfloat16."""
    with pytest.raises(UserError, match=r"precision=16-mixed needs a CUDA device: set .*bf16-mixed"):
        assemble.build_run(compose("trainer.precision=16-mixed"))
    with pytest.raises(UserError, match=r"precision=fp8 must be one of auto, 32-true"):
        system.checked_precision("fp8", "cuda")


def test_crops_that_show_little_of_an_image_are_warned_of(compose: Callable[..., Any]) -> None:
    assert assemble.small_crops(224, 256) == assemble.small_crops(56, 64) == []
    (warning,) = assemble.small_crops(56, 256)
    assert "crops of 56 pixels show 5% of the area of images of 256" in warning
    assert "px=64" in warning
    assert "warning" not in " ".join(assemble.build_run(compose()).notes)
