"""Whatever is typed behind a script: a run that could start, or one line on stderr, exit code 2 and nothing written.

Sets of overrides are drawn from the schemas: right and wrong values for every key, keys that do not exist, keys taken
away, groups, and signs of Hydra's grammar. Each set goes through the script's own entry, up to the first write.
"""

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from omegaconf import OmegaConf

from alexnet.claims.runner import reproduce
from alexnet.cli import CONF, command
from alexnet.data.prepare import prepare
from alexnet.errors import UserError
from alexnet.evaluate import evaluate
from alexnet.export import export
from alexnet.predict import predict
from alexnet.training.checkpoint import load
from alexnet.training.run import train
from tests.conftest import SCHEMAS, SMALL_NET

SMALL = {  # what keeps a set small unless it says otherwise
    "train": [*SMALL_NET, "experiment=none"],
    "evaluate": [],
    "predict": [],
    "export": [],
    "prepare_data": ["n_train=20", "n_val=10", "px=16"],
    "check_gradients": [],
    "benchmark": [],
    "reproduce": ["claims=[s5_decay]", "overrides=['data.name=synthetic']", "print=true"],
}
GROUPS = {
    "train": ("model", "backend", "data", "augment", "optim", "trainer", "callbacks", "logger", "experiment"),
    "evaluate": ("backend",),
    "predict": ("backend",),
    "prepare_data": ("data", "source"),
    "check_gradients": ("backend",),
}
WORDS = """nan inf -inf 1e400 -1 0 1 2 3 0.5 1.0 1e-320 -0.0 1e30 9999999999999999999999 0x10 1_000 null true false
    auto none cpu gpu cuda fast fastest native '' "''" [] {} [1] [1,2] [nan] [null] [a,b] [[1]] {a:1}
    {_target_:os.getcwd} ${seed} ${nothing} ${oc.env:NOTHING} ??? ~ ~/x ../x /nowhere/x /dev/null /proc/self/mem a=b a:b
    'a b' 'a,b' [a ${ é \\x00 %s x*x 1,2 -1e-3 all val holdout train plateau constant paper tiny mini krizhevsky"""
ARGUMENTS = """limit_train_batches limit_val_batches check_val_every_n_epoch val_check_interval max_epochs min_epochs
    max_steps min_steps max_time accumulate_grad_batches fast_dev_run overfit_batches devices num_nodes strategy
    accelerator precision gradient_clip_val gradient_clip_algorithm deterministic benchmark detect_anomaly profiler
    callbacks logger plugins enable_checkpointing barebones inference_mode sync_batchnorm use_distributed_sampler
    reload_dataloaders_every_n_epochs log_every_n_steps default_root_dir num_sanity_val_steps capture foo"""
VALUES, TRAINER = WORDS.split(), ARGUMENTS.split()
OF_TYPE = {
    bool: ["true", "false"],
    int: ["-1", "0", "1", "2", "3", "7", "64", "9999999999999999999999"],
    float: ["-1", "0", "1e-320", "1e-3", "0.1", "0.5", "0.9", "1", "1.5", "1e30", "nan"],
    str: ["x", "cpu", "auto", "val", "../x", "~/x", "''", "é", "synthetic", "train", "/dev/null"],
    list: ["[]", "[1]", "[0,1]", "[1,2,3,4,5]", "[0.1,0.5]", "[-1,2,3,4,5]", "[1,1,1,1,1,1,1,1]", "[a]"],
}


class Reached(BaseException):
    """The moment before the first write; no error that a boundary could catch."""


def reached(*_: Any, **__: Any) -> NoReturn:
    raise Reached


def keys_of(name: str) -> dict[str, list[str]]:
    """Every key of a script, with values of its type."""

    def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            elif isinstance(value, Enum):
                yield f"{prefix}{key}", [member.name for member in type(value)]
            else:
                yield f"{prefix}{key}", OF_TYPE.get(type(value), VALUES)

    trainer = {f"++trainer.{key}": VALUES for key in TRAINER} if name == "train" else {}
    tree = OmegaConf.to_container(OmegaConf.structured(SCHEMAS[name]), throw_on_missing=False)
    return {**dict(flat(tree)), **trainer}


def override(random: random.Random, name: str, keys: Mapping[str, list[str]]) -> str:
    kind = random.random()
    key = random.choice(list(keys))
    value = random.choice(keys[key] if random.random() < 0.7 else VALUES)
    if kind < 0.05:
        key = key.lstrip("+")
        return random.choice([f"~{key}", f"+{key}={value}", f"++{key}={value}", key, f"={value}"])
    if kind < 0.10:
        at = random.randrange(len(key))
        return f"{key[:at]}{random.choice('abz.+_')}{key[at + 1 :]}={value}"
    if kind < 0.25 and name in GROUPS:
        group = random.choice(GROUPS[name])
        choices = [path.stem for path in (CONF / group).glob("*.yaml")]
        return f"{group}={random.choice([*choices, value])}"
    return f"{key}={value}"


