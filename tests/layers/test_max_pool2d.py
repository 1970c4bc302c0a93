import numpy as np
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
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet.errors import UserError
from alexnet.layers import MaxPool2d, max_pool2d
from alexnet.layers.max_pool2d import max_pool2d_backward, max_pool2d_forward, output_size

X = normals(2, 3, 7, 9)  # no ties
TIED = X.round()  # plenty
RULES = pytest.mark.parametrize("ties", ["first", "all"])
EXACT = {"rtol": 1e-10, "atol": 1e-10}

# input (N, C, H, W), kernel, stride, padding, ceil_mode
CASES = {
    "pool1: 55 -> 27": ((1, 2, 55, 55), 3, 2, 0, True),
    "pool2: 27 -> 13": ((1, 2, 27, 27), 3, 2, 0, True),
    "pool5: 13 -> 6": ((2, 3, 13, 13), 3, 2, 0, False),
    "without overlap": ((2, 3, 8, 8), 2, 2, 0, False),
    "last windows cut at the border": ((2, 3, 8, 10), 3, 2, 0, True),
    "last windows of one pixel": ((2, 3, 7, 7), 3, 3, 0, True),
    "rows left over": ((2, 3, 8, 8), 3, 2, 0, False),
    "stride larger than kernel": ((2, 3, 11, 9), 2, 4, 0, True),
    "a window that would start beyond the image": ((2, 3, 5, 5), 1, 3, 0, True),
    "a window that would start in the right padding": ((2, 3, 6, 6), 2, 2, 1, True),
    "kernel larger than the image": ((2, 3, 2, 2), 3, 2, 0, True),
    "padding": ((2, 3, 7, 6), 3, 2, 1, False),
    "padding and rounding up": ((2, 3, 6, 7), 4, 3, 2, True),
    "rows unlike columns": ((2, 3, 7, 9), (2, 5), (3, 1), (1, 2), True),
    "windows of one pixel": ((2, 3, 4, 4), 1, 1, 0, False),
    "the largest window": ((1, 1, 12, 13), 11, 1, 5, False),
    "one image of one pixel": ((1, 1, 1, 1), 3, 2, 1, False),
    "no batch": ((3, 7, 7), 3, 2, 0, True),
}


def pool(*geometry, ties="first"):
    kernel, stride, padding, ceil_mode = geometry
    return lambda x, backend="reference": max_pool2d(
        x, kernel, stride, padding, ceil_mode=ceil_mode, ties=ties, backend=backend
    )


