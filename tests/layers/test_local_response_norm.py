import pytest
import torch
import torch.nn.functional as F
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
from alexnet.layers import LocalResponseNorm, local_response_norm
from alexnet.layers.local_response_norm import inverse_power, map_window_sum

# alpha / size = 0.3: the competition is as large as the gain, so that no term hides.
X = normals(2, 12, 3, 4)
SIZES = (1, 2, 3, 4, 5, 9)


def norm(size, alpha=None, beta=0.75, k=2.0, groups=1):
    """The layer as a function of its input and backend."""
    alpha = 0.3 * size if alpha is None else alpha
    return lambda x, backend="reference": local_response_norm(
        x, size, alpha, beta, k, groups=groups, backend=backend
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(2, 12, 3, 4), (2, 12, 5), (3, 12), (1, 12, 1, 1)])
def test_matches_native(size, shape):
    assert_matches_native(norm(size), normals(*shape))


@pytest.mark.parametrize("beta", [0.5, 0.75, 1.0, 0.3])
@pytest.mark.parametrize("k", [1.0, 2.0, 0.1])
def test_matches_native_with_other_constants(beta, k):
    assert_matches_native(norm(5, beta=beta, k=k), X)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", [2, 3, 12])
def test_towers_are_normalised_one_by_one(size, groups):
    def by_hand(x):
        return torch.cat(
            [F.local_response_norm(part, size, 0.3 * size, 0.75, 2.0) for part in x.chunk(groups, 1)], 1
        )

    expected = outcome(by_hand, X)
    torch.testing.assert_close(outcome(norm(size, groups=groups), X), expected)
    native = outcome(lambda x: norm(size, groups=groups)(x, backend="native"), X)
    torch.testing.assert_close(native, expected)


def test_window_wider_than_the_maps():
    assert_matches_native(norm(9), normals(2, 3, 2, 2))
    assert_matches_native(norm(9, groups=2), normals(2, 4, 2, 2))


def test_even_windows_lean_down_forward_and_up_backward():
    one_hot = torch.eye(5)[None]  # map c of column c is 1
    assert map_window_sum(one_hot, 1, 0, 1)[0, :, 2].tolist() == [
        0,
        0,
        1,
        1,
        0,
    ]  # W(3) of n = 2 holds 2 and 3
    torch.testing.assert_close(norm(2)(X)[:, 1], X[:, 1] * (2 + 0.3 * (X[:, 0] ** 2 + X[:, 1] ** 2)) ** -0.75)


@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_gradient_against_finite_differences(size, beta):
    x = normals(2, 6, 2).requires_grad_()
    assert torch.autograd.gradcheck(norm(size, beta=beta, groups=2), x)


def test_layout_does_not_matter():
    assert_layouts_agree(norm(5, groups=2), X)


def test_channels_last_stays_channels_last():
    x = X.contiguous(memory_format=torch.channels_last)
    assert norm(5, groups=2)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [4, 5])
@pytest.mark.parametrize("k", [1.0, 2.0])
def test_identity(size, k):
    """sum x dx = (1 - 2 beta) sum dy y + 2 beta k sum dy y / s."""
    y, (dx,) = outcome(norm(size, k=k, groups=2), X)
    dy_y = normals(*X.shape, seed=1) * y
    s = (X / y) ** (1 / 0.75)
    torch.testing.assert_close((X * dx).sum(), -0.5 * dy_y.sum() + 1.5 * k * (dy_y / s).sum())