def sets(n: int, seed: int) -> Iterator[tuple[str, list[str]]]:
    drawn = random.Random(seed)
    keys = {name: keys_of(name) for name in SCHEMAS}
    for _ in range(n):
        name = drawn.choice([*SCHEMAS, "train", "train"])
        yield name, [override(drawn, name, keys[name]) for _ in range(drawn.choice([1, 1, 2, 3]))]


VERBS: dict[str, Callable[[Any], Any]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "export": export,
    "prepare_data": prepare,
    "check_gradients": lambda config: None,  # nothing is checked between its configuration and its first line
    "benchmark": lambda config: None,
    "reproduce": reproduce,
}


@pytest.fixture
def stopped_before_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def free(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr("alexnet.training.run.locked", reached)
    monkeypatch.setattr("alexnet.evaluate.log_probabilities", reached)
    monkeypatch.setattr("alexnet.predict.log_probabilities", reached)
    monkeypatch.setattr("alexnet.export.Portable", reached)
    monkeypatch.setattr("alexnet.data.prepare._locked", free)
    monkeypatch.setattr("alexnet.data.prepare.Crew", reached)
    monkeypatch.setattr("alexnet.claims.runner.run_all", reached)
    monkeypatch.setattr("alexnet.claims.runner._writer", lambda: reached)
    monkeypatch.setattr("urllib.request.urlopen", reached)


def outcome(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """'runs', 'refused', or what was wrong with the end of it."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    capsys.readouterr()
    try:
        command(name, SCHEMAS[name])(VERBS[name])()
    except Reached:
        return "runs"
    except SystemExit as ended:
        error = capsys.readouterr().err
        if ended.code == 2 and re.fullmatch(r"error: [^\n]+\n", error):
            return f"{'unexplained' if 'HYDRA_FULL_ERROR=1' in error else 'refused'}: {error.strip()}"
        return f"exit code {ended.code}: {error!r}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "runs"


def small(name: str, overrides: list[str], data_dir: Path, checkpoint: Path, place: Path) -> list[str]:
    """The overrides, behind those that keep the set small and below `place` where it does not say otherwise."""
    keys = {key.lstrip("+~").partition("=")[0] for key in overrides}
    places = {
        "output_dir": place / "out",
        "data_dir": checkpoint.parent / "data" if name == "evaluate" else data_dir,
        "checkpoint": checkpoint,
        "images": checkpoint.parent / "photos",
    }
    own = keys_of(name)
    there = [f"{key}={path}" for key, path in places.items() if key in own]
    fixed = [o for o in (*there, *SMALL[name]) if o.partition("=")[0] not in keys]
    return [*fixed, *overrides]


def tried(
    drawn: Iterable[tuple[str, list[str]]],
    data_dir: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> tuple[Counter[str], list[str]]:
    """How many sets ended how, and a line for each that ended otherwise than promised."""
    counts: Counter[str] = Counter()
    broken = []
    monkeypatch.chdir(tmp_path)
    for name, overrides in drawn:
        arguments = small(name, overrides, data_dir, checkpoint, tmp_path)
        started = time.monotonic()
        ended = outcome(name, arguments, monkeypatch, capsys)
        counts[ended.partition(":")[0]] += 1
        seconds = time.monotonic() - started
        if not re.match("runs|refused", ended) or seconds > 20:
            broken.append(f"{name} {' '.join(overrides)} ({seconds:.0f} s): {ended}")
        left = [str(path) for path in tmp_path.rglob("*")]
        if left:
            broken.append(f"{name} {' '.join(overrides)}: left {left}")
            break
    return counts, broken


@pytest.mark.parametrize("n", [40, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("stopped_before_writing")
@pytest.mark.filterwarnings("ignore")
def test_any_overrides_make_a_run_or_one_line(
    n: int,
    data_dir: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts, broken = tried(sets(n, n), data_dir, checkpoint, tmp_path, monkeypatch, capsys)
    assert not broken, "\n".join(broken)
    assert min(counts["runs"], counts["refused"]) > n // 10  # the generator draws both


def test_a_checkpoint_with_an_unknown_key_of_the_model_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model"]["widht"] = 1.0
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"unknown key widht: did you mean width\?"):
        load(tmp_path / "other.ckpt")


def test_a_run_that_fails_before_its_first_step_leaves_nothing_that_blocks_the_next(
    compose: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any) -> NoReturn:
        assert (run.directory / "run.json").exists()
        raise RuntimeError("out of memory")

    monkeypatch.setattr("alexnet.training.assemble.TrainingRun.fit", fail)
    for lr in (0.1, 0.2):  # two configurations in the same directory
        with pytest.raises(RuntimeError, match="out of memory"):
            train(compose(f"optim.lr={lr}"))
    assert not list((tmp_path / "train").iterdir())
