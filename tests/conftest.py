"""What every test shares: one thread per process, a small synthetic store, and runs that take a second."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch is imported; the processes that tests start inherit it
# Each process of the suite would start compilers of its own, which import torch first; a quarter of the time.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import hydra
import numpy as np
import pytest
import torch
from omegaconf import open_dict
from PIL import Image

from alexnet.bench.config import Benchmark
from alexnet.claims.config import Reproduce
from alexnet.cli import CONF, load, plain, register
from alexnet.data.augment import AugmentConfig, statistics_of
from alexnet.data.prepare import PrepareConfig, PrepareData, prepare
from alexnet.data.sources import SourceKind
from alexnet.evaluate import Evaluate
from alexnet.export import Export
from alexnet.gradcheck.config import CheckGradients
from alexnet.layers import Backends
from alexnet.model import ModelConfig
from alexnet.optim import OptimConfig
from alexnet.predict import Predict
from alexnet.training.classifier import Classifier
from alexnet.training.config import Train

SCHEMAS = {  # of the scripts, by name
    "train": Train,
    "evaluate": Evaluate,
    "prepare_data": PrepareData,
    "check_gradients": CheckGradients,
    "reproduce": Reproduce,
    "benchmark": Benchmark,
    "predict": Predict,
    "export": Export,
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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The soak takes an hour: it runs only where it is asked for by its name, pytest -m soak."""
    if "soak" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("soak")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/<class>/<i>.jpg of several sizes, one turned by EXIF, one with transparency."""
    root, draw = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for label in ("cat", "dog", "owl"):
        (root / label).mkdir(parents=True)
        for i in range(5):
            coarse = draw.integers(0, 255, (6 + i, 9, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((90 + 7 * i, 70), Image.Resampling.BICUBIC)
            exif = picture.getexif()
            exif[0x0112] = 6 if i == 1 else 1  # a camera that was held upright
            picture.save(root / label / f"{i}.jpg", exif=exif)
    return root


@pytest.fixture(scope="session")
def checkpoint(photos: Path) -> Path:
    """An untrained network for a store of these photos, as a checkpoint."""
    root = str(photos.parent / "data/photos")
    kind = {"name": "photos", "source": SourceKind.folder, "path": str(photos), "val_fraction": 0.4}
    train, _ = (p.store for p in prepare(PrepareConfig(root=root, px=64, workers=0, **kind)))  # type: ignore[arg-type]
    model = ModelConfig(
        num_classes=3,
        image_px=56,
        kernel_size=[7, 5, 3, 3, 3],
        stride=[2, 1, 1, 1, 1],
        width=0.125,
        hidden=[8, 8],
    )
    arguments: dict[str, Any] = {
        "model": plain(model),
        "augment": plain(AugmentConfig(crop_px=56)),
        "optim": plain(OptimConfig()),
        "backend": Backends().resolve("cpu"),
        "classes": train.classes,
        "px": 64,
        "seed": 0,
        "data": "photos",
    }
    classifier = Classifier(**arguments, statistics=statistics_of(train))
    path = photos.parent / "net.ckpt"
    torch.save({"state_dict": classifier.state_dict(), "hyper_parameters": arguments}, path)
    return path
