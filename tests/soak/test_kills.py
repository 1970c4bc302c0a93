"""SIGKILL at random moments, and the same command again: the bits of a run that nobody killed."""

import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import SMALL_NET
from tests.data.test_sources import encoded, picture, write_tar
from tests.soak.process import HUNG, Child, number, script, tally
from tests.training.test_resume import assert_equal_leaves, assert_same_bits, ended

from alexnet.data import prepare as preparation
from alexnet.training.classifier import Classifier

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.filterwarnings("ignore")]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.link", "os.rmdir", "os.mkdir", "os.truncate")


class Moments:
    """Counts the moments of each kind in a child, and ends it at one of them by SIGKILL.

    files: a file is opened for writing, renamed, linked, cut or removed. steps, validation: a batch. bytes: torch.save
    has written some of a checkpoint.
    """

    def __init__(self, kind: str = "", at: int = 0) -> None:
        self.kind, self.at = kind, at
        self.seen: Counter[str] = Counter()

    def tick(self, kind: str) -> None:
        self.seen[kind] += 1
        if kind == self.kind and self.seen[kind] == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        def changed(event: str, arguments: tuple[Any, ...]) -> None:
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
            if event in CHANGES or opened:
                self.tick("files")

        sys.addaudithook(changed)
        for kind, name in (("steps", "training_step"), ("validation", "validation_step")):
            setattr(Classifier, name, self.counted(kind, getattr(Classifier, name)))
        save = torch.save
        torch.save = lambda content, file: save(content, Written(file, self))  # type: ignore[assignment]

    def counted(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def step(*arguments: Any, **named: Any) -> Any:
            self.tick(kind)
            return function(*arguments, **named)

        return step


class Written:
    """A file whose writes are counted."""

    def __init__(self, file: Any, moments: Moments) -> None:
        self.file, self.moments = file, moments

    def write(self, content: Any) -> Any:
        self.moments.tick("bytes")
        return self.file.write(content)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


class Verb:
    """A command that writes below a directory, and what must be equal of what it wrote."""

    def __init__(self, name: str, where: str, same: Callable[[Path, Path], None], *arguments: str) -> None:
        self.name, self.where, self.same, self.arguments = name, where, same, arguments

    def child(self, place: Path, moments: Moments) -> Child:
        def body() -> None:
            moments.install()
            preparation.CHUNK = 4  # images handed on at a time: more moments
            try:
                script(self.name, *self.arguments, f"{self.where}={place}")()
            finally:
                (place / "seen.json").write_text(json.dumps(moments.seen))

        return Child(body, place / "log")


def same_run(a: Path, b: Path) -> None:
    a, b = a / "train/soak/seed0", b / "train/soak/seed0"
    (x, rows_x), (y, rows_y) = ended(a), ended(b)
    assert_same_bits(x, y)
    assert rows_x == rows_y
    best = [torch.load(run / "checkpoints/best.ckpt", weights_only=True)["state_dict"] for run in (a, b)]
    assert_equal_leaves(*best, "best")
    records = [json.loads((run / "run.json").read_text()) for run in (a, b)]
    assert_equal_leaves(*([r["state"], r["results"], r["train"]] for r in records), "run.json")
    assert names(a) == names(b)


def same_evaluation(a: Path, b: Path) -> None:
    (x,), (y,) = (list((place / "evaluate").glob("*.json")) for place in (a, b))
    keys = ("results", "calibration", "store_sha256")
    assert_equal_leaves(
        *({key: json.loads(file.read_text())[key] for key in keys} for file in (x, y)), "json"
    )


def same_stores(a: Path, b: Path) -> None:
    for split in ("train", "val"):
        x, y = (json.loads((place / "soak" / split / "manifest.json").read_text()) for place in (a, b))
        for key in ("sha256", "counts", "corrupt", "n", "enlarged"):
            assert x[key] == y[key], key
    assert names(a / "soak") == names(b / "soak")


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 pictures of two classes, every ninth of which is damaged."""
    files = {
        f"set/{split}/{name}/{k}.jpg": encoded(picture(100 * label + k))[: 300 if k % 9 == 4 else None]
        for split, count in (("train", 40), ("val", 10))
        for label, name in enumerate(("cat", "dog"))
        for k in range(count)
    }
    return write_tar(tmp_path_factory.mktemp("archive") / "set.tar.gz", files)


def killed_and_repeated(
    verb: Verb, totals: dict[str, int], straight: Path, seconds: float, draw: random.Random
) -> tuple[str, int]:
    """Kills at one moment, one time in three the repetition too, and repeats: what went wrong, and how many kills."""
    place = straight.with_name("killed")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    kills, what = 0, verb.name
    for kind in draw.sample([*totals, "clock", "clock"], draw.choice([1, 1, 2])):
        at = draw.randint(1, totals.get(kind, 1))
        limit = draw.uniform(0, seconds) if kind == "clock" else 60.0  # at its deadline a child is killed
        what += f", {kind} {f'{limit:.3f} s' if kind == 'clock' else at}"
        code = verb.child(place, Moments(kind, at)).wait(limit).code
        kills += code == (HUNG if kind == "clock" else -signal.SIGKILL)
    ended = verb.child(place, Moments()).wait()
    if ended.code:
        return f"{what}: the repetition ended with {ended.code}: {ended.err[-300:]}", kills
    try:
        verb.same(straight, place)
    except AssertionError as error:
        return f"{what}: other bits: {str(error)[:300]}", kills
    return "", kills


def test_killed_at_any_moment_the_same_command_gives_the_same_bits(
    data_dir: Path, archive: Path, tmp_path: Path
) -> None:
    net = [f"data_dir={data_dir}", *SMALL_NET, "experiment=none", "name=soak"]
    plateau = ["augment=code145", "optim.schedule=plateau", "optim.patience=0"]
    # The store of the photos is not in this data_dir: the network of a run of its own is evaluated.
    trained = script("train", *net, "optim.epochs=1", f"output_dir={tmp_path / 'trained'}")
    assert not Child(trained, tmp_path / "log").wait().code
    run = tmp_path / "trained/train/soak/seed0/checkpoints/last.ckpt"
    copy = shutil.copy(run, tmp_path / "net.ckpt")  # outside of a run the record goes to output_dir
    verbs = [
        Verb("train", "output_dir", same_run, *net, *plateau),
        Verb("prepare_data", "data_dir", same_stores, "data=folder", f"path={archive}", "name=soak", "px=16",
             "on_corrupt=skip"),
        Verb("train", "output_dir", same_run, *net, "optim=one_cycle", "optim.epochs=2"),
        Verb("evaluate", "output_dir", same_evaluation, f"data_dir={data_dir}", f"checkpoint={copy}",
             "device=cpu"),
    ]  # fmt: skip
    draw, moments = random.Random(int(number("SEED", 0))), int(number("KILLS", 100))
    with tally("kills") as counted:
        kinds: Counter[str] = Counter()
        for verb, share in zip(verbs, (0.4, 0.35, 0.15, 0.1), strict=True):
            straight = tmp_path / f"{verb.name}{verbs.index(verb)}" / "straight"
            straight.mkdir(parents=True)
            ended = verb.child(straight, Moments()).wait()
            assert not ended.code, ended.err
            totals = json.loads((straight / "seen.json").read_text())
            for _ in range(round(share * moments)):
                fault, kills = killed_and_repeated(verb, totals, straight, ended.seconds, draw)
                counted.add("lost" if fault else "recovered", fault)
                kinds[verb.name] += kills
        counted.more["kills"] = kinds
