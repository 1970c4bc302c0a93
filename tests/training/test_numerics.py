"""A run stops at the first step whose loss is NaN or infinite, and names the layer that began it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.training.test_capture import CallAgain, capture_with, plain_update  # noqa: F401

from alexnet.errors import UserError
from alexnet.training import assemble, callbacks
from alexnet.training.callbacks import Stalled
from alexnet.training.classifier import Classifier
from alexnet.training.run import train

SHORT = ["optim.epochs=1", "evaluate=false", "optim.schedule=constant"]


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[Classifier], None]) -> None:
    """`change` is done to the network right before this step (counted from 1)."""
    ordinary = Classifier.outputs

    def changed(self: Classifier, *arguments: Any) -> Any:
        if self.global_step + 1 == step:
            with torch.no_grad():
                change(self)
        return ordinary(self, *arguments)

    monkeypatch.setattr(Classifier, "outputs", changed)


def break_input(classifier: Classifier) -> None:
    classifier.augment.mean.view(-1)[0] = torch.nan


def break_weight(classifier: Classifier) -> None:
    classifier.net.conv4.weight.view(-1)[0] = torch.nan


def break_layer(classifier: Classifier) -> None:
    """Finite weights whose products overflow."""
    classifier.net.fc6.weight.fill_(3e38)


@pytest.mark.parametrize(
    ("change", "origin"),
    [
        (break_input, "the input: 16 of its 16 images"),
        (break_weight, "conv4.weight: the update of the step before"),
        (break_layer, "the output of fc6, for 16 of 16 images"),
    ],
)
def test_the_step_and_the_origin_are_named(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, change: Any, origin: str
) -> None:
    before_step(monkeypatch, 3, change)
    with pytest.raises(Stalled, match=rf"Step 3: the loss is (nan|inf|-inf); first not finite: {origin}"):
        train(compose(*SHORT))


def test_a_gradient_is_traced_to_the_last_layer_that_it_broke(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It appears in step 2 and breaks all layers up to conv5; the loss shows it in step 3."""

    def hook(classifier: Classifier) -> None:
        classifier.net.conv5.weight.register_hook(lambda g: g * torch.nan)
        classifier.net.conv1.weight.register_hook(lambda g: g * torch.nan)

    before_step(monkeypatch, 2, hook)
    with pytest.raises(Stalled, match=r"Step 3: the loss is nan; first not finite: conv5.weight"):
        train(compose(*SHORT))


def test_weights_that_the_last_step_broke_are_not_saved(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(
        monkeypatch, 7, lambda classifier: classifier.net.fc8.bias.register_hook(lambda g: g * torch.nan)
    )
    config = compose(*SHORT)
    with pytest.raises(Stalled, match=r"Step 7: the loss is nan; first not finite: the holdout"):
        train(config)
    content = torch.load(assemble.run_directory(config) / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 4
    assert content["state_dict"]["net.fc8.bias"].isfinite().all()


def test_with_warn_it_is_said_once_and_training_goes_on(
    compose: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before_step(monkeypatch, 3, break_weight)
    with pytest.raises(UserError, match="its training diverged"):  # at the end, when the network is evaluated
        train(compose(*SHORT, "watchdog=warn"))
    assert capsys.readouterr().out.count("first not finite") == 1


def test_what_a_captured_step_shows_late_is_found_by_repeating_the_steps(
    compose: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    plain_update: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a GPU, where a look at each loss would wait for the device: seen at step 6, found at step 4.

    The master weights break in step 3, their working copies with the update, the output in step 4.
    """
    monkeypatch.setattr(callbacks.Watchdog.__init__, "__defaults__", (False, 6))
    ordinary = assemble.build_trainer

    def built(*arguments: Any) -> Any:
        each_step = arguments[-1]
        with monkeypatch.context() as patch:
            if not each_step:
                capture_with(patch, CallAgain)
            return ordinary(*arguments)

    monkeypatch.setattr(assemble, "build_trainer", built)
    before_step(monkeypatch, 3, break_layer)
    with pytest.raises(Stalled, match=r"Step 4: .*: the output of fc6, for 16 of 16 images"):
        train(compose(*SHORT, "trainer.precision=bf16-master-weights", "checkpoint_every=3"))
    assert "Step 6: the loss is" in capsys.readouterr().out
