from importlib import import_module

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
    gapped,
    normals,
    outcome,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet.errors import UserError
from alexnet.layers import Conv2d, conv2d
from alexnet.layers.conv2d import (
    COLUMN_BYTES,
    conv2d_backward,
    conv2d_forward,
    fold,
    images_at_once,
    output_size,
    unfold,
)

MODULE = import_module("alexnet.layers.conv2d")  # the package's own `conv2d` is the function
FAST = import_module("alexnet.layers.compiled.conv2d")

# Every part differs from every other: 2 towers of 2 and 3 channels, a 2x3 kernel, 4 paddings, 2 strides.
X, W, B = normals(3, 4, 7, 8), normals(6, 2, 2, 3, seed=2), normals(6, seed=3)
GEOMETRY = {"stride": (3, 2), "padding": (0, 2, 1, 3), "groups": 2}
EXACT = {"rtol": 1e-10, "atol": 1e-10}

# input (N, C, H, W), weight (O, C/G, R, S), stride, padding, groups
ALEXNET = {  # the paper's layers with fewer and smaller maps
    "conv1, zeros on the right and bottom": ((2, 3, 32, 32), (4, 3, 11, 11), 4, (0, 3, 0, 3), 1),
    "conv1 of torchvision": ((2, 3, 32, 32), (4, 3, 11, 11), 4, 2, 1),
    "conv1 of 56 pixels": ((2, 3, 14, 14), (4, 3, 7, 7), 2, (1, 2, 1, 2), 1),
    "conv2, towers": ((2, 4, 9, 9), (6, 2, 5, 5), 1, 2, 2),
    "conv3": ((2, 6, 6, 6), (4, 6, 3, 3), 1, 1, 1),
    "conv4, towers": ((2, 4, 6, 6), (4, 2, 3, 3), 1, 1, 2),
}
AWKWARD = {
    "one image": ((1, 2, 5, 5), (2, 2, 3, 3), 1, 1, 1),
    "one window": ((2, 2, 3, 4), (2, 2, 3, 4), 1, 0, 1),
    "one pixel": ((2, 2, 1, 1), (2, 2, 3, 3), 1, 1, 1),
    "kernel of one pixel": ((2, 3, 4, 5), (2, 3, 1, 1), 1, 0, 1),
    "stride larger than kernel": ((2, 2, 11, 10), (2, 2, 2, 3), (5, 4), 0, 1),
    "pixels that no window reads": ((2, 2, 10, 9), (2, 2, 3, 3), 4, 0, 1),
    "windows wholly in the padding": ((2, 2, 3, 3), (2, 2, 2, 2), 1, 4, 1),
    "padding on one side": ((2, 2, 5, 4), (2, 2, 3, 3), (2, 1), (2, 0, 0, 1), 1),
    "a group for every channel": ((2, 3, 5, 5), (6, 1, 3, 3), 1, 1, 3),
}


