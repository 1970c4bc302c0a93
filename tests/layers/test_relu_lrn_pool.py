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
from alexnet.layers import ReluLrnPool, local_response_norm, max_pool2d, relu, relu_lrn_pool
from alexnet.layers.local_response_norm import local_response_norm_backward
from alexnet.layers.max_pool2d import max_pool2d_backward
from alexnet.layers.relu import relu_backward
from alexnet.layers.relu_lrn_pool import relu_lrn_pool_backward

X = 2 * normals(2, 8, 9, 8)
NORM = 5, 0.3, 0.75, 2.0  # alpha large enough that the second term matters
ORDERS = pytest.mark.parametrize("order", ["relu_lrn_pool", "lrn_pool_relu"])
RULES = pytest.mark.parametrize("ties", ["first", "all"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def block(order, **choices):
    return lambda x, backend="reference": relu_lrn_pool(x, *NORM, order=order, backend=backend, **choices)


@ORDERS
@RULES
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_matches_native(order, ties, groups, ceil_mode):
    choices = {"ties": ties, "groups": groups, "ceil_mode": ceil_mode}
    assert_matches_native(block(order, **choices), X, **EXACT)
    assert_matches_native(block(order, **choices), X.round(), **EXACT)  # ties


@ORDERS
@pytest.mark.parametrize("shape", [(1, 6, 27, 27), (1, 2, 2, 2), (2, 10, 4, 7)])
def test_matches_native_at_the_edges(order, shape):
    assert_matches_native(block(order, groups=2), normals(*shape), **EXACT)


@ORDERS
def test_other_constants(order):
    for norm in ((4, 0.3, 0.5, 1.0), (3, 0.2, 1.2, 0.5)):
        assert_matches_native(
            lambda x, backend, norm=norm: relu_lrn_pool(
                x, *norm, (3, 2), (1, 2), order=order, backend=backend
            ),
            X,
            **EXACT,
        )


def test_is_the_three_layers_of_torch_in_the_papers_order():
    torchs = torch.nn.Sequential(
        torch.nn.ReLU(), torch.nn.LocalResponseNorm(*NORM), torch.nn.MaxPool2d(3, 2, ceil_mode=True)
    )
    torch.testing.assert_close(outcome(block("relu_lrn_pool"), X), outcome(torchs, X), **EXACT)


@ORDERS
@RULES
def test_is_the_composition_of_our_three_layers(order, ties):
    def composed(x):
        a = relu(x) if order == "relu_lrn_pool" else x
        m = max_pool2d(local_response_norm(a, *NORM, groups=2), 3, 2, ceil_mode=True, ties=ties)
        return m if order == "relu_lrn_pool" else relu(m)

    y, (dx,) = outcome(block(order, groups=2, ties=ties), X)
    expected, (dx_expected,) = outcome(composed, X)
    assert torch.equal(y, expected)
    assert torch.equal(dx, dx_expected)


def test_relu_commutes_with_the_pool_and_not_with_the_norm():
    pooled_last, pooled_first = F.max_pool2d(F.relu(X), 3, 2), F.relu(F.max_pool2d(X, 3, 2))
    assert torch.equal(pooled_last, pooled_first)
    paper, code = (block(order)(X) for order in ("relu_lrn_pool", "lrn_pool_relu"))
    assert (paper >= code).all()  # the denominator of 2012 also counts the negative responses
    assert (paper > code).any()


def test_a_closed_unit_gets_a_gradient_in_the_order_of_2012_only():
    closed = X < 0
    _, (paper,) = outcome(block("relu_lrn_pool"), X)
    _, (code,) = outcome(block("lrn_pool_relu"), X)
    assert not paper[closed].any()
    assert code[closed].any()


@ORDERS
@RULES
def test_gradient_against_finite_differences(order, ties):
    x = X[:1, :4, :5, :5].clone().requires_grad_()
    assert torch.autograd.gradcheck(block(order, groups=2, ties=ties), x)


@ORDERS
def test_layout_does_not_matter(order):
    assert_layouts_agree(block(order), X)


def wrong_backward(relu=relu_backward, norm=local_response_norm_backward, pool=max_pool2d_backward):
    """The composition with one part replaced."""

    def backward(dy, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            for part, function in (("relu", relu), ("local_response_norm", norm), ("max_pool2d", pool)):
                patch.setitem(relu_lrn_pool_backward.__globals__, f"{part}_backward", function)
            return relu_lrn_pool_backward(dy, *arguments)

    return backward


def other_order(dy, *arguments):
    order = {"relu_lrn_pool": "lrn_pool_relu", "lrn_pool_relu": "relu_lrn_pool"}[arguments[-1]]
    return relu_lrn_pool_backward(dy, *arguments[:-1], order)


@ORDERS
def test_every_term_matters(order):
    def first_term_only(dy, x, s, size, alpha, beta, k, groups):
        return dy * s**-beta

    def second_term_only(dy, x, s, *constants):
        return local_response_norm_backward(dy, x, s, *constants) - first_term_only(dy, x, s, *constants)

    wrong = {
        "no second term": wrong_backward(norm=first_term_only),
        "no first term": wrong_backward(norm=second_term_only),
        "alpha not divided by n": wrong_backward(
            norm=lambda dy, x, s, n, alpha, *c: local_response_norm_backward(dy, x, s, n, n * alpha, *c)
        ),
        "windows across the towers": wrong_backward(norm=lambda *a: local_response_norm_backward(*a[:-1], 1)),
        "no ReLU": wrong_backward(relu=lambda dy, y: dy),
        "the gradient shared among winners": wrong_backward(
            pool=lambda dy, *a: max_pool2d_backward(dy / 9, *a)
        ),
    }
    assert_wrong_gradients_are_noticed(
        "relu_lrn_pool", wrong, lambda: assert_matches_native(block(order, groups=2), X)
    )


@ORDERS
def test_autocast_computes_in_float32(order):
    x = X.bfloat16()
    expected = outcome(block(order), x.float())
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx,) = outcome(block(order), x)
        assert torch.equal(y, expected[0])
        assert dx.dtype == torch.bfloat16
        y, (dx,) = outcome(block(order), x.float())
    assert torch.equal(y, expected[0])
    assert torch.equal(dx, expected[1][0])


@ORDERS
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_error_of_narrow_types_is_a_few_roundings(order, dtype, epsilon):
    x = X.to(dtype)
    y, (dx,) = outcome(block(order), x)
    assert y.dtype == dx.dtype == dtype
    exact = block(order)(x.double())
    assert (y.double() - exact).abs().max() < 8 * epsilon * exact.abs().max()


@COMPILES
@ORDERS
def test_module_copies_pickles_compiles_and_prints(order):
    module = ReluLrnPool(*NORM, order=order, groups=2, ties="all")
    assert_module_travels(module, X)
    assert f"order={order}, size=5, alpha=0.3, beta=0.75, k=2.0, groups=2" in repr(module)


@ORDERS
def test_second_derivative_is_refused(order):
    assert_once_differentiable(block(order), X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": "pool_lrn_relu"}, "order='pool_lrn_relu' must be one of relu_lrn_pool"),
        ({"groups": 3}, "a multiple of groups=3"),
        ({"size": 0}, "size=0"),
        ({"ties": "last"}, "ties='last'"),
        ({"kernel_size": 12}, "at most 128 places"),
        ({"input": X[0]}, r"must be \(N, C, H, W\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as refusal:
        relu_lrn_pool(**{"input": X, "size": 5} | arguments)
    assert "\n" not in str(refusal.value)


def test_module_refuses_an_unknown_order():
    with pytest.raises(UserError, match="order='lrn'"):
        ReluLrnPool(5, order="lrn")
