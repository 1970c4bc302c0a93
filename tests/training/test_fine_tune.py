"""Training from another network's weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import alexnet

from alexnet.errors import UserError
from alexnet.model import AlexNet
from alexnet.training import assemble
from alexnet.training.checkpoint import load
from alexnet.training.fine_tune import take_weights
from alexnet.training.run import train

# The network of the fixture `checkpoint`, which knows three classes; the synthetic set has ten.
SAME_NET = ["model.hidden=[8,8]", "optim.epochs=1", "evaluate=false"]


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-masters", marks=pytest.mark.slow)])
def test_only_the_last_layer_is_new_and_frozen_convolutions_stay_bit_for_bit(
    precision: str, checkpoint: Path, compose: Callable[..., Any]
) -> None:
    backend = ["backend=fast", f"trainer.precision={precision}"] if precision != "32-true" else []
    config = compose(*SAME_NET, *backend, f"init_from={checkpoint}", "freeze=features")
    begun = assemble.build_run(config)
    origin, fresh = load(checkpoint).net.state_dict(), begun.classifier.net.state_dict()
    assert {name for name, value in fresh.items() if not torch.equal(value, origin[name])} == {
        "fc8.weight",
        "fc8.bias",
    }
    train(config)
    run = assemble.run_directory(config)
    trained = load(run).net.state_dict()
    frozen = {name for name, value in trained.items() if torch.equal(value, origin.get(name, value[:0]))}
    assert frozen == {name for name in origin if name.startswith("conv")}
    record = json.loads((run / "run.json").read_text())
    assert record["init_from"]["new_layers"] == ["fc8"]
    assert len(record["init_from"]["sha256"]) == 64


def test_a_resumed_run_does_not_ask_for_its_origin_again(
    checkpoint: Path, compose: Callable[..., Any], tmp_path: Path
) -> None:
    origin = tmp_path / "origin.ckpt"
    origin.write_bytes(checkpoint.read_bytes())
    config = compose(*SAME_NET, f"init_from={origin}")
    train(config)
    origin.unlink()
    assert assemble.build_run(compose(*SAME_NET, f"init_from={origin}")).record.finished
    with pytest.raises(UserError, match=r"init_from: .* there, None now"):
        assemble.build_run(compose(*SAME_NET))


def test_the_probe_judges_the_weights_that_were_loaded_and_the_watchdog_does_not_guess(
    checkpoint: Path, compose: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    for value in content["state_dict"].values():
        value.zero_()
    torch.save(content, tmp_path / "zero.ckpt")
    zero = [*SAME_NET, "optim.lr=1e-4", "watchdog_steps=5", f"init_from={tmp_path / 'zero.ckpt'}"]
    run = assemble.build_run(compose(*zero))
    assert run.classifier.initial_probe(run.data.train_store, run.data.split[0]).logit_signal == 0
    run.classifier.loaded = False
    assert run.classifier.initial_probe(run.data.train_store, run.data.split[0]).logit_signal > 0
    train(compose(*zero))  # the plateau is said, but nobody knows that it will last
    assert capsys.readouterr().out.count("ln(10)") == 1
    train(compose(*zero, "probe=true"))
    assert "Expect a plateau" in capsys.readouterr().out


def test_the_same_classes_keep_their_last_layer(checkpoint: Path) -> None:
    classifier = load(checkpoint)
    net = AlexNet(classifier.net.config, seed=5)
    found = take_weights(net, str(checkpoint), classifier.classes)
    assert found["new_layers"] == []
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), classifier.net.parameters(), strict=True))


@pytest.mark.slow
def test_torchvisions_file_begins_owt_for_other_classes(tmp_path: Path) -> None:
    torch.save(alexnet().state_dict(), tmp_path / "alexnet.pth")
    net = AlexNet.from_preset("owt", num_classes=3)
    found = take_weights(net, str(tmp_path / "alexnet.pth"), [{"wnid": c, "words": c} for c in "abc"])
    assert found["new_layers"] == ["fc8"]


def test_another_network_is_refused_by_its_first_difference(checkpoint: Path) -> None:
    net = AlexNet.from_preset("mini", num_classes=3)
    with pytest.raises(UserError, match=r"conv1.weight is \(12, 3, 7, 7\) there and \(96, 3, 7, 7\) here"):
        take_weights(net, str(checkpoint), [])


def test_random_weights_are_not_frozen(compose: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match="freeze=features would freeze random weights: set init_from"):
        compose("freeze=features")