@RULES
@pytest.mark.parametrize("values", ["ties", "all negative", "constant"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_native(case, values, ties):
    shape, *geometry = case
    x = normals(*shape)
    x = {"ties": x.round(), "all negative": -5 - x.abs(), "constant": torch.ones_like(x)}[values]
    assert_matches_native(pool(*geometry, ties=ties), x, **EXACT)


@RULES
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_matches_native_in_any_shape(ties, data):
    kernel, stride, size = (
        data.draw(st.tuples(*[st.integers(low, high)] * 2)) for low, high in ((1, 4), (1, 4), (4, 9))
    )
    padding = tuple(data.draw(st.integers(0, side // 2)) for side in kernel)
    x = normals(data.draw(st.integers(1, 2)), 2, *size).round()
    assert_matches_native(pool(kernel, stride, padding, data.draw(st.booleans()), ties=ties), x, **EXACT)


@pytest.mark.parametrize("ceil_mode", [True, False])
def test_is_torchs_pooling(ceil_mode):
    expected = outcome(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=ceil_mode), TIED)
    torch.testing.assert_close(outcome(pool(3, 2, 1, ceil_mode), TIED), expected, **EXACT)
    torch.testing.assert_close(max_pool2d(X, 3), F.max_pool2d(X, 3))  # stride defaults to the window


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kernel=st.integers(1, 5),
    size=st.integers(1, 12),
    stride=st.integers(1, 7),
    ceil=st.booleans(),
    data=st.data(),
)
def test_output_size_is_torchs(kernel, size, stride, ceil, data):
    padding = data.draw(st.integers(0, kernel // 2))
    try:
        expected = F.max_pool2d(torch.zeros(1, 1, size, size), kernel, stride, padding, 1, ceil).shape[-2:]
    except RuntimeError:  # no window fits
        with pytest.raises(UserError, match="holds no window"):
            max_pool2d(torch.zeros(1, 1, size, size), kernel, stride, padding, ceil_mode=ceil)
    else:
        assert output_size((size,) * 2, (kernel,) * 2, (stride,) * 2, (padding,) * 2, ceil) == expected


def test_pyramid_of_2012():
    sizes = [output_size((side,) * 2, (3, 3), (2, 2), (0, 0), True)[0] for side in (55, 27, 13)]
    assert sizes == [27, 13, 6]


@RULES
def test_gradient_against_finite_differences(ties):
    assert torch.autograd.gradcheck(pool(3, 2, 1, True, ties=ties), X.clone().requires_grad_())


@RULES
def test_layout_does_not_matter(ties):
    assert_layouts_agree(pool(3, 2, 1, True, ties=ties), TIED)


@RULES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_lie_in_memory_as_the_input(layout, ties):
    x = X.clone(memory_format=layout).requires_grad_()
    y = pool(3, 2, 0, False, ties=ties)(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)


@RULES
def test_euler(ties):
    """Pooling is homogeneous of degree one, so <dx, x> = <dy, y> away from ties."""
    y, (dx,) = outcome(pool(3, 2, 0, True, ties=ties), X)
    torch.testing.assert_close((dx * X).sum(), (normals(*y.shape, seed=1) * y).sum())


@pytest.mark.parametrize(("ties", "paid"), [("first", 1), ("all", 9)])
def test_a_constant_image_pays_one_winner_or_all_nine(ties, paid):
    y, (dx,) = outcome(pool(3, 2, 0, False, ties=ties), torch.full((1, 2, 9, 9), 0.3, dtype=torch.float64))
    torch.testing.assert_close(dx.sum(), paid * normals(*y.shape, seed=1).sum())


def test_first_is_first_in_row_major_order():
    x = torch.tensor([[[0.0, 1, 2], [2, 0, 1], [0, 2, 0]]])
    _, (dx,) = outcome(pool(3, 1, 0, False), x)
    assert dx.nonzero().tolist() == [[0, 0, 2]]
    _, (dx,) = outcome(pool(3, 1, 0, False, ties="all"), x)
    assert dx.nonzero().tolist() == [[0, 0, 2], [0, 1, 0], [0, 2, 1]]


def test_a_nan_shows_and_the_gradient_goes_where_torch_sends_it():
    x = X.clone()
    x[:, :, ::3, ::2] = float("nan")
    ours, native = (
        outcome(lambda x, b=b: max_pool2d(x, 3, 2, backend=b), x) for b in ("reference", "native")
    )
    assert ours[0].isnan().any()
    torch.testing.assert_close(ours, native, equal_nan=True, **EXACT)
    y, (dx,) = outcome(pool(3, 2, 0, False, ties="all"), x)
    torch.testing.assert_close(y, native[0], equal_nan=True)
    assert not dx[x.isnan()].any()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_a_window_whose_maximum_is_infinite_has_the_value_of_native(value):
    x = X.clone()
    x[0, 0] = value
    ours, native = (max_pool2d(x, 3, 2, ties="all", backend=backend) for backend in ("reference", "native"))
    torch.testing.assert_close(ours, native)
    assert not native.isnan().any()


def test_minus_infinity_everywhere_pays_a_pixel_and_never_the_padding():
    x = torch.full((1, 1, 5, 6), -float("inf"), dtype=torch.float64)
    assert_matches_native(pool(3, 2, 1, True), x, **EXACT)


def test_keeps_one_byte_per_output_or_what_exists_anyway():
    y, place, *none = max_pool2d_forward(X, (3, 3), (2, 2), (0, 0), True, "first")
    assert (place.dtype, place.shape, none) == (torch.int8, y.shape, [None, None])
    y, place, *kept = max_pool2d_forward(X, (3, 3), (2, 2), (0, 0), True, "all")
    assert place is None
    assert [tensor.data_ptr() for tensor in kept] == [X.data_ptr(), y.data_ptr()]


def wrong_backward(add=True, place=lambda k: k, u=None, shift=(0, 0), once=False):
    """The gradient of pooling, written over with one mistake; `once` pays one of several winners."""

    def backward(dy, saved, x, y, size, kernel, stride, padding, ceil_mode, ties):
        (H, W), (P, Q), (R, S) = size, dy.shape[-2:], kernel
        step = u or stride
        dx = dy.new_zeros(*dy.shape[:-2], H + 3 * R, W + 3 * S)  # room for every mistake
        unpaid = torch.ones_like(dy, dtype=torch.bool)
        padded = None if x is None else F.pad(x, (padding[1], 2 * S, padding[0], 2 * R), value=-float("inf"))
        for k in range(R * S):
            r, s = divmod(k, S)
            at = ..., slice(r, r + step[0] * P, step[0]), slice(s, s + step[1] * Q, step[1])
            won = saved == place(k) if padded is None else padded[at] == y
            paid = dy * (won & unpaid)
            dx[at] = dx[at] + paid if add else paid
            unpaid = unpaid & ~won if once else unpaid
        top, left = padding[0] + shift[0], padding[1] + shift[1]
        return dx[..., top : top + H, left : left + W]

    return backward


def test_every_term_matters():
    wrong = {
        "= for += where windows overlap": wrong_backward(add=False),
        "gradient to the last pixel instead of the winner": wrong_backward(place=lambda k: 8 - k),
        "places counted by columns": wrong_backward(place=lambda k: k % 3 * 3 + k // 3),
        "stride forgotten": wrong_backward(u=(1, 1)),
        "padding cut off one row too early": wrong_backward(shift=(-1, 0)),
        "padding not cut off": wrong_backward(shift=(-1, -1)),
        "the gradient shared instead of paid": lambda dy, *rest: max_pool2d_backward(dy / 9, *rest),
    }
    assert_wrong_gradients_are_noticed(
        "max_pool2d", wrong, lambda: assert_matches_native(pool(3, 2, 1, True), TIED)
    )
    tied = {name: wrong[name] for name in wrong if "place" not in name and "last" not in name}
    tied["one winner paid instead of all"] = wrong_backward(once=True)
    assert_wrong_gradients_are_noticed(
        "max_pool2d", tied, lambda: assert_matches_native(pool(3, 2, 1, True, ties="all"), TIED)
    )


@RULES
def test_the_function_that_carries_the_mistakes_is_right_without_them(ties):
    y, *saved = max_pool2d_forward(TIED, (3, 3), (2, 2), (1, 1), True, ties)
    arguments = normals(*y.shape, seed=1), *saved, TIED.shape[-2:], (3, 3), (2, 2), (1, 1), True, ties
    torch.testing.assert_close(wrong_backward()(*arguments), max_pool2d_backward(*arguments))


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_type_and_rounds_once(dtype, ties):
    x, dy = X.to(dtype), normals(2, 3, 4, 5, seed=1).to(dtype)
    geometry = (3, 3), (2, 2), (1, 1), False, ties
    y, *saved = max_pool2d_forward(x, *geometry)
    dx = max_pool2d_backward(dy, *saved, x.shape[-2:], *geometry)
    _, *exactly = max_pool2d_forward(x.double(), *geometry)
    expected = max_pool2d_backward(dy.double(), *exactly, x.shape[-2:], *geometry)
    assert y.dtype == dx.dtype == dtype
    assert torch.equal(dx, expected.float().to(dtype)) or dtype == torch.float32
    torch.testing.assert_close(dx.double(), expected, rtol=2**-8, atol=1e-6)


def test_autocast_leaves_the_type_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert max_pool2d(X.float(), 3).dtype == torch.float32
        assert max_pool2d(X.bfloat16(), 3).dtype == torch.bfloat16


@COMPILES
@RULES
def test_module_copies_pickles_compiles_and_prints(ties):
    assert_module_travels(MaxPool2d(3, 2, 1, ceil_mode=True, ties=ties), TIED)


def test_prints_as_torch_does():
    ours, torchs = (
        repr(MaxPool2d(3, 2, ceil_mode=True, ties="all")),
        repr(torch.nn.MaxPool2d(3, 2, ceil_mode=True)),
    )
    assert ours == torchs[:-1] + ", ties=all, backend=reference)"


@RULES
def test_second_derivative_is_refused(ties):
    assert_once_differentiable(pool(3, 2, 0, True, ties=ties), X)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dilation": 2}, r"dilation=\(2, 2\) must be 1"),
        ({"ties": "last"}, "ties='last' must be one of first, all"),
        ({"kernel_size": 12}, "at most 128 places"),
        ({"stride": 0}, "must be at least 1"),
        ({"padding": 2}, "from 0 to half of kernel_size"),
        ({"kernel_size": 10}, "holds no window of 10x10"),
        ({"input": X[0, 0]}, r"give \(N, C, H, W\)"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as refusal:
        max_pool2d(**{"input": X, "kernel_size": 3} | arguments)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "arguments", [{"return_indices": True}, {"ties": "last"}, {"dilation": 2}, {"padding": 2}]
)
def test_module_refuses_what_it_has_not(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        MaxPool2d(3, **arguments)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("backend", ["reference", "compiled", "native"])
@RULES
@pytest.mark.parametrize(
    ("window", "maximum", "winners"),
    [
        ([1, NAN, 3, 2], NAN, {"first": [1], "all": []}),
        ([NAN, 3, NAN, 2], NAN, {"first": [2], "all": []}),
        ([INF, 3, INF, 2], INF, {"first": [0], "all": [0, 2]}),
        ([-INF] * 4, -INF, {"first": [0], "all": [0, 1, 2, 3]}),
    ],
)
def test_non_finite_values_are_where_the_docstring_says(backend, ties, window, maximum, winners):
    x = torch.tensor(window).view(1, 1, 2, 2)
    with torch.compiler.set_stance("force_eager"):
        y, [dx] = outcome(lambda x: max_pool2d(x, 2, ties=ties, backend=backend), x)
    torch.testing.assert_close(y.item(), maximum, equal_nan=True)
    expected = winners[ties]
    if backend == "compiled" and window[0] != window[0] and ties == "first":
        expected = [0]  # the first of two NaNs
    if backend == "native" and ties == "all":
        expected = []
    assert dx.flatten().nonzero().flatten().tolist() == expected


def test_attributes_that_are_set_later_count():
    module = MaxPool2d(3)
    module.return_indices = True
    with pytest.raises(UserError, match="return_indices"):
        module(X)
    module = MaxPool2d(3)
    module.dilation = 2
    with pytest.raises(UserError, match="dilation"):
        module(X)


@pytest.mark.parametrize("size", [np.int64(3), torch.tensor(3), (3,), [3, 3]])
def test_sizes_in_every_spelling_of_torch(size):
    torch.testing.assert_close(max_pool2d(X, size, 2), max_pool2d(X, 3, 2))


@pytest.mark.parametrize("size", [(3, 3, 3), (), True, 3.0, "3", None])
def test_other_sizes_are_refused_in_one_line(size):
    with pytest.raises(UserError, match=r"kernel_size=.* must be an integer or a tuple of 1 or 2 integers"):
        max_pool2d(X, size)


def test_a_stride_beyond_the_image_is_one_window():
    torch.testing.assert_close(max_pool2d(X, 3, 2**40), max_pool2d(X, 3, 100))
