"""Damaged files of runs and stores: one line that refuses them, or the bits of a run whose files are whole."""

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.conftest import SMALL_NET
from tests.soak.process import HUNG, Child, Ended, number, script, tally
from tests.soak.test_kills import Moments, Verb, same_evaluation, same_run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3 * 3600), pytest.mark.filterwarnings("ignore")]
DRAW = random.Random(int(number("SEED", 0)))


# Damage ---------------------------------------------------------------------------------------------------


def bit(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[DRAW.randrange(len(content))] ^= 1 << DRAW.randrange(8)
    path.write_bytes(content)


def cut(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: DRAW.randrange(path.stat().st_size)])


def zeros(path: Path, other: Path) -> None:
    """As a file system leaves a block that was never written."""
    content = bytearray(path.read_bytes())
    at = DRAW.randrange(len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path, other: Path) -> None:
    path.write_bytes(DRAW.randbytes(path.stat().st_size))


def missing(path: Path, other: Path) -> None:
    path.unlink()


def of_another(path: Path, other: Path) -> None:
    shutil.copy(other, path)


def another_shape(path: Path, other: Path) -> None:
    path.write_text("[]\n")


KINDS = (bit, bit, bit, cut, cut, zeros, empty, garbage, missing, of_another, another_shape)
RUN = "train/soak/seed0"
LAST, PREVIOUS, BEST = (f"{RUN}/checkpoints/{name}.ckpt" for name in ("last", "previous", "best"))
# The state that is damaged: its files, and the commands that must refuse it or end as if it were whole.
INTERRUPTED = [(LAST,), (PREVIOUS,), (BEST,), (LAST, PREVIOUS), (f"{RUN}/run.json",), (f"{RUN}/metrics.csv",)]
FINISHED = [(BEST,), (LAST,), (f"{RUN}/run.json",)]
STORES = [(f"synthetic/{split}/{name}",) for split, name in (
    ("train", "manifest.json"), ("train", "labels.npy"), ("train", "mean.npy"), ("train", "images.npy"),
    ("val", "manifest.json"), ("val", "labels.npy"), ("val", "images.npy"))]  # fmt: skip


class State:
    """A directory that can be damaged, and a second one of another seed or of other images."""

    def __init__(self, whole: Path, other: Path, files: list[tuple[str, ...]]) -> None:
        self.whole, self.other, self.files = whole, other, files

    def damaged(self, place: Path, files: tuple[str, ...], kind: Callable[[Path, Path], None]) -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.whole, place)
        for name in files:
            kind(place / name, self.other / name)
        return place


@pytest.fixture
def net(data_dir: Path) -> list[str]:
    return [*SMALL_NET, "experiment=none", "name=soak", "augment=code145", "optim.schedule=plateau"]


def trained(place: Path, net: list[str], data: Path, moments: Moments, *more: str) -> Path:
    place.mkdir(parents=True)
    Verb("train", "output_dir", same_run, *net, f"data_dir={data}", *more).child(place, moments).wait()
    shutil.rmtree(place / "log")
    return place


def judged(ended: Ended, same: Callable[[], None]) -> tuple[str, str]:
    """How it ended, and what is wrong with it."""
    if ended.refused:
        return "refused", ""
    if ended.code:
        return ("hung" if ended.code == HUNG else "crashed"), f"exit code {ended.code}: {ended.err[-400:]}"
    try:
        same()
    except AssertionError as error:
        return "lost", f"other bits: {str(error)[:300]}"
    return "recovered", ""


def same_words(said: str, same: Callable[[], None], ended: Ended) -> None:
    """A finished run only shows its record; without one it is closed again, from its checkpoints."""
    if "resuming from" in ended.out:
        same()
    else:
        assert ended.out == said


def test_damaged_runs_are_refused_or_recovered(net: list[str], data_dir: Path, tmp_path: Path) -> None:
    straight, straight1 = (
        trained(tmp_path / f"straight{seed}", net, data_dir, Moments(), f"seed={seed}") for seed in (0, 1)
    )
    broken, broken1 = (
        trained(tmp_path / f"broken{seed}", net, data_dir, Moments("steps", 13), f"seed={seed}")
        for seed in (0, 1)
    )
    for place in (straight1, broken1):  # another run's files, at the same names
        (place / "train/soak/seed1").rename(place / RUN)
    place, log = tmp_path / "damaged", tmp_path / "log"
    again = script("train", *net, f"data_dir={data_dir}", f"output_dir={place}")
    evaluated = script(
        "evaluate", f"checkpoint={place / RUN}", f"data_dir={data_dir}", "device=cpu",
        f"json={place / 'evaluate/it.json'}",
    )  # fmt: skip
    whole = State(straight, straight1, FINISHED).damaged(place, (), empty)
    assert not Child(evaluated, log).wait().code
    shutil.copytree(whole / "evaluate", tmp_path / "evaluation/evaluate")
    said = Child(again, log).wait().out
    interrupted, finished = State(broken, broken1, INTERRUPTED), State(straight, straight1, FINISHED)
    same = partial(same_run, straight, place)
    check = {interrupted: lambda ended: same(), finished: partial(same_words, said, same)}
    with tally("damaged_runs") as counted:
        for state in check:
            for files in state.files:
                for kind in KINDS:
                    state.damaged(place, files, kind)
                    ended = Child(again, log).wait()
                    outcome, fault = judged(ended, partial(check[state], ended))
                    what = f"{kind.__name__} in {', '.join(files)} of {state.whole.name}"
                    counted.add(outcome, fault and f"train, {what}: {fault}")
                    if state is finished:
                        state.damaged(place, files, kind)
                        ended = Child(evaluated, log).wait()
                        outcome, fault = judged(
                            ended, lambda: same_evaluation(tmp_path / "evaluation", place)
                        )
                        counted.add(outcome, fault and f"evaluate, {what}: {fault}")


def test_damaged_stores_are_refused(net: list[str], data_dir: Path, tmp_path: Path) -> None:
    """A run looks at all but the pixels; prepare_data verify=true looks at these too."""
    straight = trained(tmp_path / "straight", net, data_dir, Moments())
    place, out, log = tmp_path / "damaged", tmp_path / "out", tmp_path / "log"
    other = script("prepare_data", f"data_dir={tmp_path / 'other'}", "n_train=130", "n_val=50", "seed=1")
    assert not Child(other, log).wait().code
    train = script("train", *net, f"data_dir={place}", f"output_dir={out}")
    verify = script("prepare_data", f"data_dir={place}", "verify=true")
    state = State(data_dir, tmp_path / "other", STORES)
    with tally("damaged_stores") as counted:
        for files in STORES:
            for kind in KINDS:
                state.damaged(place, files, kind)
                shutil.rmtree(out, ignore_errors=True)
                what = f"{kind.__name__} in {', '.join(files)}"
                ended = Child(verify, log).wait()
                outcome, fault = judged(ended, lambda: None)
                if outcome == "recovered":
                    outcome, fault = "lost", "verify=true finds nothing"
                counted.add(outcome, fault and f"verify, {what}: {fault}")
                if "images" not in files[0]:
                    outcome, fault = judged(Child(train, log).wait(), lambda: same_run(straight, out))
                    counted.add(outcome, fault and f"train, {what}: {fault}")
                    if out.exists():
                        left = [path for path in out.rglob("*") if outcome == "refused"]
                        assert not left, f"{what}: a refused run left {left}"
