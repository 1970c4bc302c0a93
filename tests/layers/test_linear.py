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
from alexnet.layers import Linear, linear
from alexnet.layers.linear import linear_backward

X, W, B = normals(6, 5), normals(4, 5, seed=2), normals(4, seed=3)


@pytest.mark.parametrize("leading", [(6,), (1,), (3, 2), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_native(leading, bias):
    assert_matches_native(linear, normals(*leading, 5), W, *[B] * bias)


def test_gradient_against_finite_differences():
    inputs = [t.clone().requires_grad_() for t in (X, W, B)]
    assert torch.autograd.gradcheck(linear, inputs)


def test_layout_does_not_matter():
    assert_layouts_agree(lambda x: linear(x, W, B), X)


def test_adjoint():
    """<dY, X W'> = <dX, X> = <dW, W>: the gradients are the adjoints of the product."""
    y, (dx, dw) = outcome(linear, X, W)
    dy = normals(*y.shape, seed=1)
    torch.testing.assert_close((dx * X).sum(), (dy * y).sum())
    torch.testing.assert_close((dw * W).sum(), (dy * y).sum())


def test_every_term_matters():
    def swapped(which, change):
        def backward(*arguments):
            gradients = list(linear_backward(*arguments))
            gradients[which] = change(gradients[which], *arguments)
            return tuple(gradients)

        return backward

    wrong = {
        "dx turned round": swapped(0, lambda dx, *_: dx.flip(-1)),
        "dw of the first image only": swapped(1, lambda dw, dy, x, *_: dy[:1].T @ x[:1]),
        "dw a mean over images": swapped(1, lambda dw, *_: dw / 6),
        "no db": swapped(2, lambda db, *_: torch.zeros_like(db)),
        "db a mean over images": swapped(2, lambda db, *_: db / 6),
    }
    assert_wrong_gradients_are_noticed("linear", wrong, lambda: assert_matches_native(linear, X, W, B))


def test_computes_only_the_gradients_needed():
    dx, dw, db = linear_backward(normals(6, 4), X, W, (False, True, False))
    assert dx is None
    assert db is None
    assert dw.shape == W.shape


def test_frozen_weights_get_no_gradient():
    layer = Linear(5, 4, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    layer(X).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.bias.grad, torch.full((4,), 6.0, dtype=torch.float64))


def test_autocast_multiplies_in_bf16_and_returns_float32_gradients():
    x, w, b = X.float(), W.float(), B.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx, dw, db) = outcome(linear, x, w, b)
    assert (y.dtype, dx.dtype, dw.dtype, db.dtype) == (torch.bfloat16, *[torch.float32] * 3)
    torch.testing.assert_close(y.float(), x @ w.T + b, rtol=0.05, atol=0.05)  # 8-bit operands


def test_bf16_bias_gradient_is_summed_in_float32():
    dy = torch.ones(1000, 1, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    db = linear_backward(dy, dy, torch.ones(1, 1, dtype=torch.bfloat16), (False, False, True))[2]
    assert db.item() == 1000


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    assert_module_travels(Linear(5, 4, dtype=torch.float64), X)


def test_second_derivative_is_refused():
    assert_once_differentiable(lambda x: linear(x, W, B), X)


def test_has_the_parameters_of_torch():
    torch.manual_seed(0)
    ours = Linear(5, 4, bias=False).state_dict()
    torch.manual_seed(0)
    torch.testing.assert_close(ours, torch.nn.Linear(5, 4, bias=False).state_dict())


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        Linear(5, 4, backend="cuda")


@pytest.mark.parametrize(
    ("weight", "bias"), [(W[0], None), (W, B[:1]), (W, B[0]), (W[:, :3], None), (W, torch.ones(5).double())]
)
def test_shapes_that_only_broadcast_are_refused_in_one_line(weight, bias):
    with pytest.raises(UserError, match=r"must be input \(\.\.\., I\), weight \(O, I\)") as refusal:
        linear(X, weight, bias)
    assert "\n" not in str(refusal.value)
