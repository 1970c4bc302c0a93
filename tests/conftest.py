"""What every test shares: one thread per process, a small synthetic store, and runs that take a second."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; the processes that tests start inherit it

import hydra
import pytest
import torch
from omegaconf import open_dict

from alexnet.bench.config import Benchmark
from alexnet.claims.config import Reproduce
from alexnet.cli import CONF, load, register
from alexnet.data.prepare import PrepareConfig, PrepareData, prepare
from alexnet.evaluate import Evaluate
from alexnet.gradcheck.config import CheckGradients
from alexnet.predict import Predict
from alexnet.training.config import Train

SCHEMAS = {  # of the scripts, by name
    "train": Train,
    "evaluate": Evaluate,
    "prepare_data": PrepareData,
    "check_gradients": CheckGradients,
    "reproduce": Reproduce,
    "benchmark": Benchmark,
    "predict": Predict,
}
for name, schema in SCHEMAS.items():
    register(name, schema)

SMALL_NET = [
    "model=mini",
    "model.width=0.125",
    "model.hidden=[24,24]",
    "data.batch_size=16",
    "data.eval_batch_size=32",
    "optim.epochs=2",
    "log_every=2",
    "checkpoint_every=4",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run inside a test draws nothing: that takes as long as training. Runs of wider fixtures draw theirs."""
    monkeypatch.setattr("alexnet.training.run._picture", lambda *_: "not drawn")


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data_dir that holds the synthetic set: 110 train, 10 holdout and 40 val images."""
    directory = tmp_path_factory.mktemp("data")
    config = PrepareConfig(
        name="synthetic", root=str(directory / "synthetic"), n_train=120, n_val=40, workers=0
    )
    prepare(config)
    return directory


@pytest.fixture
def compose(data_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    """compose("optim.lr=0.1", ...) -> the Train configuration of a small run in this test's own directory."""

    def composed(*overrides: str) -> Any:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            fixed = [f"data_dir={data_dir}", f"output_dir={tmp_path}", "name=test"]
            config = hydra.compose("train", [*fixed, *SMALL_NET, *overrides])
        with open_dict(config):
            return load(config)

    return composed
