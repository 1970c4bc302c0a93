import pytest
import torch
from cases import (
    COMPILES,
    assert_layouts_agree,
    assert_matches_native,
    assert_module_travels,
    assert_once_differentiable,
    assert_wrong_gradients_are_noticed,
    normals,
    outcome,
)

from alexnet.layers import Tanh, tanh

X = normals(2, 3, 4, 5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 7), (3,), ()])
def test_matches_native(shape):
    assert_matches_native(tanh, normals(*shape))


def test_matches_native_where_it_saturates():
    assert_matches_native(tanh, 20 * X)


def test_gradient_against_finite_differences():
    assert torch.autograd.gradcheck(tanh, X.clone().requires_grad_())


def test_layout_does_not_matter():
    assert_layouts_agree(tanh, X)


def test_every_term_matters():
    wrong = {
        "slope 1": lambda dy, y: dy,
        "only the square": lambda dy, y: -dy * y * y,
        "y for its square": lambda dy, y: dy * (1 - y),
        "no dy": lambda dy, y: 1 - y * y,
    }
    assert_wrong_gradients_are_noticed("tanh", wrong, lambda: assert_matches_native(tanh, X))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_computed_in_float32_and_rounded_once(autocast):
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, (dx,) = outcome(tanh, x)
    dy = normals(*X.shape, seed=1).bfloat16().float()
    assert torch.equal(y, x.float().tanh().bfloat16())
    assert torch.equal(dx, (dy * (1 - y.float() ** 2)).bfloat16())


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    assert_module_travels(Tanh(), X)
    assert repr(Tanh()) == "Tanh(backend=reference)"


def test_second_derivative_is_refused():
    assert_once_differentiable(tanh, X)
