"""An installed wheel does what the repository does: `alexnet <verb>`, the light import, the types."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import alexnet
from alexnet.cli import SCRIPTS
from alexnet.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel of this checkout, and of the rest what this one has; returns its bin/."""
    build = pytest.importorskip("hatchling.build")
    root = tmp_path_factory.mktemp("installed")
    python = root / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root / "venv"], check=True)
    (site,) = (root / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    here = Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        wheel = build.build_wheel(str(root))
    assert Path.cwd() == here
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", root / wheel], check=True)
    return python.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """In an empty directory, with nothing of this process's paths."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_an_installed_wheel_prepares_trains_and_resumes_in_an_empty_directory(
    installed: Path, tmp_path: Path
) -> None:
    small = [
        "model.width=0.125",
        "model.hidden=[16,16]",
        "optim.epochs=1",
        "data.batch_size=50",
        "watchdog=off",
    ]
    few = ["data=synthetic", "n_train=300", "n_val=50"]
    prepared = run(installed / "alexnet", "prepare_data", *few, cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr[-2000:]
    trained = run(installed / "alexnet", "train", *small, "trainer.enable_progress_bar=false", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (tmp_path / "outputs/train/quickstart/seed0/run.json").exists()
    again = run(installed / "alexnet", "train", *small, cwd=tmp_path)
    assert "This run is finished" in again.stdout
    where = "import alexnet.cli as c, pathlib; print(c.CONF)"
    assert "venv" in run(installed / "python", "-c", where, cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_users_program_passes_mypy_strict(installed: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from alexnet import AlexNet, ModelConfig, load\n"
        'net: AlexNet = AlexNet.from_preset("mini", num_classes=3)\n'
        "width: float = ModelConfig().width\n"
        'logits: torch.Tensor = load("run")(torch.zeros(1, 3, 56, 56))\n'
    )
    words = ["--strict", "--python-executable", installed / "python", "--cache-dir", tmp_path / "cache"]
    checked = run(sys.executable, "-m", "mypy", *words, program, cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    program.write_text(program.read_text().replace("num_classes=3", "backends=3"))
    wrong = run(sys.executable, "-m", "mypy", *words, program, cwd=tmp_path)
    assert '"backends"' in wrong.stdout  # our own types are seen


def test_a_list_of_verbs_is_shown_and_a_misspelt_verb_is_one_line() -> None:
    alexnet_command = [sys.executable, "-c", "from alexnet.cli import main; main()"]
    listed = subprocess.run(alexnet_command, capture_output=True, text=True)
    assert all(path.stem in listed.stdout for path in SCRIPTS.glob("*.py"))
    wrong = subprocess.run([*alexnet_command, "trani"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: trani must be one of benchmark, check_gradients, ")
    assert wrong.stderr.count("\n") == 1


def test_importing_the_package_does_not_import_torch() -> None:
    light = "import alexnet, sys; assert 'torch' not in sys.modules; alexnet.AlexNet; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", light]).returncode == 0
    assert sorted(alexnet.__all__) == ["AlexNet", "ModelConfig", "load"]
    with pytest.raises(AttributeError, match="no attribute 'Alexnet'"):
        alexnet.Alexnet  # noqa: B018


def test_a_preset_is_a_file_of_conf_with_some_values_changed() -> None:
    net = alexnet.AlexNet.from_preset("mini", num_classes=3, width=0.125, hidden=[16, 8], seed=0)
    again = alexnet.AlexNet.from_preset("mini", num_classes=3, width=0.125, hidden=[16, 8], seed=0)
    assert net.config.image_px == 56
    assert net.fc8.weight.shape == (3, 8)
    assert torch.equal(net.conv1.weight, again.conv1.weight)


@pytest.mark.parametrize(
    ("preset", "changes", "message"),
    [
        ("min", {}, r"model=min is unknown: did you mean mini\?"),
        ("mini", {"clases": 3}, "model=mini: unknown key clases: did you mean num_classes"),
        (
            "mini",
            {"num_classes": "three"},
            "model=mini: num_classes: Value 'three' of type 'str' could not be converted",
        ),
    ],
)
def test_a_preset_that_cannot_be_had_is_one_line(preset: str, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        alexnet.AlexNet.from_preset(preset, **changes)
