"""Every file of conf/ composes and builds, and every mistake ends as one line that says what to do."""

import os
import pickle
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra._internal.utils import get_args_parser
from omegaconf import OmegaConf

from alexnet import system
from alexnet.cli import CONF, arguments, as_chosen, command, load, one_line, plain, typed
from alexnet.cli import compose as compose_as
from alexnet.errors import UserError
from alexnet.evaluate import Evaluate
from alexnet.layers import Backend
from alexnet.model import AlexNet, ModelConfig
from alexnet.optim import build_optimizer, build_scheduler, krizhevsky_update
from alexnet.training import assemble
from alexnet.training.config import Train, compose_train
from alexnet.training.network import Speedups

GROUPS = ("model", "backend", "data", "augment", "optim", "trainer", "callbacks", "logger", "experiment")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


def composed(name: str, *overrides: str) -> Any:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose(name, list(overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_passes_its_checks(group: str, choice: str) -> None:
    config = load(composed("train", f"{group}={choice}"))
    model = AlexNet(typed(ModelConfig, plain(config.model) | {"width": 0.0625, "hidden": [4, 4]}), seed=0)
    optimizer = build_optimizer(model, config.optim)
    build_scheduler(optimizer, config.optim, 100)
    assert config.augment.crop_px == config.model.image_px


GPU_RECIPES = {
    "tiny_imagenet": "fastest",
    "tiny_imagenet_modern": "fastest",
    "imagenet_subset": "fastest",
    "claims_gpu": "fast",
}


@pytest.mark.parametrize(("experiment", "backend"), GPU_RECIPES.items())
def test_a_recipe_for_a_gpu_is_compiled_writes_no_checkpoint_within_an_epoch_and_runs_on_a_cpu_too(
    experiment: str, backend: str
) -> None:
    config = load(composed("train", f"experiment={experiment}"))
    assert config.backend.default == backend
    assert config.checkpoint_every == 0
    assert config.trainer["benchmark"] is False
    for device_type in ("cpu", "cuda"):
        assert {"reference", "native"}.isdisjoint(config.backend.resolve(device_type).values())


def test_a_backend_that_nobody_chose_is_left_open_and_a_chosen_one_stays() -> None:
    assert load(composed("train", "experiment=none")).backend.default == "auto"
    assert load(composed("train", "backend=reference")).backend.default == "reference"
    assert (
        load(composed("train", "experiment=tiny_imagenet", "backend=reference")).backend.default
        == "reference"
    )


def test_every_data_set_can_be_prepared() -> None:
    assert {p.stem for p in (CONF / "data").glob("*.yaml")} == {
        p.stem for p in (CONF / "source").glob("*.yaml")
    }
    for path in (CONF / "data").glob("*.yaml"):
        config = load(composed("prepare_data", f"data={path.stem}"))
        assert str(config.source) == path.stem
        assert config.root == f"data/{path.stem}"


@pytest.mark.parametrize("name", ["evaluate", "prepare_data", "check_gradients", "benchmark", "reproduce"])
def test_help_begins_with_the_command_and_names_no_group_of_another_script(name: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(name, return_hydra_config=True)
    first, *lines = OmegaConf.to_container(config.hydra.help, resolve=False)["template"].splitlines()
    assert first.startswith(f"python scripts/{name}.py ")
    assert max(map(len, [first, *lines])) <= 100
    assert lines[-1] == "$CONFIG"
    assert "$APP_CONFIG_GROUPS" not in lines


def test_bare_training_is_the_quickstart() -> None:
    bare, named = composed("train"), composed("train", "experiment=quickstart")
    assert bare == named


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "quickstart"),
        (["experiment=none", "model=tiny"], "tiny-synthetic"),
        (["model=tiny"], "tiny-synthetic"),
        (["data=imagenette", "model=owt"], "owt-imagenette"),
        (["data=synthetic"], "quickstart"),
        (["data=synthetic", "model=mini"], "mini-synthetic"),
        (["optim.lr=0.02", "data.batch_size=32"], "quickstart"),
        (["experiment=tiny_imagenet_cpu", "model=tiny"], "tiny_imagenet_cpu"),
        (["trainer=debug"], "quickstart-debug"),  # the real run has its directory to itself
        (["trainer=debug", "name=mine"], "mine"),
    ],
)
def test_a_run_is_named_by_what_is_run(
    overrides: list[str], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    named: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    command("train", Train)(lambda config: named.append(config.name))()
    assert named == [name]


@pytest.mark.parametrize(
    "typed",
    [
        ["-m", "model=mini,tiny"],
        ["-m", "optim.lr=1,2", "model=mini", "name=x"],
        ["--cfg", "job", "model=mini"],
        ["model=mini", "optim.lr=1", "--cfg", "job"],
        ["--help", "data=imagenet"],
    ],
)
def test_options_may_stand_before_and_behind_a_chosen_model(typed: list[str]) -> None:
    """Hydra reads one unbroken row of overrides, and calls those of a second row unknown."""
    read = get_args_parser().parse_args(as_chosen(typed)).overrides
    assert sorted(read) == sorted(["experiment=none", *(word for word in typed if "=" in word)])


def test_a_model_that_is_chosen_without_a_recipe_is_that_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The quickstart's half width, its five epochs and its two hidden layers of 1024 are its own."""
    found: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "model=paper", "data=imagenet"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    command("train", Train)(found.append)()
    assert found[0].model == ModelConfig(**plain(load(composed("train", "experiment=none")).model))
    assert (found[0].model.width, found[0].model.hidden, found[0].optim.epochs) == (1.0, [4096, 4096], 90)


def test_a_home_directory_is_written_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for typed_so in ("output_dir=~/runs", "output_dir='~/runs'"):
        config = compose_train([typed_so, "logger=tensorboard"])
        assert config.output_dir == "/home/me/runs"
        assert config.logger["tensorboard"]["save_dir"] == "/home/me/runs/tensorboard"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [([], "quickstart"), (["model=tiny"], "tiny-synthetic"), (["trainer=debug"], "quickstart-debug")],
)
def test_a_configuration_from_python_is_named_as_on_the_command_line(overrides: list[str], name: str) -> None:
    assert compose_train(overrides).name == name


