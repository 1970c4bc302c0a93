import sys
from functools import partial

import pytest
import torch

from alexnet import layers
from alexnet.errors import UserError
from alexnet.layers import Backends
from alexnet.layers.backend import (
    OPERATIONS,
    PAIRS,
    no_autocast,
    pair_for,
    to_autocast,
    to_float32,
    wide,
)

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


def test_native_is_no_pair():
    assert pair_for("linear", "native") is None


@pytest.mark.parametrize("operation", WRITTEN)
def test_an_unknown_backend_is_refused_by_name(operation):
    with pytest.raises(UserError, match=f"'cuda' is no pair for {operation}: choose one of reference"):
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
        with pytest.raises(
            UserError, match=f"backend='{backend}' is no pair for .*: choose one of reference"
        ):
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
