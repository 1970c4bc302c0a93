import sys
from functools import partial

import pytest
import torch

from alexnet import layers
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.layers.backend import OPERATIONS, OURS_WINS, convolution_kind, pair_for
from alexnet.layers.pair import PAIRS, no_autocast, to_autocast, to_float32, wide
from alexnet.model import AlexNet, ModelConfig

WRITTEN = sorted(operation for operation, backend in PAIRS if backend == "reference")


def test_every_operation_starts_on_the_reference_pair():
    assert set(Backends().resolve("cpu").values()) == {"reference"}
    assert set(WRITTEN) == set(OPERATIONS)


def test_auto_is_the_reference_on_a_cpu_and_our_compiled_gradients_on_a_gpu():
    assert set(Backends(default="auto").resolve("cpu").values()) == {"reference"}
    assert Backends(default="auto").resolve("cuda") == Backends(default="fast").resolve("cuda")
    one = Backends(default="native", linear="auto").resolve("cpu")
    assert (one["linear"], one["relu"]) == ("reference", "native")


def test_an_operation_can_leave_the_default():
    chosen = Backends(default="native", relu="reference").resolve("cpu")
    assert chosen["relu"] == "reference"
    assert {backend for operation, backend in chosen.items() if operation != "relu"} == {"native"}


def small_net(**backends):
    """The paper's layers with 8 maps each, two towers."""
    config = ModelConfig(
        5, 56, channels=[8] * 5, hidden=[16, 16], kernel_size=[7, 5, 3, 3, 3], stride=[2, 1, 1, 1, 1]
    )
    return AlexNet(config, Backends(**backends).resolve("cpu"))


def backends_of_convolutions(net):
    return [getattr(net, f"conv{i}").backend for i in range(1, 6)]


def test_fastest_decides_for_each_kind_of_convolution(monkeypatch):
    assert backends_of_convolutions(small_net(default="fastest")) == ["library"] * 5
    monkeypatch.setitem(OURS_WINS, "cpu", ("conv2d 3x3", "conv2d 5x5 groups"))
    chosen = Backends(default="fastest").resolve("cpu")
    assert {name: b for name, b in chosen.items() if name.startswith("conv2d")} == {
        "conv2d": "library",
        "conv2d 3x3": "compiled",
        "conv2d 5x5 groups": "compiled",
    }
    net = small_net(default="fastest")
    assert backends_of_convolutions(net) == ["library", "compiled", "compiled", "library", "library"]
    assert str(net).count("backend=library") == 3
    assert net.backends == chosen


@pytest.mark.parametrize("choice", ["fast", "reference", "library", "native"])
def test_only_fastest_tells_convolutions_apart(choice, monkeypatch):
    monkeypatch.setitem(OURS_WINS, "cpu", ("conv2d 3x3",))
    resolved = "compiled" if choice == "fast" else choice
    assert backends_of_convolutions(small_net(conv2d=choice)) == [resolved] * 5


def test_every_row_of_the_table_is_a_kind_of_convolution():
    """A row with another name would change nothing."""
    kinds = {convolution_kind(size, groups) for size in (3, 5, 7, 11) for groups in (1, 2)}
    assert {kind for rows in OURS_WINS.values() for kind in rows} <= kinds
    assert convolution_kind(5, 2) == "conv2d 5x5 groups"


def test_an_override_without_effect_is_refused_with_the_operations_there_are():
    net = small_net()
    assert net.operations == {"conv2d", "dropout", "linear", "max_pool2d", "relu", "relu_lrn_pool"}
    Backends(relu="native", relu_lrn_pool="native").check_used(net.operations)
    with pytest.raises(
        UserError, match=r"backend\.local_response_norm=native has no effect: .* relu_lrn_pool$"
    ) as e:
        Backends(local_response_norm="native").check_used(net.operations)
    assert "\n" not in str(e.value)


def test_native_is_no_pair():
    assert pair_for("linear", "native") is None


@pytest.mark.parametrize("operation", WRITTEN)
def test_an_unknown_backend_is_refused_by_name(operation):
    with pytest.raises(UserError, match=f"backend='cuda' of {operation} must be one of reference"):
        pair_for(operation, "cuda")


@pytest.mark.parametrize("backend", ["cuda", "auto", "fast", "fastest"])
def test_a_module_refuses_what_is_no_pair_when_it_is_built(backend):
    """`fast` is a choice for a whole network and a kind of device; a module stores what it came to."""
    modules = [lambda backend: layers.Conv2d(4, 4, 3, backend=backend)]
    modules += [
        lambda backend: layers.Linear(4, 4, backend=backend),
        lambda backend: layers.MaxPool2d(3, backend=backend),
    ]
    modules += [partial(m, 5) for m in (layers.LocalResponseNorm, layers.SameMapNorm, layers.ReluLrnPool)]
    modules += [layers.ReLU, layers.Tanh, layers.Dropout, layers.CrossEntropyLoss]
    assert len(modules) == len(OPERATIONS)
    for module in modules:
        with pytest.raises(UserError, match=f"backend='{backend}' of .* must be one of reference"):
            module(backend=backend)


def test_a_missing_tool_is_named_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "alexnet.layers.triton", None)  # import raises ModuleNotFoundError
    monkeypatch.delitem(PAIRS, ("linear", "triton"), raising=False)
    with pytest.raises(UserError, match=r"Set backend\.linear=reference"):
        pair_for("linear", "triton")


def test_half_types_compute_in_float32():
    assert wide(torch.bfloat16) == wide(torch.float16) == wide(torch.float32) == torch.float32
    assert wide(torch.float64) == torch.float64


def test_autocast_changes_types_only_where_it_is_on_and_never_float64():
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    half = single.bfloat16()
    assert to_autocast(single, None)[0] is single
    assert to_float32(half) is half
    with torch.autocast("cpu", torch.bfloat16):
        cast, absent, kept = to_autocast(single, None, double)
        assert (cast.dtype, absent, kept.dtype) == (torch.bfloat16, None, torch.float64)
        assert to_float32(half).dtype == torch.float32
        assert to_float32(double).dtype == torch.float64
        with no_autocast(single):
            assert (single @ single).dtype == torch.float32
