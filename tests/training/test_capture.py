"""A captured step does what an ordinary step does, to the bit, and repeats nothing that should have changed.

A CUDA graph needs a GPU. Here two stand-ins record the same step: `CallAgain` runs its code anew at every replay;
`Tape` repeats the recorded operations on the recorded memory with the recorded numbers, as a CUDA graph does.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from tests.training.test_resume import Crash, assert_same_bits, crash_at, ended
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alexnet.data import augment
from alexnet.errors import UserError
from alexnet.training import assemble, capture, master_weights
from alexnet.training.capture import CapturedStep, CapturedStrategy, Inputs, Outputs, Step, obstacle
from alexnet.training.run import train

# Three epochs of six batches of 16 and one of 14. The rate falls within an epoch; colour noise ends and conv1 is frozen
# after the first and the second epoch. So three signatures come for both sizes of a batch.
CHANGING = [
    "trainer.precision=bf16-master-weights",
    "model=mini",
    "model.width=0.125",
    "model.hidden=[24,24]",
    "augment=code145",
    "augment.colour_until=0.3",
    "optim=code145",
    "optim.schedule=steps",
    "optim.milestones=[0.2,0.5]",
    "optim.conv1_frozen_at=0.6",
    "optim.conv1_slow_at=0.3",
    "optim.epochs=3",
    "evaluate=false",
]


class CallAgain:
    def __init__(self, device: torch.device) -> None:
        self.recorded = 0

    def warm_up(self, step: Step) -> Outputs:
        return step()

    def record(self, step: Step) -> Step:
        self.recorded += 1
        return step


class Tape(TorchDispatchMode):
    """Records operations and their memory; a replay computes each again and writes where it wrote before."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def warm_up(self, step: Step) -> Outputs:
        return step()

    def record(self, step: Step) -> Step:
        self.calls = calls = []
        with self:
            outputs = step()
        fresh = True  # recording has computed the first replay already

        @torch.no_grad()
        def replay() -> Outputs:
            nonlocal fresh
            if not fresh:
                for function, args, kwargs, recorded in calls:
                    again = function(*args, **kwargs)
                    for old, new in zip(tree_leaves(recorded), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)
            fresh = False
            return outputs

        return replay


@pytest.fixture
def plain_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler, which hides its operations from a tape, and with the GPU's way to mirror images."""
    monkeypatch.setattr(master_weights, "compiled", lambda function: function)
    monkeypatch.setattr(augment, "mirror", augment.mirror_without_waiting)


def capture_with(monkeypatch: pytest.MonkeyPatch, recorder: Callable[..., Any]) -> None:
    monkeypatch.setattr(assemble, "captures", lambda *_: True)
    cpu = torch.device("cpu")
    monkeypatch.setattr(assemble, "CapturedStrategy", lambda: CapturedStrategy(cpu, recorder))


def runs(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    recorder: Any,
    *overrides: str,
    crash: int = 0,
) -> tuple[Any, Any]:
    """What an ordinary run and a captured one end with; the captured one is resumed after a crash."""
    ordinary = compose("name=ordinary", *CHANGING, *overrides)
    captured = compose("name=captured", *CHANGING, *overrides)
    train(ordinary)
    with monkeypatch.context() as patch:
        capture_with(patch, recorder)
        if crash:
            with patch.context() as stop:
                crash_at(stop, crash)
                with pytest.raises(Crash):
                    train(captured)
        train(captured)
    return ended(assemble.run_directory(ordinary)), ended(assemble.run_directory(captured))


@pytest.mark.parametrize("recorder", [CallAgain, Tape])
@pytest.mark.parametrize("crash", [10, pytest.param(0, marks=pytest.mark.slow)])
def test_a_captured_run_ends_with_the_same_bits(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    plain_update: None,
    recorder: Any,
    crash: int,
) -> None:
    (a, rows_a), (b, rows_b) = runs(compose, monkeypatch, recorder, crash=crash)
    assert_same_bits(a, b)
    assert rows_a == rows_b


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_gradients_are_clipped_inside_the_graph(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, plain_update: None, clip: str
) -> None:
    limits = ["trainer.gradient_clip_val=1e-3", f"+trainer.gradient_clip_algorithm={clip}", "optim.epochs=1"]
    (a, _), (b, _) = runs(compose, monkeypatch, Tape, *limits)
    assert_same_bits(a, b)


