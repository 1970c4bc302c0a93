"""The pins of the architecture: parameters, multiply-adds, shapes, towers, torchvision's own network."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import yaml

from alexnet.cli import CONF, typed
from alexnet.errors import UserError
from alexnet.layers import Backend, Backends
from alexnet.model import AlexNet, ModelConfig, layer_table
from alexnet.training.checkpoint import from_torchvision


def preset(name: str, **changes: Any) -> ModelConfig:
    """conf/model/<name>.yaml with what its defaults list names."""
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text()) or {}
    merged: dict[str, Any] = {}
    for base in values.pop("defaults", ["_self_"]):
        merged |= values if base == "_self_" else vars(preset(base))
    return typed(ModelConfig, merged | changes)


HALF_MINI = dict(width=0.5, hidden=[1024, 1024], num_classes=200)


@pytest.mark.parametrize(
    ("name", "changes", "parameters", "macs"),
    [
        ("paper", {}, 60_965_224, 724_406_816),
        ("code145", {}, 60_965_224, 724_406_816),
        ("caffe", {}, 60_965_224, 724_406_816),
        ("owt", {}, 61_100_840, 714_188_480),
        ("tiny", {"num_classes": 200}, 57_666_888, 658_403_616),
        ("mini", {"num_classes": 200}, 11_640_136, 143_190_560),
        ("mini", HALF_MINI, 3_017_480, 38_471_952),
    ],
)
def test_presets_have_the_parameters_and_multiply_adds_of_the_design(
    name: str, changes: dict[str, Any], parameters: int, macs: int
) -> None:
    config = preset(name, **changes)
    table = layer_table(config)
    assert sum(row.parameters for row in table) == parameters
    assert sum(row.macs for row in table) == macs
    if name in ("mini", "owt"):  # building the others would only take longer
        model = AlexNet(config, seed=0)
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", ["paper", "code145", "caffe", "owt"])
def test_pyramid_is_55_27_13_6(name: str) -> None:
    px = {row.name: row.px for row in layer_table(preset(name))}
    assert [px[n] for n in ("conv1", "pool1", "conv2", "pool2", "conv5", "pool5")] == [55, 27, 27, 13, 13, 6]


def test_tiny_has_the_shapes_of_the_paper_from_conv1_on() -> None:
    shapes = [
        [(r.name, r.channels, r.px) for r in layer_table(preset(n, num_classes=1000))]
        for n in ("tiny", "paper")
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["paper", "code145", "caffe", "owt", "mini"])
def test_every_activation_has_the_shape_of_the_table(name: str) -> None:
    config = preset(name, num_classes=10, width=0.125, hidden=[16, 16])
    model = AlexNet(config, seed=0).eval()
    seen: dict[str, tuple[int, ...]] = {}
    modules = dict(model.named_children())
    outputs = {"conv1": "conv1", "block1": "pool1", "conv2": "conv2", "block2": "pool2", "conv3": "conv3"}
    outputs |= {n: n for n in ("conv4", "conv5", "pool5", "fc6", "fc7", "fc8")}
    for module, row in outputs.items():
        modules[module].register_forward_hook(lambda m, x, y, row=row: seen.update({row: tuple(y.shape[1:])}))
    with torch.no_grad():
        model(torch.randn(2, 3, config.image_px, config.image_px))
    for row in layer_table(config):
        shape = (row.channels,) if row.name.startswith("fc") else (row.channels, row.px, row.px)
        assert seen[row.name] == shape, row.name


def test_a_tower_sees_its_own_channels_and_conv3_sees_both() -> None:
    """The gradient of one output unit says which channels of the layer before it reads."""
    model = AlexNet(preset("paper", num_classes=10, width=0.125, hidden=[8, 8]), seed=0)

    def sees(layer: torch.nn.Module, channels: int, px: int) -> list[bool]:
        x = torch.randn(1, channels, px, px, requires_grad=True)
        layer(x)[:, 0].sum().backward()  # channel 0 belongs to the first tower
        return [bool(x.grad[0, c].abs().sum() > 0) for c in range(channels)]

    assert sees(model.conv2, 12, 9) == [True] * 6 + [False] * 6
    assert sees(model.conv3, 32, 5) == [True] * 32
    assert sees(model.conv4, 48, 5) == [True] * 24 + [False] * 24
    assert sees(model.conv5, 48, 5) == [True] * 24 + [False] * 24


@pytest.mark.parametrize(("preset_name", "crosses"), [("paper", False), ("caffe", True)])
def test_response_norm_crosses_towers_only_where_the_preset_says(preset_name: str, crosses: bool) -> None:
    model = AlexNet(preset(preset_name, num_classes=10, width=0.125, hidden=[8, 8], lrn_alpha=0.3), seed=0)
    x = torch.rand(1, 12, 9, 9) + 0.5
    x.requires_grad_()
    model.block1(x)[:, 5].sum().backward()  # the last channel of the first tower
    assert bool(x.grad[0, 6].abs().sum() > 0) is crosses


def test_224_is_the_paper_s_input_by_the_ceil_rule() -> None:
    """Three zero columns on the right: a 224-pixel image and the same image with them give equal conv1 outputs."""
    conv1 = AlexNet(preset("paper", num_classes=10, width=0.125, hidden=[8, 8]), seed=0).conv1
    x = torch.randn(1, 3, 224, 224)
    padded = torch.nn.functional.pad(x, (0, 3, 0, 3))
    expected = torch.nn.functional.conv2d(padded, conv1.weight, conv1.bias, stride=4)
    assert expected.shape[-1] == 55
    torch.testing.assert_close(conv1(x), expected, rtol=1e-4, atol=1e-4)


def test_torchvision_s_weights_load_strictly_and_give_equal_logits() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.alexnet(num_classes=10).eval()
    ours = AlexNet(
        preset("owt", num_classes=10), Backends(default=Backend.native).resolve("cpu"), seed=1
    ).eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()), strict=True)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_a_foreign_state_dict_is_refused() -> None:
    with pytest.raises(UserError, match="must be a parameter of torchvision's alexnet"):
        from_torchvision({"features.1.weight": torch.zeros(1)})


def test_initial_weights_depend_on_seed_and_name_alone() -> None:
    """Arms of an ablation start from the same layers, whatever else they remove."""
    whole = AlexNet(preset("mini", num_classes=10, width=0.125, hidden=[16, 16]), seed=3)
    torch.manual_seed(99)
    other = AlexNet(
        preset("mini", num_classes=10, width=0.125, hidden=[16, 16], norm1=False, dropout=0.0), seed=3
    )
    for (name, a), b in zip(whole.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(whole.conv2.weight, AlexNet(whole.config, seed=4).conv2.weight)


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ("normal", 0.03),
        ("fan_in", 0.03 * (2304 / 288) ** 0.5),
        ("he", (2 / 288) ** 0.5),
        ("torch", 288**-0.5 / 3**0.5),
    ],
)
def test_initial_standard_deviation_follows_its_rule(init: str, expected: float) -> None:
    config = preset("code145", num_classes=10, width=0.125, hidden=[16, 16], init=init)
    model = AlexNet(config, seed=0)
    weight = model.conv3.weight  # 48 x 32 x 3 x 3: fan-in 288; 13,824 draws
    assert weight.std().item() == pytest.approx(expected, rel=4 / (2 * weight.numel()) ** 0.5)
    if init != "torch":
        assert model.conv2.bias.eq(1).all()
        assert model.fc8.bias.eq(0).all()


def test_every_switch_builds_and_trains_one_step() -> None:
    switches: list[dict[str, Any]] = [
        {"towers": 1}, {"conv3": False}, {"conv4": False}, {"conv5": False}, {"activation": "tanh"},
        {"order1": "lrn_pool_relu"}, {"order2": "lrn_pool_relu"}, {"norm1": False}, {"norm2": False},
        {"same_map_norm": True}, {"lrn_within_tower": False}, {"lrn_size": 4}, {"lrn_alpha_divided": False},
        {"pool_size": 2}, {"pool_ceil": False}, {"pool_ties": "first"}, {"dropout_mode": "inverted"},
        {"dropout_before": True}, {"dropout": 0.0}, {"init": "he"}, {"init": "torch"},
    ]  # fmt: skip
    for switch in switches:
        config = preset("mini", num_classes=4, width=0.125, hidden=[8, 8], **switch)
        model = AlexNet(config, seed=0)
        model(torch.randn(2, 3, 56, 56), dropout_key=1).logsumexp(1).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters()), switch


def test_printed_model_names_the_backend_of_every_layer() -> None:
    text = repr(AlexNet(preset("mini", num_classes=4, width=0.125, hidden=[8, 8]), seed=0))
    layers = [line for line in text.splitlines() if line.strip().startswith("(")]
    assert len(layers) == 13
    assert all("backend=reference" in line for line in layers)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_px": 5}, "too small"),
        ({"channels": [1, 2]}, "channels"),
        ({"padding": [[1]] * 5}, "padding"),
        ({"num_classes": 1}, "num_classes"),
        ({"dropout": 1.0}, "dropout"),
        ({"width": 0.0}, "width"),
        ({"width": 1000.0}, r"parameters take [\d,]+ GB .* lower model.width"),
        ({"towers": 0}, "towers"),
        ({"padding": [[0, 3, 0, 0], *[[1] * 4] * 4]}, r"model.padding: \[0, 3, 0, 0\]"),
        ({"padding": [[-1] * 4] * 5}, r"model.padding: \[-1"),
        ({"hidden": [0, 4]}, r"model.hidden=\[0, 4\]"),
        ({"init_std": [-1.0] * 8}, "model.init_std"),
        ({"lrn_k": 0.0}, "model.lrn_k=0.0"),
    ],
)
def test_a_wrong_switch_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        AlexNet(preset("mini", **changes))
    assert "\n" not in str(caught.value)


def test_an_image_of_another_size_is_refused_although_rounding_up_would_take_it() -> None:
    net = AlexNet(preset("mini", width=0.0625, hidden=[4, 4], num_classes=2)).eval()
    for shape in [(1, 3, 57, 57), (1, 1, 56, 56), (1, 3, 56, 55), (3, 56, 56)]:
        with pytest.raises(UserError, match=r"do not fit model.image_px=56: give \(N, 3, 56, 56\)"):
            net(torch.zeros(shape))
    assert net(torch.zeros(1, 3, 56, 56)).shape == (1, 2)


def test_presets_are_the_files_of_conf() -> None:
    assert {p.stem for p in Path(CONF / "model").glob("*.yaml")} == {
        "paper",
        "code145",
        "caffe",
        "owt",
        "tiny",
        "mini",
    }
