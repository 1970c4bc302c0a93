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


@pytest.mark.parametrize("backend", ["reference", "compiled"])
@pytest.mark.parametrize("size", [1e4, 1e6, 1e8])
def test_the_size_of_the_logits_costs_no_digits(size, backend):
    """Two equal logits cost log 2 = .6931, and push apart by a half each."""
    with torch.compiler.set_stance("force_eager"):
        value, [dx] = outcome(
            lambda x: cross_entropy(x, torch.tensor([0]), reduction="sum", backend=backend),
            torch.full((1, 2), size),
        )
    torch.testing.assert_close(value, torch.tensor(2.0).log())
    assert dx.abs().allclose(dx.abs().flip(1))
    assert dx.any()


LOGITS = {"(N, K)": X, "(N, K, H, W)": normals(3, 5, 2, 4), "(K)": normals(5)}
WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "compiled", "native"])
@pytest.mark.parametrize("shape", LOGITS)
@pytest.mark.parametrize("kind", ["classes", "ignored", "probabilities"])
def test_options_of_torch(kind, shape, backend):
    """Weights, ignored images, probabilities and more dimensions, with each reduction and smoothing."""
    x = LOGITS[shape]
    where = x.select(min(1, x.dim() - 1), 0)
    target = torch.arange(where.numel()).view(where.shape) % 5
    if kind == "probabilities":
        target = normals(*x.shape, seed=2).softmax(min(1, x.dim() - 1))
    ignored = {"ignore_index": 1} if kind == "ignored" else {}
    for weight in (None, WEIGHT):
        for smoothing in (0.0, 0.1):
            for reduction in ("mean", "sum", "none"):
                options = {"label_smoothing": smoothing, "reduction": reduction, **ignored}
                expected = outcome(lambda x: F.cross_entropy(x, target, weight, **options), x)  # noqa: B023
                with torch.compiler.set_stance("force_eager"):
                    ours = outcome(
                        lambda x: cross_entropy(x, target, weight, **options, backend=backend),  # noqa: B023
                        x,
                    )
                torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("options", [{"weight": WEIGHT}, {"ignore_index": 4}, {"target": X.softmax(1)}])
def test_gradient_with_options_against_finite_differences(options):
    arguments = {"target": T, "label_smoothing": 0.1} | options
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, **arguments), X.clone().requires_grad_())


def test_a_class_without_target_weight_costs_nothing_though_it_is_impossible():
    x = X.clone()
    x[:, 2] = -float("inf")
    value, [dx] = outcome(lambda x: cross_entropy(x, T % 2, WEIGHT), x)
    assert value.isfinite()
    assert dx.isfinite().all()


def test_a_mean_over_no_image_is_nan_as_in_torch():
    assert cross_entropy(X, torch.full((6,), 2), ignore_index=2).isnan()


def test_the_module_has_torchs_buffer():
    module = CrossEntropyLoss(WEIGHT, ignore_index=1)
    torch.testing.assert_close(module(X, T), F.cross_entropy(X, T, WEIGHT, ignore_index=1))
    assert list(module.state_dict()) == list(torch.nn.CrossEntropyLoss(WEIGHT).state_dict()) == ["weight"]


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
        def wrong(dloss, x, top, log_sum, target, label_smoothing, reduction):
            q = (
                F.one_hot(target, x.shape[1]) * (1 - label_smoothing) * hit
                + spread * label_smoothing / x.shape[1]
            )
            dx = softmax * (x - top - log_sum).exp() - q
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
        ({"label_smoothing": 1.1}, "label_smoothing=1.1 must be in .0, 1."),
        ({"reduction": "median"}, "reduction='median' must be one of mean, sum, none"),
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
    ("x", "target", "options", "message"),
    [
        (X, T[:5], {}, r"must be logits \(N, K\) with classes \(N\)"),
        (X, X[:, :4], {}, "must be logits"),
        (X, T > 0, {}, "must be logits"),
        (X[..., None], T, {}, "must be logits"),
        (X, T, {"weight": WEIGHT[:4]}, r"weight \(4,\) must be \(5,\), one per class"),
        (X, X, {"ignore_index": 1}, "ignore_index=1 must be None"),
        (X, X.clone().requires_grad_(), {}, r"must not require a gradient: use \.detach"),
    ],
)
def test_other_shapes_are_refused_in_one_line(x, target, options, message):
    with pytest.raises(UserError, match=message) as refusal:
        cross_entropy(x, target, **options)
    assert "\n" not in str(refusal.value)
