"""The README's commands and its program do what they say: in its order, in an empty directory, with fewer steps."""

import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from alexnet.gradcheck.exercises import exercise_named
from tests.gradcheck.test_reader import written
from tests.test_readme import README, ROOT, SCRIPTS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# Tiny ImageNet is not here; the others, in tests of their own, are run on what they need.
NOT_HERE = ("tiny_imagenet", "scale=cpu")
SMALL = ["model.width=0.125", "model.hidden=[8,8]"]
FEWER = {"check_gradients.py mutants": ["operations=[relu]"], "prepare_data.py": ["workers=0"]}


def run(command: str, *more: str) -> None:
    _, script, *overrides = shlex.split(command)
    for words, fewer in FEWER.items():
        more = (*more, *fewer) if words in command else more
    if script == "scripts/train.py":
        more = (*more, "optim.epochs=1", *([] if "init_from" in command or not overrides else SMALL))
    GlobalHydra.instance().clear()
    sys.argv = [script, *overrides, *more]
    runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.fixture
def place(data_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory: some drawn images, a photo, a folder of three classes, an exercise that is solved."""
    shutil.copytree(data_dir, tmp_path / "data")
    shutil.copytree(photos, tmp_path / "my_images")
    shutil.copy(photos / "cat/0.jpg", tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def test_commands_and_program_run_one_after_another(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("python scripts/train.py")  # ./scripts/quickstart.sh
    for command in SCRIPTS:
        if "mine=" in command:
            Path("exercises/linear.py").write_text(written(exercise_named("linear")))
        if not any(word in command for word in NOT_HERE):
            run(command)
    for made in ("train/mine/seed0", "train/tuned/seed0", "train/faster/seed0", "check_gradients"):
        assert any((place / "outputs" / made).iterdir()), made
    assert list((place / "outputs").rglob("*.onnx"))
    assert "gradients   yours: linear from linear.py" in capsys.readouterr().out
    program = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(program) == 1
    names: dict = {}
    exec(program[0], names)
    assert len(names["names"]) == 5