@pytest.mark.parametrize("case", [*ALEXNET.values(), *AWKWARD.values()], ids=[*ALEXNET, *AWKWARD])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_native(case, bias):
    x, w, *geometry = case
    assert_matches_native(
        lambda *inputs, backend: conv2d(
            inputs[0], inputs[1], inputs[2] if bias else None, *geometry[:2], 1, geometry[2], backend=backend
        ),
        *(normals(*x), normals(*w, seed=2), *[normals(w[0], seed=3)] * bias),
        **EXACT,
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_matches_native_in_any_shape(data):
    few, side = st.integers(1, 3), st.integers(1, 4)
    groups, stride, kernel = data.draw(few), data.draw(st.tuples(few, few)), data.draw(st.tuples(side, side))
    padding = data.draw(st.tuples(*[st.integers(0, 3)] * 4))
    x = normals(data.draw(few), groups * data.draw(few), *data.draw(st.tuples(*[st.integers(1, 9)] * 2)))
    w = normals(groups * data.draw(few), x.shape[1] // groups, *kernel, seed=2)
    assume(min(output_size(x, w, stride, padding)) > 0)
    assert_matches_native(
        lambda x, w, b, backend: conv2d(x, w, b, stride, padding, 1, groups, backend=backend),
        *(x, w, normals(len(w), seed=3)),
        **EXACT,
    )


@pytest.mark.parametrize("padding", [0, 2, (1, 2)])
def test_is_torchs_convolution(padding):
    expected = outcome(lambda x, w, b: F.conv2d(x, w, b, 2, padding, 1, 2), X, W, B)
    torch.testing.assert_close(outcome(lambda x, w, b: conv2d(x, w, b, 2, padding, 1, 2), X, W, B), expected)


def test_padding_reads_as_in_pad():
    sides = (0, 3, 1, 2)
    torch.testing.assert_close(
        conv2d(X, W, B, padding=sides, groups=2), F.conv2d(F.pad(X, sides), W, B, groups=2)
    )


def test_gradient_against_finite_differences():
    inputs = [t.clone().requires_grad_() for t in (X, W, B)]
    assert torch.autograd.gradcheck(lambda x, w, b: conv2d(x, w, b, **GEOMETRY), inputs)


def test_layout_does_not_matter():
    assert_layouts_agree(lambda x: conv2d(x, W, B, **GEOMETRY), X)
    expected = conv2d(X, W, B, **GEOMETRY)
    torch.testing.assert_close(
        conv2d(X, W.to(memory_format=torch.channels_last), B, **GEOMETRY), expected, **EXACT
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_and_gradient_lie_in_memory_as_the_input(layout):
    x = X.clone(memory_format=layout).requires_grad_()
    y = conv2d(x, W, B, **GEOMETRY)
    y.sum().backward()
    assert y.is_contiguous(memory_format=layout)
    assert x.grad.is_contiguous(memory_format=layout)


def test_adjoint():
    """<dY, A X> = <dX, X> = <dW, W>: the gradients are the adjoints of a map linear in x and in w."""
    y, (dx, dw) = outcome(lambda x, w: conv2d(x, w, **GEOMETRY), X, W)
    dy = normals(*y.shape, seed=1)
    torch.testing.assert_close((dx * X).sum(), (dy * y).sum())
    torch.testing.assert_close((dw * W).sum(), (dy * y).sum())


def test_input_gradient_is_a_correlation_with_the_kernel_turned():
    _, (dx,) = outcome(lambda x: conv2d(x, W[:, :, :2, :2], stride=1, padding=1, groups=2), X)
    dy = normals(3, 6, 8, 9, seed=1)
    turned = W[:, :, :2, :2].flip(2, 3).unflatten(0, (2, 3)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(dx, F.conv2d(dy, turned, groups=2))


def test_fold_sums_what_unfold_copied():
    geometry = ((2, 3), (1, 1), (0, 1, 0, 0))
    counts = fold(torch.ones_like(unfold(X, *geometry, 1)), X.shape, *geometry)
    # A pixel stands in the columns once for each window that covers it: up to 2 rows times 3 columns of windows.
    rows = torch.tensor([1, 2, 2, 2, 2, 2, 1.0], dtype=X.dtype)
    columns = torch.tensor([1, 2, 3, 3, 3, 3, 3, 2.0], dtype=X.dtype)
    torch.testing.assert_close(counts, (rows[:, None] * columns).expand_as(X))


def wrong_fold(add=True, stride=True, crop=False):
    """`fold` with one mistake."""

    def wrong(columns, shape, kernel, u, padding):
        (N, C, H, W), (R, S), G = shape, kernel, len(columns)
        left, right, top, bottom = padding
        padded = columns.new_zeros(N, H + top + bottom, W + left + right, G, C // G)
        P, Q = (padded.shape[1] - R) // u[0] + 1, (padded.shape[2] - S) // u[1] + 1
        taps = columns.reshape(G, N, P, Q, R, S, C // G).permute(4, 5, 1, 2, 3, 0, 6)
        v = u if stride else (1, 1)
        for r in range(R):
            for s in range(S):
                plane = padded[:, r : r + v[0] * P : v[0], s : s + v[1] * Q : v[1]]
                plane.copy_(plane + taps[r, s] if add else taps[r, s])
        left, top = (right, bottom) if crop else (left, top)
        return padded[:, top : top + H, left : left + W].flatten(3).permute(0, 3, 1, 2)

    return wrong


def with_part(**parts):
    """The real backward with one of its functions replaced."""

    def backward(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            for name, part in parts.items():
                patch.setattr(MODULE, name, part)
            return conv2d_backward(*arguments)

    return backward


def changed(which, change):
    """The real backward with one of its gradients changed."""

    def backward(*arguments):
        gradients = list(conv2d_backward(*arguments))
        gradients[which] = change(gradients[which], *arguments)
        return tuple(gradients)

    return backward


def test_every_term_matters(monkeypatch):
    torch.testing.assert_close(  # the function that carries the mistakes is right without them
        wrong_fold()(unfold(X, (2, 3), (3, 2), (0, 2, 1, 3), 2), X.shape, (2, 3), (3, 2), (0, 2, 1, 3)),
        fold(unfold(X, (2, 3), (3, 2), (0, 2, 1, 3), 2), X.shape, (2, 3), (3, 2), (0, 2, 1, 3)),
    )
    rows, chunks, unfolded = MODULE._weight_rows, MODULE._chunks, unfold
    wrong = {
        "= for += where windows overlap": with_part(fold=wrong_fold(add=False)),
        "stride forgotten in fold": with_part(fold=wrong_fold(stride=False)),
        "padding cut off on the wrong side": with_part(fold=wrong_fold(crop=True)),
        "the other tower's weights": with_part(_weight_rows=lambda w, groups: rows(w, groups).roll(1, 0)),
        "the other tower's columns": with_part(unfold=lambda *a: unfolded(*a).roll(1, 0)),
        "padding of the other side in dw": with_part(
            unfold=lambda x, kernel, stride, padding, groups: unfolded(
                x, kernel, stride, (padding[1], padding[0], *padding[2:]), groups
            )
        ),
        "taps of w in the order (c, r, s)": with_part(
            _weight_rows=lambda w, groups: w.reshape(groups, len(w) // groups, -1)
        ),
        "kernel turned by 180 degrees": with_part(_weight_rows=lambda w, groups: rows(w.flip(2, 3), groups)),
        "taps of dw in the order (c, r, s)": with_part(
            _weight_from_rows=lambda dw_GOK, w: dw_GOK.reshape(w.shape)
        ),
        "dw of the last images only": with_part(_chunks=lambda *a: list(chunks(*a))[-1:]),
        "dw a mean over images": changed(1, lambda dw, *_: dw / 3),
        "db of one column only": changed(2, lambda db, dy, *_: dy.sum((0, 2))[:, 0]),
        "db of one image only": changed(2, lambda db, dy, *_: dy[0].sum((1, 2))),
        "no db": changed(2, lambda db, *_: torch.zeros_like(db)),
    }
    monkeypatch.setattr(MODULE, "COLUMN_BYTES", 1)  # several pieces
    for stride in (1, (3, 2)):  # windows that overlap, and windows that do not
        geometry = {**GEOMETRY, "stride": stride}
        # Without overlap there is nothing to overwrite; without stride there is none to forget.
        invisible = "stride forgotten in fold" if stride == 1 else "= for += where windows overlap"
        assert_wrong_gradients_are_noticed(
            "conv2d",
            {name: backward for name, backward in wrong.items() if name != invisible},
            lambda geometry=geometry: assert_matches_native(
                lambda x, w, b, backend: conv2d(x, w, b, **geometry, backend=backend), X, W, B
            ),
        )


def test_pieces_of_the_batch_add_up(monkeypatch):
    whole = outcome(lambda x, w, b: conv2d(x, w, b, **GEOMETRY), X, W, B)
    assert len(list(MODULE._chunks(X, W, 12))) == 1
    for images in (1, 2):  # 2 leaves a piece of one image
        monkeypatch.setattr(MODULE, "COLUMN_BYTES", images * 12 * 4 * 6 * 8)  # P Q C R S bytes
        assert images_at_once(X, W, 12) == images
        torch.testing.assert_close(outcome(lambda x, w, b: conv2d(x, w, b, **GEOMETRY), X, W, B), whole)


@pytest.mark.parametrize(
    ("x", "w", "stride", "padding", "groups"),
    [
        ((32, 3, 224, 224), (96, 3, 11, 11), (4, 4), (0, 3, 0, 3), 1),
        ((32, 96, 27, 27), (256, 48, 5, 5), (1, 1), (2, 2, 2, 2), 2),
        ((32, 256, 13, 13), (384, 256, 3, 3), (1, 1), (1, 1, 1, 1), 1),
        ((32, 384, 13, 13), (256, 192, 3, 3), (1, 1), (1, 1, 1, 1), 2),
    ],
)
def test_columns_of_the_papers_layers_stay_within_their_bytes(x, w, stride, padding, groups):
    x, w = torch.empty(x, device="meta"), torch.empty(w, device="meta")
    P, Q = output_size(x, w, stride, padding)
    images = images_at_once(x, w, P * Q)
    columns = unfold(x[:images], w.shape[2:], stride, padding, groups)
    assert columns.nbytes <= COLUMN_BYTES < columns.nbytes * (images + 1) / images


def test_an_image_larger_than_the_bytes_goes_alone(monkeypatch):
    monkeypatch.setattr(MODULE, "COLUMN_BYTES", 1)
    assert images_at_once(X, W, 12) == 1


def test_keeps_nothing_but_input_and_weight():
    _, *saved = conv2d_forward(X, W, B, (3, 2), (0, 2, 1, 3), 2)
    assert [tensor.data_ptr() for tensor in saved] == [X.data_ptr(), W.data_ptr()]


def test_computes_only_the_gradients_needed(monkeypatch):
    def refuse(*_):
        raise AssertionError("an input gradient was computed that nobody asked for")

    layer = Conv2d(4, 6, (2, 3), **GEOMETRY, dtype=torch.float64)
    layer.bias.requires_grad_(False)
    monkeypatch.setattr(MODULE, "fold", refuse)
    layer(X).sum().backward()
    assert layer.weight.grad is not None
    assert layer.bias.grad is None


def test_frozen_weights_get_no_gradient(monkeypatch):
    layer = Conv2d(4, 6, (2, 3), **GEOMETRY, dtype=torch.float64)
    layer.weight.requires_grad_(False)
    x = X.clone().requires_grad_()
    y = layer(x)

    def refuse(*_):
        raise AssertionError("columns were built for a frozen weight")

    monkeypatch.setattr(MODULE, "unfold", refuse)
    y.sum().backward()
    assert layer.weight.grad is None
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 288**0.5 * 2**-24), (torch.bfloat16, 4 * 2**-9)]
)
def test_error_of_narrow_types_is_a_few_roundings(dtype, bound):
    """Sums of up to 288 products accumulate in float32 or wider.

    The rounding errors of n additions in float32 grow like sqrt(n) 2^-24 at most; a bfloat16 result is rounded once
    more, by 2^-9, where sums in bfloat16 would be off by sqrt(288) 2^-9.
    """
    x, w = normals(4, 32, 6, 6).to(dtype), normals(32, 32, 3, 3, seed=2).to(dtype)
    b = normals(32, seed=3).to(dtype)
    dy = normals(4, 32, 6, 6, seed=4).to(dtype)
    wide = [t.double() for t in (x, w, b, dy)]
    geometry = ((1, 1), (1, 1, 1, 1), 1)
    ours = [
        conv2d_forward(x, w, b, *geometry)[0],
        *conv2d_backward(dy, x, w, *geometry, (True, True, True)),
    ]
    exact = [
        conv2d_forward(*wide[:3], *geometry)[0],
        *conv2d_backward(wide[3], *wide[:2], *geometry, (True, True, True)),
    ]
    for got, expected in zip(ours, exact, strict=True):
        assert got.dtype == dtype
        error = (got.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < bound


def test_bf16_bias_gradient_is_summed_in_float32():
    dy = torch.ones(10, 1, 10, 10, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    w = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    db = conv2d_backward(dy, dy, w, (1, 1), (0, 0, 0, 0), 1, (False, False, True))[2]
    assert db.item() == 1000


def test_bf16_weight_gradient_is_summed_over_pieces_in_float32(monkeypatch):
    monkeypatch.setattr(MODULE, "COLUMN_BYTES", 1)
    dy = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)
    w = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    dw = conv2d_backward(dy, dy, w, (1, 1), (0, 0, 0, 0), 1, (False, True, False))[1]
    assert dw.item() == 300


def test_autocast_multiplies_in_bf16_and_returns_float32_gradients():
    x, w, b = X.float(), W.float(), B.float()
    with torch.autocast("cpu", torch.bfloat16):
        y, gradients = outcome(lambda x, w, b: conv2d(x, w, b, **GEOMETRY), x, w, b)
    assert y.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    torch.testing.assert_close(y.double(), conv2d(X, W, B, **GEOMETRY), rtol=0.05, atol=0.05)


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    assert_module_travels(Conv2d(4, 6, (2, 3), **GEOMETRY, dtype=torch.float64), X)


def test_second_derivative_is_refused():
    assert_once_differentiable(lambda x: conv2d(x, W, B, **GEOMETRY), X)


@pytest.mark.parametrize("padding", [1, (2, 1), (0, 3, 0, 3)])
def test_has_the_parameters_and_the_print_of_torch(padding):
    torch.manual_seed(0)
    ours = Conv2d(4, 6, 3, 2, padding, groups=2, bias=False)
    torch.manual_seed(0)
    torchs = torch.nn.Conv2d(4, 6, 3, 2, padding if padding != (0, 3, 0, 3) else 0, groups=2, bias=False)
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    if padding != (0, 3, 0, 3):
        assert repr(ours) == repr(torchs)[:-1] + ", backend=reference)"


def test_an_empty_batch_passes():
    y, (dx, dw) = outcome(lambda x, w: conv2d(x, w, **GEOMETRY), X[:0], W)
    assert y.shape == (0, 6, 4, 4)
    assert dx.shape == (0, 4, 7, 8)
    assert not dw.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dilation": 2}, r"dilation=\(2, 2\) must be 1"),
        ({"padding": "same"}, "padding='same' must be an integer or a tuple of 1 or 2 or 4 integers"),
        ({"padding": (1, 2, 3)}, r"padding=\(1, 2, 3\) must be an integer"),
        ({"padding": -1}, r"padding=\(-1, -1, -1, -1\) must be >= 0"),
        ({"stride": 0}, r"stride=\(0, 0\) positive"),
        ({"groups": 1}, "multiples of groups=1"),
        ({"padding": 0, "input": X[..., :1, :]}, "a 2x3 kernel does not fit into 1x8 pixels"),
        ({"input": X[0]}, r"must be \(N, C, H, W\)"),
        ({"weight": W[0]}, r"and \(O, C/groups, R, S\)"),
        ({"bias": B[:1]}, r"bias \(1,\) must be \(6,\), one number per output"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(arguments, message):
    with pytest.raises(UserError, match=message) as refusal:
        conv2d(**{"input": X, "weight": W, "bias": B, "groups": 2} | arguments)
    assert "\n" not in str(refusal.value)


def test_one_number_in_a_tuple_is_for_both_axes_as_in_torch():
    ours = conv2d(X, W, B, (2,), groups=2)
    torch.testing.assert_close(ours, torch.nn.functional.conv2d(X, W, B, (2,), groups=2))


@pytest.mark.parametrize("arguments", [{"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_module_refuses_what_it_has_not(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        Conv2d(4, 6, 3, **arguments)


# ---- the weight gradient of the compiled pair on CUDA, whose values are checked on a CPU ----------------------


def columns_of_cuda(dy, x, w, stride, padding, groups):
    return FAST.product_of_columns(dy, x, w, stride, padding, groups, "cuda")


def geometry_of(case):
    stride, padding, groups = case[2:]
    return MODULE.two(stride), MODULE._sides(padding), groups


@pytest.mark.parametrize("images", [None, 2, 1], ids=["whole batch", "two at once", "one by one"])
@pytest.mark.parametrize("case", [*ALEXNET.values(), *AWKWARD.values()], ids=[*ALEXNET, *AWKWARD])
def test_columns_of_cuda_give_the_weight_gradient(case, images, monkeypatch):
    geometry = geometry_of(case)
    x, w = normals(3, *case[0][1:]), normals(*case[1], seed=2)
    y, *_ = conv2d_forward(x, w, None, *geometry)
    dy = gapped(normals(*y.shape, seed=1))
    if images:
        row = w[0].numel() + -w[0].numel() % 8
        monkeypatch.setitem(FAST.COLUMN_BYTES, "cuda", images * y[0, 0].numel() * geometry[2] * row * 8)
    _, expected, _ = conv2d_backward(dy, x, w, *geometry, (False, True, False))
    with torch.compiler.set_stance("force_eager"), Products() as products:
        ours = columns_of_cuda(dy, x, w, *geometry)
    torch.testing.assert_close(ours, expected, **EXACT)
    pieces = {None: 1, 2: 2, 1: 3}[images]
    assert len(products.operands) == pieces * geometry[2]


@COMPILES
@pytest.mark.slow
def test_columns_of_cuda_compile_once_for_every_batch():
    geometry = (2, 1), (1, 0, 2, 1), 2
    x, w = normals(5, 4, 7, 8), normals(6, 2, 2, 3, seed=2)
    for N in (5, 3, 1):
        dy = normals(N, 6, *output_size(x, w, *geometry[:2]), seed=1)
        _, expected, _ = conv2d_backward(dy, x[:N], w, *geometry, (False, True, False))
        torch.testing.assert_close(columns_of_cuda(dy, x[:N], w, *geometry), expected, **EXACT)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 2**-24), (torch.bfloat16, 2**-9)])
def test_columns_of_cuda_keep_one_rounding(dtype, epsilon, monkeypatch):
    """Every piece rounds its product once and pieces add up in float32: as many roundings as the reference has."""
    geometry = (1, 1), (1, 1, 1, 1), 2
    x, w = normals(4, 6, 6, 6).to(dtype), normals(4, 3, 3, 3, seed=2).to(dtype)
    dy = normals(4, 4, 6, 6, seed=4).to(dtype)
    monkeypatch.setitem(FAST.COLUMN_BYTES, "cuda", 1)
    _, exact, _ = conv2d_backward(dy.double(), x.double(), w.double(), *geometry, (False, True, False))
    with torch.compiler.set_stance("force_eager"):
        ours = columns_of_cuda(dy, x, w, *geometry)
    assert ours.dtype == dtype
    assert (ours.double() - exact).norm() / exact.norm() < 4 * epsilon


def test_pieces_of_cuda_add_up_in_float32(monkeypatch):
    monkeypatch.setitem(FAST.COLUMN_BYTES, "cuda", 1)
    dy = torch.ones(300, 1, 1, 1, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    w = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    with torch.compiler.set_stance("force_eager"):
        assert columns_of_cuda(dy, dy, w, (1, 1), (0, 0, 0, 0), 1).item() == 300


class Products(TorchDispatchMode):
    """The operands of all matrix products that run."""

    def __init__(self):
        super().__init__()
        self.operands = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "bmm"):
            self.operands.append(args[:2])
        return func(*args, **(kwargs or {}))


TINY = [  # input, weight, stride, padding, groups
    ((3, 56, 56), (96, 3, 7, 7), 1, (2, 3, 2, 3), 1),
    ((96, 27, 27), (256, 48, 5, 5), 1, 2, 2),
    ((256, 13, 13), (384, 256, 3, 3), 1, 1, 1),
    ((384, 13, 13), (384, 192, 3, 3), 1, 1, 2),
    ((384, 13, 13), (256, 192, 3, 3), 1, 1, 2),
]
PAPER = [((3, 224, 224), (96, 3, 11, 11), 4, (0, 3, 0, 3), 1), *TINY[1:]]


@pytest.mark.parametrize("network", [TINY, PAPER], ids=["tiny", "paper"])
def test_products_of_cuda_are_few_and_aligned(network):
    """Batch 128 in bfloat16 on torch's meta device, where nothing is computed."""
    products = Products()
    for case in network:
        x = torch.empty(128, *case[0], dtype=torch.bfloat16, device="meta")
        w = torch.empty(*case[1], dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        dy = x.new_empty(128, len(w), *output_size(x, w, *geometry_of(case)[:2]))
        dy = dy.contiguous(memory_format=torch.channels_last)
        with torch.compiler.set_stance("force_eager"), products:
            columns_of_cuda(dy, x, w, *geometry_of(case))
    assert len(products.operands) == 10 + (network is PAPER)  # conv2, and conv1 of 224 pixels, in two pieces
    for dy_OM, columns_MK in products.operands:
        assert columns_MK.nbytes <= FAST.COLUMN_BYTES["cuda"]
        assert min(dy_OM.shape + columns_MK.shape) >= 96
        for operand in (dy_OM, columns_MK):
            assert sorted(operand.stride())[0] == 1
            assert sorted(operand.stride())[1] % 8 == 0  # numbers of 2 bytes: multiples of 16 bytes
            assert operand.storage_offset() % 8 == 0


@pytest.mark.parametrize(("name", "value"), [("dilation", (2, 2)), ("padding_mode", "circular")])
def test_attributes_that_are_set_later_count(name, value):
    module = Conv2d(4, 6, 3).double()
    setattr(module, name, value)
    with pytest.raises(UserError, match=name):
        module(X)


@pytest.mark.parametrize(
    "arguments", [(0, 6, 3), (4, 0, 3), (4, 6, 0), (4, 6, (3, 3, 3)), (4, 6, True), (4, 6, 3, 1, 0, 1, 0)]
)
def test_a_module_of_nothing_is_refused_in_one_line(arguments):
    with pytest.raises(UserError, match="must be"):
        Conv2d(*arguments)


def test_a_stride_beyond_the_image_is_one_window():
    torch.testing.assert_close(conv2d(X, W, groups=2, stride=2**40), conv2d(X, W, groups=2, stride=100))
