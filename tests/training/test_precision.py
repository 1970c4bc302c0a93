"""`trainer.precision` names what is computed: before the first step, in the record, and in evaluation."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric.connector import _PRECISION_INPUT_STR
from torch import Tensor, nn

from alexnet import system
from alexnet.errors import UserError
from alexnet.system import LIGHTNING, PRECISIONS, checked_precision, set_precision, under_precision
from alexnet.training import assemble
from alexnet.training.scoring import log_probabilities


def float32_formats() -> tuple[str, bool, bool]:
    """Of products, as torch names them; whether cuBLAS and cuDNN may use TF32."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
    )


IEEE, TF32 = ("highest", False, False), ("high", True, True)


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    with under_precision("32-true"):
        yield


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_name_sets_products_and_convolutions_alike(name: str) -> None:
    set_precision("32-true" if name == "tf32" else "tf32")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    set_precision(name)
    assert float32_formats() == (TF32 if name == "tf32" else IEEE)
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    # torch's own code reads the same switches under their newer names, and through this context.
    tf32 = "tf32" if name == "tf32" else None
    assert torch.backends.cuda.matmul.fp32_precision == (tf32 or "ieee")
    assert torch.backends.cudnn.conv.fp32_precision == (tf32 or "none")  # none: nothing lowers it
    with torch.backends.cudnn.flags(enabled=True):
        pass


class Seen(pl.Callback):
    """The formats at the start of the first training step."""

    formats: tuple[str, bool, bool] | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        self.formats = self.formats or float32_formats()


@pytest.mark.parametrize(("name", "expected"), [("32-true", IEEE), ("tf32", TF32), ("bf16-mixed", IEEE)])
def test_training_sets_it_before_the_first_step_and_records_it(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, bool, bool]
) -> None:
    """On this machine's CPU, told that it is a GPU, which `tf32` needs."""
    monkeypatch.setattr(system, "device_type_of", lambda *_: "cuda")
    set_precision("32-true" if name == "tf32" else "tf32")
    run = assemble.build_run(compose("backend=reference", f"trainer.precision={name}", "optim.epochs=1"))
    seen = Seen()
    run.trainer.callbacks.append(seen)  # type: ignore[attr-defined]
    run.start()
    run.fit()
    assert seen.formats == expected
    resolved = json.loads((run.directory / "run.json").read_text())["resolved"]
    assert resolved["precision"] == name
    assert resolved["float32_matmul_and_conv"] == ("tf32" if name == "tf32" else "ieee")


def test_evaluation_is_in_ieee_float32_and_leaves_the_precision_as_it_was() -> None:
    seen = []

    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(float32_formats())
            return x.flatten(1)

    class Views(nn.Module):
        def centre(self, images: Tensor) -> Tensor:
            return images.permute(0, 3, 1, 2).float()

    set_precision("tf32")
    log_probabilities(Net(), Views(), np.zeros((2, 3, 3, 3), np.uint8))
    assert seen == [IEEE]
    assert float32_formats() == TF32


def test_what_is_unknown_is_refused_in_one_line_before_anything_is_written(
    compose: Callable[..., Any], tmp_path: Path
) -> None:
    for mistake in ("fp8", "tf32", "16"):
        config = compose(f"trainer.precision={mistake}", f"data_dir={tmp_path / 'new'}")
        with pytest.raises(UserError, match=rf"trainer\.precision={mistake} ") as caught:
            assemble.build_run(config)
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(UserError, match=r"needs a CUDA device: set trainer\.precision=32-true"):
        checked_precision("tf32", "cpu")
    assert checked_precision("tf32", "cuda") == "tf32"


def test_lightning_knows_the_names_it_is_given() -> None:
    assert set(LIGHTNING) <= set(get_args(_PRECISION_INPUT_STR))
