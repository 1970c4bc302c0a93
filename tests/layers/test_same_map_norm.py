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
from alexnet.layers import SameMapNorm, same_map_norm
from alexnet.layers.local_response_norm import window_sum
from alexnet.layers.same_map_norm import square_sum

X = normals(2, 3, 7, 6)


def norm(size, beta=0.75, k=1.0):
    """The layer as a function of its input and backend; alpha / size^2 = 0.1."""
    return lambda x, backend="reference": same_map_norm(x, size, 0.1 * size**2, beta, k, backend=backend)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
@pytest.mark.parametrize("shape", [(2, 3, 7, 6), (1, 1, 1, 5), (2, 2, 4, 1), (1, 4, 2, 2)])
def test_matches_native(size, shape):
    assert_matches_native(norm(size), normals(*shape))


@pytest.mark.parametrize(("beta", "k"), [(0.5, 1.0), (0.6, 2.0), (0.75, 0.3)])
def test_matches_native_with_other_constants(beta, k):
    assert_matches_native(norm(5, beta, k), X)


def test_forward_pixel_by_pixel():
    """The formula as written: a clipped square, divided by all of its n^2."""
    y = norm(5)(X)
    for i in range(X.shape[2]):
        for j in range(X.shape[3]):
            square = X[:, :, max(i - 2, 0) : i + 3, max(j - 2, 0) : j + 3]
            s = 1 + 0.1 * (square**2).sum((2, 3))
            torch.testing.assert_close(y[:, :, i, j], X[:, :, i, j] * s**-0.75)


def test_gradient_against_finite_differences():
    assert torch.autograd.gradcheck(norm(3, beta=0.6), normals(1, 2, 4, 3).requires_grad_())


def test_layout_does_not_matter():
    assert_layouts_agree(norm(5), X)


def test_identity():
    """sum x dx = (1 - 2 beta) sum dy y + 2 beta k sum dy y / s."""
    y, (dx,) = outcome(norm(5, k=2.0), X)
    dy_y = normals(*X.shape, seed=1) * y
    s = (X / y) ** (1 / 0.75)
    torch.testing.assert_close((X * dx).sum(), -0.5 * dy_y.sum() + 3.0 * (dy_y / s).sum())


def test_every_term_matters():
    def backward(gain=1.0, factor=2.0, power=1.0, area=25, window=square_sum, own_x=True):
        def wrong(dy, x, s, size, alpha, beta, k):
            t = dy * s**-beta
            competition = window(t * x / s**power, size)
            return gain * t - factor * alpha * beta / area * (x if own_x else 1) * competition

        return wrong

    wrong = {
        "no gain": backward(gain=0.0),
        "no competition": backward(factor=0.0),
        "half the competition": backward(factor=1.0),
        "a power of s missing": backward(power=0.0),
        "alpha divided by n only": backward(area=5),
        "only the row of the window": backward(window=lambda x, size: window_sum(x, -1, 2, 2)),
        "a window across maps": backward(window=lambda x, size: window_sum(x, 1, 2, 2)),
        "no x[p]": backward(own_x=False),
    }
    assert_wrong_gradients_are_noticed("same_map_norm", wrong, lambda: assert_matches_native(norm(5), X))


def test_bf16_is_computed_in_float32_and_rounded_once():
    x = X.bfloat16()
    y, (dx,) = outcome(norm(5), x)
    leaf = x.float().requires_grad_()
    y_32 = norm(5)(leaf)
    y_32.backward(normals(*X.shape, seed=1).bfloat16().float())
    assert torch.equal(y, y_32.bfloat16())
    assert torch.equal(dx, leaf.grad.bfloat16())


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_autocast_normalises_in_float32(backend):
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx,) = outcome(lambda x: norm(5)(x, backend=backend), x)
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y, norm(5)(x.float()))


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    module = SameMapNorm(5, 2.5)
    assert_module_travels(module, X)
    torch.testing.assert_close(module(X), norm(5)(X))
    assert repr(module) == "SameMapNorm(5, alpha=2.5, beta=0.75, k=1.0, backend=reference)"


def test_second_derivative_is_refused():
    assert_once_differentiable(norm(5), X)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"size": 4}, "size=4 must be odd, for the square to have a centre: try size=5"),
        ({"size": -1}, "size=-1 must be a positive integer"),
        ({"size": 5, "alpha": -1.0}, "alpha=-1.0"),
        ({"size": 5, "k": -1.0}, "k=-1.0"),
    ],
)
def test_impossible_constants_are_refused(constants, message):
    with pytest.raises(UserError, match=message):
        SameMapNorm(**constants)
    with pytest.raises(UserError, match=message):
        same_map_norm(X, **constants)


def test_an_input_without_maps_is_refused():
    with pytest.raises(UserError, match=r"must be \(N, C, H, W\)"):
        same_map_norm(X[0], 5)
