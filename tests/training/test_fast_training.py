"""Training under `fast`: what is compiled is compiled in the first step, and runs the same every time.

What trains a compiled network is tested here and not beside its like: in one process the second run finds the graphs
of the first.
"""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from tests.training.test_capture import CallAgain, runs
from tests.training.test_resume import assert_resumed_with_master_weights, assert_same_bits
from torch import Tensor
from torch._dynamo.utils import counters

from alexnet.training import assemble

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

# 110 images in batches of 16, the last of 14; 10 holdout images in batches of 4, the last of 2.
RAGGED = "data.batch_size=16", "data.eval_batch_size=4", "data.drop_last=false"


class Graphs(pl.Callback):
    """How many graphs there are after each batch: (epoch, "train" or "val", batch) -> number."""

    def __init__(self) -> None:
        self.after: dict[tuple[int, str, int], int] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count(trainer, "train")

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count(trainer, "val")

    def _count(self, trainer: pl.Trainer, kind: str) -> None:
        epoch = trainer.current_epoch
        batch = sum(key[:2] == (epoch, kind) for key in self.after)
        self.after[epoch, kind, batch] = counters["stats"]["unique_graphs"]


def trained(config: Any) -> tuple[Graphs, dict[str, Tensor]]:
    run = assemble.build_run(config)
    graphs = Graphs()
    run.trainer.callbacks.append(graphs)  # type: ignore[attr-defined]
    run.start()
    run.fit()
    return graphs, run.classifier.state_dict()


@pytest.mark.parametrize("precision", ["32-true", "bf16-master-weights"])
def test_after_the_first_batch_nothing_is_compiled(compose: Callable[..., Any], precision: str) -> None:
    torch.compiler.reset()
    counters.clear()
    graphs, _ = trained(compose("backend=fast", f"trainer.precision={precision}", *RAGGED))
    first_train, first_val = graphs.after[0, "train", 0], graphs.after[0, "val", 0]
    assert 0 < first_train <= first_val
    for (epoch, kind, batch), number in graphs.after.items():
        before_validation = epoch == 0 and kind == "train"
        assert number == (first_train if before_validation else first_val), (epoch, kind, batch)
    assert [key for key in graphs.after if key[:2] == (1, "val")] == [(1, "val", i) for i in range(3)]
    assert not counters["graph_break"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-master-weights"])
def test_deterministic_mode_raises_nothing_and_runs_are_bitwise_equal(
    compose: Callable[..., Any], precision: str
) -> None:
    """This mode also fills new memory with NaN: what a pair forgot to write would show."""
    config = "backend=fast", f"trainer.precision={precision}", *RAGGED
    _, expected = trained(compose(*config))
    torch.use_deterministic_algorithms(True)
    try:
        _, again = trained(compose(*config, "overwrite=true"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(again[name], value) for name, value in expected.items())


def test_a_captured_run_of_compiled_pairs_ends_with_the_same_bits(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (a, rows_a), (b, rows_b) = runs(compose, monkeypatch, CallAgain, "backend=fast", crash=10)
    assert_same_bits(a, b)
    assert rows_a == rows_b


def test_resume_with_master_weights(compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_resumed_with_master_weights(compose, monkeypatch, "fast")
