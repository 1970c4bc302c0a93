"""The probe against numbers known beforehand, and against networks that do and do not start."""

import math

import pytest
import torch
from torch import nn

from alexnet.errors import UserError
from alexnet.layers import Dropout, LocalResponseNorm, ReluLrnPool, SameMapNorm
from alexnet.model import AlexNet, ModelConfig
from alexnet.training.master_weights import WorkingCopies
from alexnet.training.probe import STALLS, explain_stall, probe

CLASSES = 7


def network(std=0.1, bias=0.0):
    """A convolution, a response norm, and two fully connected layers of stock modules."""
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, 8, 3, padding=1))
    model.add_module("relu", nn.ReLU())
    model.add_module("norm", nn.LocalResponseNorm(4, alpha=0.3, k=2.0))
    model.add_module("flat", nn.Flatten())
    model.add_module("fc6", nn.Linear(8 * 36, 30))
    model.add_module("relu6", nn.ReLU())
    model.add_module("drop", nn.Dropout(0.5))
    model.add_module("fc8", nn.Linear(30, CLASSES))
    for module in (model.conv1, model.fc6, model.fc8):
        nn.init.normal_(module.weight, std=std)
        nn.init.constant_(module.bias, bias)
    return model


def images(n=16, scale=1.0):
    return scale * torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_statistics_of_a_layer_are_those_of_its_formulas():
    model, x = network(), images()
    report = probe(model, x)
    layer = report.layers[0]
    y = model.conv1(x).detach().flatten(1)
    assert layer.name == "conv1"
    assert layer.rms == pytest.approx(y.square().mean().sqrt().item(), rel=1e-5)
    assert layer.image_rms == pytest.approx(y.var(0).mean().sqrt().item(), rel=1e-5)
    pairs = [torch.cosine_similarity(y[i], y[j], 0) for i in range(16) for j in range(16) if i != j]
    assert layer.correlation == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    logits = model.eval()(x).detach()
    assert report.logit_signal == pytest.approx(logits.std(0).mean().item(), rel=1e-5)


def test_gradient_to_weight_is_that_of_the_loss():
    model, x = network().eval(), images()
    labels = torch.arange(16) % 3
    report = probe(model, x, labels)
    loss = nn.functional.cross_entropy(model(x), labels)
    loss.backward()
    ratios = {layer.name: layer.gradient_to_weight for layer in report.layers if layer.gradient_to_weight}
    assert report.loss == pytest.approx(loss.item())
    assert set(ratios) == {"conv1", "fc6", "fc8"}
    for name, ratio in ratios.items():
        w = model.get_parameter(f"{name}.weight")
        assert ratio == pytest.approx((w.grad.norm() / w.norm()).item(), rel=1e-4)


def test_dropout_of_2012_scales_no_logit():
    signals = []
    for mode in ("mask_only", "inverted"):
        torch.manual_seed(0)
        signals.append(probe(nn.Sequential(Dropout(0.5, mode=mode), *network()), images()).logit_signal)
    assert signals[0] == pytest.approx(signals[1])


def test_denominators_are_those_the_module_divides_by():
    model, x = network(), images(scale=5.0)
    (norm,) = probe(model, x).norms
    with torch.no_grad():
        inputs = model[:2](x)
        beta = model.norm.beta
        ratio = (inputs / model.norm(inputs)) ** (1 / beta) / model.norm.k  # NaN where the input is 0
    assert norm.largest == pytest.approx(ratio[inputs > 0].max().item(), rel=1e-4)
    assert 1 < norm.median < norm.p99 < norm.largest


def head(first):
    return nn.Sequential(first, nn.Flatten(), nn.LazyLinear(CLASSES))


def test_denominators_stay_inside_their_tower():
    x = torch.zeros(4, 8, 5, 5)
    x[:, 4] = 3 * torch.randn(4, 5, 5)  # alone in the window of its tower, one of four
    across, within = (
        probe(head(LocalResponseNorm(15, 0.3, groups=groups)), x).norms[0].median for groups in (1, 4)
    )
    assert within == 1 < across


def test_denominators_of_an_even_window_lean_as_torch_does():
    x = torch.zeros(4, 5, 5, 5)
    x[:, 0] = 1 + torch.rand(4, 5, 5)  # seen by maps 0, 1 and 2 of five: c - 2 <= 0 <= c + 1
    assert probe(head(LocalResponseNorm(4, 0.3)), x).norms[0].median > 1


def test_denominators_see_what_the_order_puts_before_them():
    x = -torch.rand(4, 8, 7, 7)
    for order, largest in (("relu_lrn_pool", 1.0), ("lrn_pool_relu", 1 + 0.3 / 5 * 5 / 2)):
        (norm,) = probe(head(ReluLrnPool(5, 0.3, 0.75, 2.0, order=order)), x).norms
        assert 0.5 * largest < norm.largest <= largest
        assert (norm.largest == 1) == (order == "relu_lrn_pool")


def test_denominators_of_a_same_map_norm_use_a_square_window():
    x = torch.zeros(2, 1, 9, 9)
    x[:, 0, 4, 4] = torch.tensor([1.0, 5.0])
    (norm,) = probe(head(SameMapNorm(5, alpha=0.3, k=1.0)), x).norms
    assert norm.largest == pytest.approx(1 + 0.3 / 25 * 5.0**2)
    assert norm.median == 1  # 25 of 81 positions see it


