"""scripts/setup.sh: what stands between a fresh machine and the first command. Python is a stub here."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from alexnet.config import CONF

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