@pytest.mark.parametrize("path", ["ck/epoch=1-step=8.ckpt", "with space/a=b.ckpt"])
def test_a_value_may_hold_an_equals_sign(path: str) -> None:
    assert compose_as("evaluate", Evaluate, [f"checkpoint={path}"]).checkpoint == path
    swept = ["seed=0,1", "+callbacks.x={_target_: a=b}", "'a=b'", "name=[a=b]", "-m", "optim.lr=0.1"]
    assert arguments("evaluate", swept) == swept


def test_plain_data_comes_back_as_the_same_dataclass() -> None:
    config = ModelConfig(width=0.5, init_std=[0.1] * 8)
    there = plain(config)
    assert all(type(value) in (int, float, bool, str, list, type(None)) for value in there.values())
    assert typed(ModelConfig, there) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=0.1"], "unknown key optim.lrr: did you mean optim.lr?"),
        (["trainer.precison=3"], "unknown key trainer.precison: did you mean trainer.precision?"),
        (["sede=1"], "unknown key sede: did you mean seed?"),
        (["lr=0.1"], "unknown key lr: did you mean optim.lr?"),
        (["trainer.foo=1"], "an argument of lightning.Trainer is added with +trainer.foo="),
        (["optim.lr=fast"], "optim.lr: Value 'fast' of type 'str' could not be converted to Float"),
        (
            ["model.init=xavier"],
            "model.init: Invalid value 'xavier', expected one of [normal, fan_in, he, torch]",
        ),
        (["model=papre"], "Could not find 'model/papre': did you mean paper?"),
        (["experiment=quickstat"], "Could not find 'experiment/quickstat': did you mean quickstart?"),
        (["optim.lr=null"], "optim.lr: field 'optim.lr' is not Optional"),
        (["name=[a]"], "name: Cannot convert 'list' to string"),
        (["model.hidden=[4, 4"], "model.hidden=[4, 4 cannot be read (no viable alternative"),
        (["optim.lr=-1"], "optim.lr=-1.0 must be positive"),
        (["optim.lr=nan"], "optim.lr=nan must be a finite number"),
        (["model.init_std.3=-inf"], "model.init_std[3]=-inf must be a finite number"),
        (["trainer.gradient_clip_val=1e400"], "trainer.gradient_clip_val=inf must be a finite number"),
        (["+optim.lrr=1"], "unknown key optim.lrr: did you mean lr?"),
        (["optim=3"], "the overrides cannot be read (Config group override must be"),
        (["name=a=b"], """quote the value, name='"a=b"'"""),
        (["~trainer"], "trainer.accelerator is missing: it cannot be deleted"),
        (
            ["trainer.accelerator=tpu"],
            "trainer.accelerator=tpu is not supported: choose one of auto, cpu, gpu",
        ),
        (["trainer.limit_val_batches=0"], "trainer.limit_val_batches=0 must be a positive integer"),
        (["trainer.limit_train_batches=1.5"], "trainer.limit_train_batches=1.5 must be"),
        (["+trainer.check_val_every_n_epoch=2"], "trainer.check_val_every_n_epoch=2 is not supported"),
        (["+trainer.val_check_interval=1"], "trainer.val_check_interval=1 is not supported"),
        (["+trainer.callbacks=[]"], "add one to the group, +callbacks.<name>._target_=<class>"),
        (["+callbacks.rate=3"], "callbacks.rate must have a _target_"),
        (
            ["+callbacks.rate._target_=lightning.pytorch.callbacks.LearningRateMonitor"],
            "callbacks.rate: LearningRateMonitor needs a logger, set logger=tensorboard",
        ),
        (["optim.momentum=1"], "optim.momentum=1.0 must be in [0, 1)"),
        (["log_every=0"], "log_every=0"),
        (["model.channels=[1]"], "model.channels=[1] must have 5 entries, not 1"),
    ],
)
def test_a_mistake_is_one_line_with_value_key_and_remedy(overrides: list[str], message: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (hydra's, omegaconf's and ours)
        load(composed("train", *overrides))
    line = one_line(caught.value, "train")
    assert line is not None
    assert message in line
    assert "\n" not in line


def test_an_error_of_ours_keeps_its_traceback() -> None:
    assert one_line(RuntimeError("a bug"), "train") is None


def test_an_error_of_a_library_is_one_line_that_says_where_we_called_it() -> None:
    ones = [torch.ones(2)]
    with pytest.raises(RuntimeError) as caught:
        krizhevsky_update(ones, [torch.ones(3)], ones, 0.1, 0.9, 0.0)
    line = one_line(caught.value, "train")
    assert line is not None
    assert re.match(r"RuntimeError at optim\.py:\d+: The size of tensor", line)
    assert line.endswith("(HYDRA_FULL_ERROR=1 shows the traceback)")
    with pytest.raises(AttributeError) as ours:
        build_optimizer(torch.nn.Linear(1, 1), None)  # type: ignore[arg-type]
    assert one_line(ours.value, "train") is None


def test_memory_that_cannot_be_had_is_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**45)
    line = one_line(caught.value, "train")
    assert line is not None
    assert line.startswith("out of memory (")
    assert line.endswith("lower data.batch_size, model.width or the number of threads")