def test_each_signature_is_recorded_once_and_the_ragged_batch_too(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, plain_update: None
) -> None:
    made: list[CallAgain] = []

    def recorder(device: torch.device) -> CallAgain:
        made.append(CallAgain(device))
        return made[-1]

    capture_with(monkeypatch, recorder)
    train(compose(*CHANGING, "optim.epochs=6"))
    # Noise on (epochs 0 and 1), off (2 and 3), conv1 frozen (4 and 5); the batch of 14 comes once an epoch.
    assert made[0].recorded == 2 * 3


@pytest.mark.parametrize("what", ["key", "rates"])
def test_a_number_that_is_baked_in_shows(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, plain_update: None, what: str
) -> None:
    """The comparison above can fail: a Python number in the place of a tensor repeats what was recorded."""
    real = CapturedStep._step

    def baked(self: CapturedStep, inputs: Inputs, colour_on: bool) -> Outputs:
        numbers = Inputs(inputs.batch, inputs.key, list(inputs.rates), inputs.filled)
        if what == "key":
            numbers.key = int(inputs.key)  # type: ignore[assignment]
        else:
            numbers.rates = [None if r is None else torch.tensor(float(r)) for r in inputs.rates]
        return real(self, numbers, colour_on)

    monkeypatch.setattr(CapturedStep, "_step", baked)
    (a, _), (b, _) = runs(compose, monkeypatch, Tape)
    with pytest.raises(AssertionError):
        assert_same_bits(a, b)


ONE_DEVICE: dict[str, Any] = {"devices": 1, "strategy": "auto", "detect_anomaly": False}
ON_A_GPU = {"device": "cuda", "precision": "bf16-master-weights", "speedups": {"fused_update": True}}


class WatchesGradients(Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None: ...


def test_what_stands_in_the_way_of_a_graph_is_named() -> None:
    assert obstacle(ONE_DEVICE, ON_A_GPU, ()) == ""
    hindered: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({}, {"device": "cpu"}, "only CUDA has graphs"),
        ({"devices": 2}, {}, "several devices"),
        ({"strategy": "ddp"}, {}, "several devices"),
        ({}, {"speedups": {"fused_update": False}}, "backend=fast"),
        ({}, {"precision": "16-mixed"}, "16-mixed"),
        ({"detect_anomaly": True}, {}, "detect_anomaly"),
    ]
    for trainer, resolved, words in hindered:
        assert words in obstacle(ONE_DEVICE | trainer, ON_A_GPU | resolved, ())
    hindered_by = obstacle(ONE_DEVICE, ON_A_GPU, [Callback(), WatchesGradients()])
    assert "WatchesGradients.on_after_backward" in hindered_by


def test_capture_is_refused_where_it_cannot_be_and_off_where_it_is_not_wanted(
    compose: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match=r"trainer.capture=True: the device is cpu.*trainer.capture=auto"):
        assemble.build_run(compose("trainer.capture=true"))
    with pytest.raises(UserError, match=r"trainer.capture=maybe must be one of auto, true, false"):
        assemble.build_run(compose("trainer.capture=maybe"))
    for choice in ("auto", "false"):
        run = assemble.build_run(compose(f"trainer.capture={choice}", "overwrite=true"))
        assert run.resolved["captured"] is False


def test_our_own_callbacks_need_no_hook_inside_a_step(compose: Callable[..., Any]) -> None:
    run = assemble.build_run(compose("optim.ema_decay=0.9"))
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    assert obstacle(ONE_DEVICE, ON_A_GPU | {"precision": "32-true"}, callbacks) == ""


def test_rates_are_written_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = capture.Batch(torch.ones(2, 1), torch.ones(2), capture.Draws(*(torch.ones(2),) * 4), 0)
    inputs = Inputs.like(batch, [0.1, 0.0])
    inputs.fill(batch, 3, [0.1, 0.0])
    (rate, frozen), version = inputs.rates, inputs.rates[0]._version  # type: ignore[union-attr]
    assert frozen is None
    assert float(rate) == pytest.approx(0.1)  # type: ignore[arg-type]
    inputs.fill(batch, 4, [0.1, 0.0])
    assert inputs.rates[0]._version == version  # type: ignore[union-attr]
    assert int(inputs.key) == 4