@pytest.mark.parametrize("size", [4, 5])
def test_every_term_matters(size):
    def backward(gain=1.0, factor=2.0, power=1.0, reflect=True, towers=2, own_x=True, divided=True):
        def wrong(dy, x, s, size, alpha, beta, k, groups):
            t = dy * s**-beta
            window = ((size - 1) // 2, size // 2) if reflect else (size // 2, (size - 1) // 2)
            competition = map_window_sum(t * x / s**power, *window, towers)
            scale = factor * alpha * beta / (size if divided else 1)
            return gain * t - scale * (x if own_x else 1) * competition

        return wrong

    wrong = {
        "no gain": backward(gain=0.0),
        "no competition": backward(factor=0.0),
        "half the competition": backward(factor=1.0),
        "a power of s missing": backward(power=0.0),
        "the tower boundary ignored": backward(towers=1),
        "alpha not divided": backward(divided=False),
        "no x[c]": backward(own_x=False),
    }
    if size % 2 == 0:
        wrong["the window not reflected"] = backward(reflect=False)
    compare = lambda: assert_matches_native(norm(size, groups=2), X)  # noqa: E731
    assert_wrong_gradients_are_noticed("local_response_norm", wrong, compare)
    assert_wrong_gradients_are_noticed("local_response_norm", {}, compare)  # and the right one is back


def test_three_quarters_by_square_roots():
    s = torch.logspace(-6, 12, 10_000, dtype=torch.float64)
    torch.testing.assert_close(inverse_power(s, 0.75), s**-0.75, rtol=4 * torch.finfo(s.dtype).eps, atol=0)
    torch.testing.assert_close(inverse_power(s, 0.7), s**-0.7, rtol=0, atol=0)


def test_bf16_is_computed_in_float32_and_rounded_once():
    x = X.bfloat16()
    y, (dx,) = outcome(norm(5, groups=2), x)
    leaf = x.float().requires_grad_()
    y_32 = norm(5, groups=2)(leaf)
    y_32.backward(normals(*X.shape, seed=1).bfloat16().float())
    assert torch.equal(y, y_32.bfloat16())
    assert torch.equal(dx, leaf.grad.bfloat16())


def test_autocast_normalises_in_float32():
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx,) = outcome(norm(5), x)
    y_32, (dx_32,) = outcome(norm(5), x.float())
    assert dx.dtype == torch.bfloat16
    torch.testing.assert_close(y, y_32, rtol=0, atol=0)
    torch.testing.assert_close(dx, dx_32.bfloat16(), rtol=0, atol=0)


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    module = LocalResponseNorm(5, 1.5, k=2.0, groups=2)
    assert_module_travels(module, X)
    torch.testing.assert_close(module(X), norm(5, groups=2)(X))
    assert repr(module) == "LocalResponseNorm(5, alpha=1.5, beta=0.75, k=2.0, groups=2, backend=reference)"


def test_defaults_are_those_of_torch():
    x = 100 * X  # 1e-4 counts
    torch.testing.assert_close(LocalResponseNorm(5)(x), torch.nn.LocalResponseNorm(5)(x))
    torch.testing.assert_close(local_response_norm(x, 5), F.local_response_norm(x, 5))


def test_module_refuses_no_tower():
    with pytest.raises(UserError, match="groups=0 must be a positive integer"):
        LocalResponseNorm(5, groups=0)


def test_second_derivative_is_refused():
    assert_once_differentiable(norm(5), X)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"size": 0}, "size=0 must be a positive integer"),
        ({"size": 5, "alpha": -1e-4}, "alpha=-0.0001 must be a number >= 0"),
        ({"size": 5, "k": 0}, "k=0 must be a number > 0"),
    ],
)
def test_impossible_constants_are_refused(constants, message):
    with pytest.raises(UserError, match=message):
        LocalResponseNorm(**constants)
    with pytest.raises(UserError, match=message):
        local_response_norm(X, **constants)


@pytest.mark.parametrize(("shape", "groups"), [((2, 12, 3, 4), 5), ((2, 12), 0), ((12,), 1)])
def test_towers_that_cannot_share_the_maps_are_refused(shape, groups):
    with pytest.raises(UserError, match=f"groups={groups}"):
        local_response_norm(normals(*shape), 5, groups=groups)


@pytest.mark.parametrize("backend", ["reference", "compiled", "native"])
@pytest.mark.parametrize(
    ("value", "beta", "nan_in_y", "nan_in_dx"),
    [
        (float("nan"), 0.75, range(4, 9), range(2, 11)),
        (float("-inf"), 0.75, [6], range(4, 9)),
        (1e25, 0.75, [], []),
        (float("nan"), 0.0, [6], range(2, 11)),
        (float("inf"), 0.0, [], range(4, 9)),
    ],
)
def test_non_finite_values_are_where_the_docstring_says(backend, value, beta, nan_in_y, nan_in_dx):
    x = torch.ones(1, 12, 2, 1)
    x[0, 6, 0] = value
    with torch.compiler.set_stance("force_eager"):
        y, [dx] = outcome(lambda x: local_response_norm(x, 5, 0.3, beta, 2.0, backend=backend), x)
    if beta == 0 and backend == "native":
        nan_in_dx = [6]
    for result, where in ((y, nan_in_y), (dx, nan_in_dx)):
        assert result[0, :, 0, 0].isnan().nonzero().flatten().tolist() == list(where)
        assert result[0, :, 1].isfinite().all()  # the pixel beside it
    if value == float("-inf") and beta:
        assert not y[0, [4, 5, 7, 8], 0].any()