def test_no_space_left_is_one_line() -> None:
    write = OSError(28, "No space left on device", "outputs/x")
    copy = OSError(28, "No space left on device", "a/x", None, "outputs/x")
    for error in (write, copy):
        line = one_line(error, "train")
        assert (
            line == "no space left for outputs/x: free some, or set output_dir=... or data_dir=... elsewhere"
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_write_to_a_full_disk_ends_in_one_line_although_it_names_no_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(config: Any) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        command("train", Train)(write)()
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: no space left on the disk: free some, or set output_dir=... or data_dir=... elsewhere\n"
    )


WRONG = {
    "train.py": "optim.lrr=1",
    "evaluate.py": "checkpoint=nowhere.ckpt",
    "prepare_data.py": "data=tinyimagenet",
    "check_gradients.py": "mutant=true",
    "benchmark.py": "suites=steps",
}


@pytest.mark.parametrize("name", WRONG)
def test_scripts_exit_with_2_and_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = str(CONF.parent / "scripts" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, WRONG[name]])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_script_of_its_own_process_exits_with_2_and_one_line(tmp_path: Path) -> None:
    """What is printed while everything is imported would show here."""
    arguments = [sys.executable, str(CONF.parent / "scripts" / "train.py"), WRONG["train.py"]]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ended.returncode == 2, ended.stderr
    assert_one_line(ended.stderr)
    assert list(tmp_path.iterdir()) == []


def assert_one_line(text: str) -> None:
    assert text.startswith("error: ")
    assert text.count("\n") == 1, text


def test_missing_data_names_the_command_that_makes_them(compose: Callable[..., Any], tmp_path: Path) -> None:
    config = compose("data=tiny_imagenet", f"data_dir={tmp_path}")
    with pytest.raises(UserError, match=r"python scripts/prepare_data\.py data=tiny_imagenet"):
        assemble.build_run(config)
    assert not (tmp_path / "train").exists()


