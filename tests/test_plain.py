"""plain.py is the trainer without the trainer: the same losses, the same weights, to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alexnet import plain
from alexnet.training import assemble
from alexnet.training.metrics import read_metrics
from alexnet.training.run import train


def test_fourteen_steps_end_with_the_bits_of_the_trainer(
    compose: Callable[..., Any], data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["model.width=0.5", "model.hidden=[1024,1024]", "data.batch_size=16", "data.eval_batch_size=48"]
    config = compose(*size, "optim.epochs=2", "log_every=1", "checkpoint_every=0", "evaluate=false")
    train(config)
    directory = assemble.run_directory(config)
    expected = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    metrics = read_metrics(directory / "metrics.csv")
    weights, losses = plain.train(str(data_dir / "synthetic"), epochs=2, size=16)
    assert [row.train["loss"] for row in metrics.steps] == losses
    for name, (weight, bias) in weights.items():
        assert torch.equal(weight, expected[f"net.{name}.weight"]), name
        assert torch.equal(bias, expected[f"net.{name}.bias"]), name
    error = metrics.epochs[-1].holdout["top1_error"]
    assert f"holdout error {100 * error:.1f} %" in capsys.readouterr().out.splitlines()[-1]
