"""A reduced scale=smoke: real claims, a net of a few units, three steps per run."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from alexnet.claims.config import Reproduce, Scale

REDUCED = [
    "data.name=synthetic",
    "data.batch_size=16",
    "model.width=0.0625",
    "model.hidden=[8,8]",
    "optim.epochs=1",
    "trainer.limit_train_batches=3",
    "log_every=1",
    "checkpoint_every=1",
]


def reduced(data_dir: Path, output_dir: Path, *claims: str, **keys) -> Reproduce:
    keys = {"seeds": 1, "overrides": list(REDUCED), **keys}
    return Reproduce(
        claims=list(claims), scale=Scale.smoke, data_dir=str(data_dir), output_dir=str(output_dir), **keys
    )


@pytest.fixture(scope="session")
def finished(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reproduce:
    """Two claims and Figure 4, run and reported; to be read only."""
    from alexnet.claims.runner import reproduce

    settings = reduced(
        data_dir, tmp_path_factory.mktemp("claims"), "s4_2_dropout", "s4_1_ten_views", "figure4", seeds=2
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet.training.run._picture", lambda *_: "not drawn")  # takes as long as training
        reproduce(settings)
    return settings


def directory(settings: Reproduce, name: str, seed: int = 1) -> Path:
    return Path(settings.output_dir) / "train" / "smoke" / name / f"seed{seed}"


@pytest.fixture
def copied(finished: Reproduce, tmp_path: Path) -> Reproduce:
    """The same runs, to be changed and reported."""
    shutil.copytree(finished.output_dir, tmp_path, dirs_exist_ok=True)
    return dataclasses.replace(finished, output_dir=str(tmp_path), report=True)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are files, but none is rendered: that takes longer than everything else of a report."""

    def save(_: Any, path: str | Path) -> Path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("<svg/>")
        return Path(path)

    monkeypatch.setattr("alexnet.pages.figures._save", save)