def test_an_unknown_option_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--foo", "--optim.lr=0.1"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        command("train", Train)(print)()
    assert ended.value.code == 2
    line = "error: unrecognized arguments: --foo --optim.lr=0.1: keys are given as key=value, without dashes, and "
    assert capsys.readouterr().err == f"{line}--help lists them\n"


@pytest.mark.parametrize("arguments", [["--help"], []])
@pytest.mark.parametrize("size", [10, 100_000])  # a buffer keeps what it could not write, or loses it
def test_a_reader_that_goes_away_ends_a_script_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], size: int
) -> None:
    """python scripts/train.py --help | head -1"""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            command("train", Train)(lambda config: print("x" * size, flush=True))()
    assert ended.value.code == 128 + 13 or arguments == ["--help"]
    assert capsys.readouterr().err == ""


ONE_OF_SEVERAL = """
import atexit, sys, torch.distributed
from alexnet.cli import command
from alexnet.training.config import Train

class Global:
    def __del__(self):
        print("finalized")

held = Global()
atexit.register(print, "exit handler")

def work(config):
    if "{group}":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    print("worked", end=" ")
    if {code} != 0:
        raise SystemExit({code})

sys.argv = ["train.py"]
command("train", Train)(work)()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "code", "finalized"),
    [("", 0, True), ("gloo", 0, False), ("gloo", None, False), ("gloo", 143, False)],
)
def test_a_process_of_a_distributed_job_ends_without_finalization(
    group: str, code: int | None, finalized: bool
) -> None:
    """There a thread of gloo would abort it now and then; its output, exit handlers and exit code are as ever."""
    program = ONE_OF_SEVERAL.format(group=group, code=code)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == (code or 0), ended.stderr
    assert ended.stdout == "worked exit handler\n" + "finalized\n" * finalized


def test_another_configuration_in_the_same_directory_is_refused(compose: Callable[..., Any]) -> None:
    assemble.build_run(compose()).start()
    with pytest.raises(UserError, match=r"optim.lr: 0.01 there, 0.02 now.*overwrite=true"):
        assemble.build_run(compose("optim.lr=0.02"))
    assemble.build_run(compose("optim.lr=0.02", "overwrite=true")).start()
    assemble.build_run(compose("optim.lr=0.02", "watchdog=warn"))  # not part of what a run is


def test_a_backend_left_open_is_the_run_of_the_backend_it_stands_for(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs of before `backend=auto` and `trainer.benchmark` have backend=reference on record."""
    run = assemble.build_run(compose("backend=reference"))
    run.start()
    assert run.record.content["config"]["backend"]["default"] == "reference"
    assert "benchmark" not in run.record.content["config"]["trainer"]
    assemble.build_run(compose("backend=auto", "trainer.benchmark=true"))
    config = compose("backend=auto", "backend.conv2d=auto")
    monkeypatch.setattr(system, "device_type_of", lambda *_: "cuda")
    backend = assemble.identity(config, None)["backend"]
    assert (backend["default"], backend["conv2d"], backend["relu"]) == ("fast", "fast", None)
    assert config.backend.default == "auto"


def test_the_headline_says_what_a_backend_means_on_a_gpu() -> None:
    fast, reference = {"conv2d": "compiled"}, {"conv2d": "reference"}

    def notes(default: str, device_type: str, backend: dict[str, str], master_weights: bool = False) -> str:
        lines = assemble.backend_notes(Backend(default), device_type, Speedups.of(backend, master_weights))
        assert not any("\n" in line for line in lines)
        return "; ".join(lines)

    assert "backend=auto took fast" in notes("auto", "cuda", fast)
    assert "took" not in notes("fast", "cuda", fast)
    assert "Set backend=fast" in notes("reference", "cuda", reference)
    assert notes("auto", "cpu", reference) == notes("reference", "cpu", reference) == ""
    assert "the first steps compile kernels" in notes("fast", "cpu", fast)
    assert notes("fast", "cpu", fast).endswith(": channels last, one pass augmentation, fused update")
    assert notes("reference", "cpu", reference, True).endswith(": fused update, master weights")


def test_classes_that_the_store_does_not_have_are_refused(compose: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"model.num_classes=7.* holds 10 classes"):
        assemble.build_run(compose("model.num_classes=7"))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="trainer=cpu"):
        system.device_type_of("gpu")


def test_run_record_holds_only_plain_data(compose: Callable[..., Any]) -> None:
    config = compose()
    identity = assemble.identity(config, assemble.image_data(config))
    assert pickle.loads(pickle.dumps(identity)) == identity
    assert OmegaConf.create(identity)
    assert "output_dir" not in identity
