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

from alexnet.errors import UserError
from alexnet.layers import ReLU, relu

X = normals(2, 3, 4, 5)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 7), (3,), ()])
def test_matches_native(shape):
    assert_matches_native(relu, normals(*shape))


def test_matches_native_at_zero_infinity_and_nan():
    inf, nan = float("inf"), float("nan")
    special = torch.tensor([0.0, -0.0, inf, -inf, nan, 1.0, -1.0])
    assert_matches_native(relu, special, equal_nan=True)


def test_an_infinite_gradient_does_not_pass_a_closed_unit():
    x = torch.tensor([-1.0, 2.0], requires_grad=True)
    relu(x).backward(torch.tensor([float("inf"), 3.0]))
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 3.0]))


def test_gradient_against_finite_differences():
    away_from_kink = X + 0.1 * X.sign()
    assert torch.autograd.gradcheck(relu, away_from_kink.requires_grad_())


def test_layout_does_not_matter():
    assert_layouts_agree(relu, X)


def test_euler():
    """relu(c x) = c relu(x) for c > 0, so sum x dx = sum y dy."""
    y, (dx,) = outcome(relu, X)
    torch.testing.assert_close((X * dx).sum(), (y * normals(*X.shape, seed=1)).sum())


def test_every_term_matters():
    wrong = {
        "no mask": lambda dy, y: dy,
        "the mask of the closed units": lambda dy, y: dy * (y <= 0),
        "y for its sign": lambda dy, y: dy * y,
        "units at zero open": lambda dy, y: dy * (y >= 0),
    }
    assert_wrong_gradients_are_noticed("relu", wrong, lambda: assert_matches_native(relu, X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_the_type_and_is_exact_in_it(dtype):
    x = X.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx,) = outcome(relu, x)
    assert y.dtype == dx.dtype == dtype
    torch.testing.assert_close((y, [dx]), outcome(torch.relu, x), rtol=0, atol=0)


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    assert_module_travels(ReLU(), X)
    assert repr(ReLU()) == "ReLU(backend=reference)"


def test_takes_the_arguments_of_torch_and_refuses_to_work_in_place():
    assert ReLU(False)(torch.tensor([-1.0])) == 0
    for make in (lambda: ReLU(inplace=True), lambda: relu(torch.ones(1), True)):
        with pytest.raises(UserError, match="inplace=True must be False"):
            make()


def test_second_derivative_is_refused():
    assert_once_differentiable(relu, X)


def test_attributes_that_are_set_later_count():
    module = ReLU()
    module.inplace = True
    with pytest.raises(UserError, match="inplace=True"):
        module(X)