def test_dead_units_are_counted_by_feature_map():
    model = network()
    with torch.no_grad():
        model.conv1.bias[:2] = -100.0  # 2 of 8 maps never fire
        model.fc6.bias[:3] = -100.0
    dead = {layer.name: layer.dead for layer in probe(model, images()).layers}
    assert dead["conv1 ReLU"] == pytest.approx(2 / 8)
    assert dead["fc6 ReLU"] == pytest.approx(3 / 30)
    assert dead["fc8"] is None


def test_probe_leaves_the_network_as_it_was():
    model = network().train()
    model.fc8.eval()
    model.fc6.weight.grad = torch.ones_like(model.fc6.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    probe(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.fc8.training, model.drop.p) == (True, False, 0.5)
    assert bool((model.fc6.weight.grad == 1).all())
    assert model.conv1.weight.grad is None
    assert not any(module._forward_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_verdict_predicts_the_plateau_and_names_the_remedy():
    quiet = probe(network(std=0.01, bias=1.0), images())
    assert quiet.logit_signal < STALLS
    assert quiet.stalls
    assert f"{math.log(CLASSES):.3f}" in quiet.verdict()
    assert "model.init=he" in quiet.verdict()
    raw = probe(network(std=0.001, bias=1.0), images(scale=60.0))
    assert raw.stalls
    assert "model.init=fan_in" in raw.verdict()
    lively = probe(network(std=0.3), images())
    assert not lively.stalls
    assert "No plateau" in lively.verdict()
    assert "burst" in probe(network(std=3.0), images(scale=60.0)).verdict()


def test_verdict_names_dead_layers_and_broken_numbers():
    model = network()
    nn.init.constant_(model.fc6.bias, -100.0)
    assert "fc6" in probe(model, images()).verdict()
    nn.init.constant_(model.fc8.bias, torch.nan)
    broken = probe(model, images())
    assert broken.stalls
    assert "not a number" in broken.verdict()


def test_table_is_at_most_100_columns_and_names_every_layer():
    report = probe(network(), images())
    lines = report.table().splitlines()
    assert max(map(len, lines)) <= 100
    for name in ("conv1", "conv1 LocalResponseNorm", "fc6 ReLU", "fc8", "logit signal"):
        assert any(line.startswith(name) for line in lines)
    assert not any("Dropout" in line for line in lines)
    assert report.as_dict()["layers"][0]["name"] == "conv1"


def test_every_layer_of_alexnet_is_measured_where_one_activation_serves_many():
    config = ModelConfig(
        image_px=67, num_classes=CLASSES, channels=[8, 8, 8, 8, 8], hidden=[16, 16], same_map_norm=True
    )
    report = probe(AlexNet(config, seed=0), torch.randn(4, 3, 67, 67))
    names = [layer.name for layer in report.layers]
    weighted = ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert [layer.name for layer in report.layers if layer.gradient_to_weight is not None] == weighted
    assert {"conv3 ReLU", "fc7 ReLU", "conv5 MaxPool2d"} < set(names)
    norms = ["conv1 ReluLrnPool", "conv2 LocalResponseNorm", "conv2 SameMapNorm"]
    assert [norm.name for norm in report.norms] == norms
    assert len(set(names)) == len(names)


def test_one_image_cannot_be_compared():
    with pytest.raises(UserError, match="at least two"):
        probe(network(), images(1))


def stalled(model):
    nn.functional.cross_entropy(model.eval()(images()), torch.arange(16) % CLASSES).backward()
    return explain_stall(model, math.log(CLASSES), CLASSES, 3000)


def test_stall_is_explained_with_ratios_and_a_next_step():
    text = stalled(network())
    assert "Step 3,000" in text
    assert "0.0% from ln(7) = 1.9459" in text
    assert all(name in text for name in ("conv1", "fc6", "fc8", "probe=true"))
    assert max(map(len, text.splitlines())) <= 110


def test_the_dead_layer_nearest_the_loss_is_named():
    model = network()
    nn.init.constant_(model.fc6.bias, -100.0)  # starves conv1 too
    text = stalled(model)
    assert "fc6 is dead" in text
    assert "100%" in text


def test_the_gradients_of_a_stall_are_those_of_the_copies_that_did_the_work():
    """bf16-master-weights: the parameters of the network get none themselves."""
    model = network()
    nn.init.constant_(model.fc6.bias, -100.0)
    copies = WorkingCopies(model.eval(), torch.float64)
    nn.functional.cross_entropy(copies(images().double()), torch.arange(16) % CLASSES).backward()
    text = explain_stall(model, math.log(CLASSES), CLASSES, 3000, copies.by_name)
    assert "fc6 is dead" in text
    assert all(name in text for name in ("conv1", "fc8"))


def test_divergence_names_the_layer_and_the_rate():
    model = network()
    with torch.no_grad():
        model.fc6.weight[0, 0] = torch.nan
    text = explain_stall(model, math.nan, CLASSES, 10)
    assert "fc6.weight is no longer finite" in text
    assert "optim.lr" in text
