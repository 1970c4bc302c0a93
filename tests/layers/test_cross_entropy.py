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
from alexnet.layers import CrossEntropyLoss, cross_entropy

X = 3 * normals(6, 5)
T = torch.tensor([0, 4, 2, 2, 1, 3])


def loss(label_smoothing=0.0, reduction="mean", target=T):
    return lambda x, backend="reference": cross_entropy(
        x, target, label_smoothing=label_smoothing, reduction=reduction, backend=backend
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_native(label_smoothing, reduction):
    assert_matches_native(loss(label_smoothing, reduction), X)


@pytest.mark.parametrize("shape", [(1, 5), (6, 1), (6, 1000)])
def test_matches_native_at_the_edges(shape):
    target = torch.arange(shape[0]) % shape[1]
    assert_matches_native(loss(0.1, target=target), normals(*shape))


def test_is_torchs_cross_entropy():
    for reduction in ("mean", "sum", "none"):
        expected = outcome(lambda x: F.cross_entropy(x, T, reduction=reduction, label_smoothing=0.1), X)  # noqa: B023
        torch.testing.assert_close(outcome(loss(0.1, reduction), X), expected)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_logits_neither_overflow_nor_vanish(shift, dtype):
    x = (200 * X).to(dtype)  # exp(88) overflows float32
    x = x + torch.tensor(shift, dtype=dtype)
    assert_matches_native(loss(), x)


def test_an_impossible_class_costs_nothing_elsewhere():
    x = X.clone()
    x[:, 3] = -float("inf")
    assert_matches_native(loss(target=T % 3), x)


def test_gradient_against_finite_differences():
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(loss(0.1, reduction), X.clone().requires_grad_())


def test_layout_does_not_matter():
    assert_layouts_agree(loss(0.1), X)
    assert_layouts_agree(loss(0.1, "none"), X)


def test_rows_of_the_gradient_sum_to_zero():
    _, (dx,) = outcome(loss(0.1, "none"), X)
    torch.testing.assert_close(dx.sum(1), torch.zeros(6, dtype=dx.dtype))


def test_every_term_matters():
    def backward(softmax=1.0, hit=1.0, spread=1.0, mean=True, arriving=True):
        def wrong(dloss, x, lse, target, label_smoothing, reduction):
            q = (
                F.one_hot(target, x.shape[1]) * (1 - label_smoothing) * hit
                + spread * label_smoothing / x.shape[1]
            )
            dx = softmax * (x - lse).exp() - q
            return (dloss if arriving else 1) * dx / (len(x) if mean else 1)

        return wrong

    wrong = {
        "no softmax": backward(softmax=0.0),
        "no target": backward(hit=0.0),
        "no smoothing": backward(spread=0.0),
        "no mean": backward(mean=False),
        "dL left out": backward(arriving=False),
        "the sign turned": backward(softmax=-1.0, hit=-1.0, spread=-1.0),
    }
    compare = lambda: assert_matches_native(loss(0.1), X)  # noqa: E731
    assert_wrong_gradients_are_noticed("cross_entropy", wrong, compare)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_bf16_logits_give_a_float32_loss(backend):
    x = X.bfloat16()
    y, (dx,) = outcome(lambda x: loss(0.1)(x, backend=backend), x)
    y_32, (dx_32,) = outcome(loss(0.1), x.float())
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y, y_32)
    torch.testing.assert_close(dx, dx_32.bfloat16())


def test_autocast_takes_the_loss_in_float32():
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y, (dx,) = outcome(loss(), x)
    assert (y.dtype, dx.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(y, loss()(x.float()), rtol=0, atol=0)


def test_targets_may_be_any_integers():
    torch.testing.assert_close(loss(target=T.to(torch.uint8))(X), loss()(X))


@COMPILES
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_module_copies_pickles_compiles_and_prints(reduction):
    module = CrossEntropyLoss(label_smoothing=0.1, reduction=reduction)
    assert_module_travels(module, X, T)
    torch.testing.assert_close(module(X, T), loss(0.1, reduction)(X))
    assert repr(module) == f"CrossEntropyLoss(label_smoothing=0.1, reduction={reduction}, backend=reference)"


def test_second_derivative_is_refused():
    assert_once_differentiable(loss(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.1}, "label_smoothing=1.1 is no share"),
        ({"reduction": "median"}, "reduction='median' is unknown"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CrossEntropyLoss(**options)
    with pytest.raises(UserError, match=message):
        cross_entropy(X, T, **options)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_no_class_is_left_out_in_silence(backend):
    """-100 is torch's word for an image to skip; here it is a class that does not exist."""
    target = T.clone()
    target[1] = -100
    with pytest.raises((IndexError, RuntimeError)):
        cross_entropy(X, target, backend=backend)


@pytest.mark.parametrize(
    ("x", "target"), [(X, T[:5]), (X, X), (X, T > 0), (X[0], T[0]), (X[..., None], T[:, None])]
)
def test_other_shapes_and_class_probabilities_are_refused(x, target):
    with pytest.raises(UserError, match=r"Give logits \(N, K\) and class indices \(N\)"):
        cross_entropy(x, target)
