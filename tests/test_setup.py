"""scripts/setup.sh: what stands between a fresh machine and the first command. Python is a stub here."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from alexnet.cli import CONF
from tests.conftest import pytest_collection_modifyitems

ROOT = CONF.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    return tmp_path


def stub(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-euo", "pipefail", "-c", "source scripts/setup.sh dev"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=os.environ | environment)


def test_a_torchvision_of_another_torch_is_explained_in_one_line(checkout: Path) -> None:
    stub(
        checkout / ".venv/bin/python",
        'case "$2" in *torchvision*) ;; *) exit 0 ;; esac\n'
        'echo "RuntimeError: operator torchvision::nms does not exist" >&2; exit 1',
    )
    (checkout / ".venv" / ".installed-dev").touch()
    ended = setup(checkout)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert (
        "torch and torchvision do not fit together (RuntimeError: operator torchvision::nms" in ended.stderr
    )
    assert "remove .venv and run this again" in ended.stderr


def test_an_old_python_is_explained_in_one_line(checkout: Path) -> None:
    stub(checkout / "python3.8", "exit 1")
    ended = setup(checkout, PYTHON=str(checkout / "python3.8"))
    assert ended.returncode == 2
    assert "older than 3.11" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_failed_installation_says_where_its_log_is(checkout: Path) -> None:
    stub(checkout / ".venv/bin/python", 'echo "ERROR: no matching distribution" >&2; exit 1')
    ended = setup(checkout)
    assert ended.returncode == 2
    assert "no matching distribution" in ended.stderr
    assert ".venv/install.log" in ended.stderr


def test_a_second_call_installs_nothing(checkout: Path) -> None:
    stub(checkout / ".venv/bin/python", 'echo "$@" >> calls; exit 0')
    assert setup(checkout).returncode == 0
    assert setup(checkout).returncode == 0
    calls = (checkout / "calls").read_text().splitlines()
    assert sum("pip install" in call for call in calls) == 1


MAKES_A_PYTHON = """[ "$1" = -c ] && exit 0  # asked for its version
mkdir -p .venv/bin && printf '#!/bin/sh\\nexit 0\\n' > .venv/bin/python && chmod +x .venv/bin/python"""


@pytest.mark.parametrize(("installed_from", "anew"), [("src", False), ("other/src", True), ("gone", True)])
def test_an_environment_of_another_place_is_made_anew(
    checkout: Path, installed_from: str, anew: bool
) -> None:
    """The environment's Python is a real one that finds the package where it was installed from."""
    for source in ("src", "other/src"):
        (checkout / source / "alexnet").mkdir(parents=True)
        (checkout / source / "alexnet" / "__init__.py").touch()
    finds = (
        f'case "$2" in *torchvision*) ;; *) PYTHONPATH={installed_from} exec {sys.executable} "$@" ;; esac'
    )
    stub(checkout / ".venv/bin/python", finds)
    (checkout / ".venv" / ".installed-dev").touch()
    stub(checkout / "python3", MAKES_A_PYTHON)
    ended = setup(checkout, PYTHON=str(checkout / "python3"))
    assert ended.returncode == 0, ended.stderr
    assert ("does not belong to this directory" in ended.stdout) == anew
    assert ("Making .venv" in ended.stdout) == anew
    assert ("Installing" in ended.stdout) == anew


@pytest.mark.parametrize(("expression", "kept"), [("", 1), ("not slow", 1), ("soak", 2)])
def test_the_soak_runs_only_where_it_is_named(expression: str, kept: int) -> None:
    items = [
        SimpleNamespace(get_closest_marker=lambda name, mark=mark: mark == name) for mark in ("soak", "slow")
    ]
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    config = SimpleNamespace(option=SimpleNamespace(markexpr=expression), hook=hook)
    pytest_collection_modifyitems(config, items)  # type: ignore[arg-type]
    assert len(items) == kept
