"""The literal pipeline of 2012 (256 -> 224, code145) from files to ten views, on images made here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from alexnet.data.prepare import PrepareConfig, prepare
from alexnet.evaluate import Evaluate, evaluate
from alexnet.training import assemble
from alexnet.training.run import train
from tests.training.test_resume import Crash, assert_same_bits, crash_at, ended


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes in folders by wnid, larger than 256 pixels on one side and not square."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for split, n in (("train", 10), ("val", 3)):
        for wnid in ("n00000001", "n00000002"):
            folder = root / "raw" / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 255, (8, 10, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((320, 280)).save(folder / f"{wnid}_{i}.JPEG")
    config = PrepareConfig(
        name="imagenet",
        root=str(root / "imagenet"),
        source="imagenet",
        path=str(root / "raw"),
        px=256,
        workers=0,
        official=False,  # two classes are not the published thousand
    )
    prepare(config)
    return root


@pytest.mark.slow
def test_prepare_train_resume_and_ten_views(
    imagenet: Path, compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = ["experiment=imagenet_subset", f"data_dir={imagenet}", "model.width=0.0625", "model.hidden=[8,8]"]
    small += ["data.batch_size=4", "optim.epochs=2", "checkpoint_every=2", "trainer=cpu", "evaluate=true"]
    # compose() sets model=mini for its small runs; the recipe's own network comes back here.
    # The backend that needs no compiler: the compiled pairs have tests of their own.
    small += ["model=code145", "backend=reference", "trainer.enable_progress_bar=false"]
    straight, broken = compose(*small, "name=straight"), compose(*small, "name=broken")
    assert straight.model.image_px == 224
    train(straight)
    with monkeypatch.context() as patch:
        crash_at(patch, 3)
        with pytest.raises(Crash):
            train(broken)
    train(broken)
    (a, rows_a), (b, rows_b) = (ended(assemble.run_directory(c)) for c in (straight, broken))
    assert_same_bits(a, b)
    assert rows_a == rows_b
    (result,) = evaluate(Evaluate(str(assemble.run_directory(broken)), views=10, data_dir=str(imagenet)))
    assert (result.views, result.n) == (10, 6)
