"""The compiled pairs: equal to the reference, one graph per layer, no gradient kernel of the library in `fast`."""

import copy
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from cases import COMPILES, normals, outcome
from torch import nn
from torch._dynamo.utils import counters
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from alexnet.compile import VARIANTS
from alexnet.errors import UserError
from alexnet.layers import (
    Backends,
    Conv2d,
    Linear,
    ReLU,
    ReluLrnPool,
    compiled,
    conv2d,
    cross_entropy,
    dropout,
    dropout_mask,
    linear,
    local_response_norm,
    max_pool2d,
    relu,
    relu_lrn_pool,
    same_map_norm,
    tanh,
)
from alexnet.layers.backend import OPERATIONS, PAIRS, Pair, pair_for
from alexnet.layers.compiled import by_tensor
from alexnet.layers.compiled.conv2d import kernel_from_depth, shifted_products, space_to_depth, uses_im2col
from alexnet.layers.compiled.on_cuda import FEW, ON_CUDA
from alexnet.layers.compiled.relu_lrn_pool import halves
from alexnet.layers.conv2d import _sides, conv2d_backward, conv2d_forward, two
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool

pytestmark = COMPILES

X = 2 * normals(2, 8, 9, 8)
TARGET = torch.tensor([1, 3, 2])
NORM = 5, 0.3, 0.75, 2.0  # alpha large enough that the second term matters
# A block that compiles in a third of the paper's time: fewer neighbours, fewer places, both sides different.
SMALL = 3, 0.3, 0.75, 2.0, (3, 2), (2, 1)
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def block(order, ties, constants=NORM):
    def function(x, backend):
        return relu_lrn_pool(x, *constants, order=order, ties=ties, groups=2, backend=backend)

    return function


def block_constants(small, order, ties):
    """What the block's pair takes, from size, alpha, beta, k, kernel and stride; two towers."""
    return Norm(*small[:4], 2), Pool(*small[4:], (0, 0), True, ties), order


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


CASES = {
    "a small block": (block("relu_lrn_pool", "first", SMALL), [X]),
    "a small block of 2012, with ties": (block("lrn_pool_relu", "all", SMALL), [X.round()]),
    "the papers block": (block("relu_lrn_pool", "first"), [X]),
    "the block of 2012, with ties": (block("lrn_pool_relu", "all"), [X.round()]),
    "even window": (lambda x, backend: local_response_norm(x, 4, 0.3, 0.6, groups=2, backend=backend), [X]),
    "one row": (lambda x, backend: local_response_norm(x, 5, 0.3, 0.75, backend=backend), [normals(1, 7)]),
    "window over all maps": (
        lambda x, backend: local_response_norm(x, 9, 0.3, 0.75, backend=backend),
        [normals(3, 4, 5)],
    ),
    "same map": (lambda x, backend: same_map_norm(x, 5, 0.3, 0.75, 1.0, backend=backend), [X]),
    "padded pool": (lambda x, backend: max_pool2d(x, 2, 1, 1, backend=backend), [X]),
    "padded pool, rounded up": (
        lambda x, backend: max_pool2d(x, 3, 2, 1, ceil_mode=True, backend=backend),
        [X],
    ),
    "pool with other sides and ties": (
        lambda x, backend: max_pool2d(x, (3, 4), (2, 1), (1, 2), ties="all", backend=backend),
        [X.round()],
    ),
    "one image without a batch": (lambda x, backend: max_pool2d(x, 2, backend=backend), [X[0]]),
    "relu": (lambda x, backend: relu(x, backend=backend), [X]),
    "tanh, channels-last": (
        lambda x, backend: tanh(x, backend=backend),
        [X.to(memory_format=torch.channels_last)],
    ),
    "dropout": (lambda x, backend: dropout(x, 0.4, key=77, first_row=3, backend=backend), [X]),
    "loss": (
        lambda x, backend: cross_entropy(x, TARGET, label_smoothing=0.1, backend=backend),
        [normals(3, 5)],
    ),
    "loss of each image": (
        lambda x, backend: cross_entropy(x, TARGET, reduction="none", backend=backend),
        [normals(3, 5)],
    ),
    "linear": (
        lambda x, w, b, backend: linear(x, w, b, backend=backend),
        [normals(3, 5), normals(4, 5), normals(4)],
    ),
}


# Seconds to compile where nothing is cached.
SLOW = (
    *("a small block of 2012, with ties", "the papers block", "the block of 2012, with ties"),
    *("padded pool", "padded pool, rounded up", "same map", "even window"),
    *("pool with other sides and ties", "window over all maps", "one row"),
    *("one image without a batch", "loss of each image"),
)


@pytest.mark.parametrize("case", [slow(case) if case in SLOW else case for case in CASES])
def test_equals_the_reference(case):
    function, inputs = CASES[case]
    assert_equals_the_reference(function, *inputs)


def assert_equals_the_reference(function, *inputs, backend="compiled", **tolerances):
    expected = outcome(lambda *x: function(*x, backend="reference"), *inputs)
    ours = outcome(lambda *x: function(*x, backend=backend), *inputs)
    torch.testing.assert_close(ours, expected, **(tolerances or EXACT))


@pytest.fixture
def pairs_of_cuda(monkeypatch):
    """The pairs that serve CUDA, here on a CPU."""
    for operation, pair in ON_CUDA.items():
        monkeypatch.setitem(PAIRS, (operation, "compiled"), pair)


@pytest.mark.usefixtures("pairs_of_cuda")
@pytest.mark.parametrize("case", CASES)
def test_formulas_for_cuda_equal_the_reference(case):
    """Uncompiled, which takes no time; `slow` compiles them."""
    function, inputs = CASES[case]
    with torch.compiler.set_stance("force_eager"):
        assert_equals_the_reference(function, *inputs)


# Every operation, both orders, both ways through the gradient of a norm: q in between (9 > FEW terms) and not (3, 4).
@pytest.mark.slow
@pytest.mark.usefixtures("pairs_of_cuda")
@pytest.mark.parametrize(
    "case",
    [
        *("a small block", "a small block of 2012, with ties", "even window", "window over all maps"),
        *("padded pool, rounded up", "pool with other sides and ties", "dropout"),
    ],
)
def test_graphs_for_cuda_equal_the_reference(case):
    assert 5 <= FEW < 9
    function, inputs = CASES[case]
    assert_equals_the_reference(function, *inputs)


@pytest.mark.usefixtures("pairs_of_cuda")
@pytest.mark.parametrize(
    "function",
    [block("relu_lrn_pool", "first", SMALL), block("lrn_pool_relu", "first"), CASES["even window"][0]],
)
def test_a_nan_stays_in_its_tower_on_cuda(function):
    x = X.clone()
    x[1, 3, 4, 7] = float("nan")  # the last map of a tower: the next number in memory is another tower's
    x[0, 7, 8, 7] = float("inf")  # the last number of an image
    with torch.compiler.set_stance("force_eager"):
        ours, [dx] = outcome(lambda x: function(x, backend="compiled"), x)
    y, [expected] = outcome(lambda x: function(x, backend="reference"), x)
    assert torch.equal(ours.isnan(), y.isnan())
    assert torch.equal(dx.isnan(), expected.isnan())


def test_a_tensor_chooses_the_pair():
    """By its device; where there is nothing to compute, the reference's."""

    def named(name):
        return Pair(lambda x, *rest: (x, name), lambda dy, *rest: name)

    pair = by_tensor(named("reference"), named("cpu"), named("cuda"))
    cuda = SimpleNamespace(is_cuda=True, is_meta=False, numel=lambda: 1, data="y")
    for x, name in ((X, "cpu"), (X[:0], "reference"), (X.to("meta"), "reference"), (cuda, "cuda")):
        assert pair.forward(x)[1] == name
        if x is not cuda:
            assert pair.backward(torch.ones(()), None, x, 3) == name


@pytest.mark.slow
@pytest.mark.usefixtures("pairs_of_cuda")
def test_a_new_key_in_the_same_memory_is_a_new_mask_from_the_same_graph():
    """What a captured step does: only the key's memory changes."""
    key, pair = torch.tensor(5), pair_for("dropout", "compiled")
    constants = 0.4, 3, 1.0
    first, _ = pair.forward(X, key, *constants)
    graphs = counters["stats"]["unique_graphs"]
    key.fill_(1 << 40)  # a key whose lower word is 0
    second, kept = pair.forward(X, key, *constants)
    assert counters["stats"]["unique_graphs"] == graphs
    assert torch.equal(kept, dropout_mask(X.shape, 0.4, 1 << 40, 3))
    assert not torch.equal(first, second)


# Towers and stride 1; conv1's geometry; every side and both strides different; no kernel row left over.
GEOMETRIES = [(2, 1, 1), (1, 4, (0, 3, 0, 3)), (2, (2, 3), (1, 0, 2, 1)), (1, 1, (2, 1, 0, 3)), (2, 2, 0)]


@pytest.mark.parametrize("backend", ["compiled", "library"])
@pytest.mark.parametrize(("groups", "stride", "padding"), GEOMETRIES)
def test_convolution_equals_the_reference(groups, stride, padding, backend):
    def convolution(x, w, b, backend):
        return conv2d(x, w, b, stride, padding, groups=groups, backend=backend)

    operands = normals(3, 4, 13, 11), normals(6, 4 // groups, 3, 5), normals(6)
    assert_equals_the_reference(convolution, *operands, backend=backend)


@pytest.mark.parametrize(
    ("groups", "stride", "padding"), [*GEOMETRIES[:2], *(slow(*g) for g in GEOMETRIES[2:])]
)
def test_shifted_products_are_the_weight_gradient(groups, stride, padding):
    """What bfloat16 takes on a CPU, in float64."""
    x, w = normals(3, 4, 13, 11), normals(6, 4 // groups, 3, 5)
    stride, sides = two(stride), _sides(padding)
    y, *_ = conv2d_forward(x, w, None, stride, sides, groups)
    dy = normals(*y.shape, seed=2)
    _, expected, _ = conv2d_backward(dy, x, w, stride, sides, groups, (False, True, False))
    if max(stride) > 1:
        blocks = space_to_depth(x, w, stride, sides, groups)
        ours = kernel_from_depth(shifted_products(dy, blocks, (0, 0, 0, 0), groups), w, stride)
    else:
        ours = shifted_products(dy, x, sides, groups)
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.parametrize(
    ("px", "kernel", "dtype", "columns"),
    [
        (27, 5, torch.bfloat16, False),  # the paper's conv2: 25 taps, (29 / 27)^2 = 1.15
        (13, 5, torch.bfloat16, True),  # small maps: (15 / 13)^2 = 1.33
        (13, 3, torch.bfloat16, True),  # few taps
        (27, 5, torch.float32, True),
    ],
)
def test_columns_for_small_maps_and_few_taps(px, kernel, dtype, columns):
    x, w = torch.zeros(2, 4, px, px, dtype=dtype), torch.zeros(4, 4, kernel, kernel, dtype=dtype)
    assert uses_im2col(x, x, w, (1, 1), 4 * (kernel // 2,)) == columns


@pytest.mark.parametrize("backend", ["compiled", "library"])
@pytest.mark.parametrize(("channels", "stride"), [(3, 1), (3, 2), (8, 2)])
def test_saved_tensors_may_come_back_as_copies(channels, stride, backend):
    """As torch.utils.checkpoint and save_on_cpu hand them out: nothing may hang on which object they are."""

    def convolution(x, w):
        return conv2d(x, w, None, stride, 1, backend=backend)

    operands = normals(3, channels, 9, 9).bfloat16(), normals(4, channels, 4, 4).bfloat16()
    expected = outcome(convolution, *operands)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        assert_equal_outcomes(outcome(convolution, *operands), expected)


def assert_equal_outcomes(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_padding_as_wide_as_the_kernel():
    operands = normals(2, 4, 9, 9).bfloat16(), normals(4, 4, 4, 4).bfloat16(), normals(4).bfloat16()

    def convolution(x, w, b, backend):
        return conv2d(x, w, b, 1, 4, backend=backend)

    # The reference rounds dx at each of the 16 taps, to sums of 4 products below 8: by 2^-6 at most, 2^-2 in all. An
    # entry of dw is below 64, where bfloat16 goes by steps of 2^-2.
    assert_equals_the_reference(convolution, *operands, rtol=0, atol=2**-2)


@pytest.mark.parametrize("backend", ["compiled", "library"])
def test_space_to_depth_of_the_first_layer(backend):
    def convolution(x, w, b, backend):
        return conv2d(x, w, b, 4, (0, 3, 0, 3), backend=backend)

    operands = [t.bfloat16() for t in (normals(2, 3, 20, 24), normals(6, 3, 11, 11) / 20, normals(6))]
    # Both add K = 363 (forward) or N P Q = 60 (weights) rounded terms in float32 and round once: 2^-8 each. On a CPU
    # without bfloat16 instructions the library also rounds the sums of pieces: dw is below 8, so 2^-6 for each of four.
    rounding = {"compiled": {"rtol": 2**-7, "atol": 2**-6}, "library": {"rtol": 2**-7, "atol": 2**-4}}
    assert_equals_the_reference(convolution, *operands, backend=backend, **rounding[backend])


@pytest.mark.slow
def test_half_types_round_once():
    def function(x, backend):
        return local_response_norm(x, *SMALL[:4], groups=2, backend=backend)

    assert_equals_the_reference(function, X.bfloat16(), rtol=2**-7, atol=2**-8)


NORMS = {
    "local_response_norm": lambda x, backend: local_response_norm(x, *NORM, groups=2, backend=backend),
    "same_map_norm": lambda x, backend: same_map_norm(x, *NORM, backend=backend),
    "the block": block("relu_lrn_pool", "first", SMALL),
    "the block of 2012": block("lrn_pool_relu", "all", SMALL),
    "max_pool2d": lambda x, backend: max_pool2d(x, 3, 2, 1, backend=backend),
}


@pytest.mark.parametrize("operation", NORMS)
def test_non_finite_values_show_where_the_reference_shows_them(operation):
    """One NaN at the last map of an image's last pixel: the next number in memory is the next image's."""
    x, function = X.clone(), NORMS[operation]
    x[0, 7, 8, 7], x[1, 3, 4, 4], x[1, 0, 0, 0] = float("nan"), float("inf"), 1e200
    with torch.compiler.set_stance("force_eager"):
        y, [dx] = outcome(lambda x: function(x, "compiled"), x)
    expected, [dx_expected] = outcome(lambda x: function(x, "reference"), x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    torch.testing.assert_close(dx, dx_expected, equal_nan=True)
    if "max" in operation or "norm" in operation:
        assert y.isnan().any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_norm_keeps_the_layout_it_is_given(layout):
    """A batch of 5 that lies map by map in two slabs: none is left with one image."""
    x, dy = normals(5, 8, 3, 4).to(memory_format=layout), normals(5, 8, 4, 3).transpose(2, 3)
    with torch.compiler.set_stance("force_eager"), pytest.MonkeyPatch.context() as patch:
        patch.setattr("alexnet.layers.compiled.norm_by_maps.SLAB", 2 * x[0].numel())
        pair, constants = pair_for("local_response_norm", "compiled"), (4, 0.3, 0.75, 1.0, 2)
        y, kept = pair.forward(x, *constants)
        dx = pair.backward(dy, kept, *constants)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)
    reference = pair_for("local_response_norm", "reference")
    y_expected, *saved = reference.forward(x, *constants)
    torch.testing.assert_close(y, y_expected)
    torch.testing.assert_close(dx, reference.backward(dy, *saved, *constants))


def test_the_gradient_of_a_norm_does_not_underflow():
    """s^-7/4 alone would: 1e13 squared, to the power 7/4, is beyond float32; its product with x is not."""
    x = 1e13 * normals(1, 8, 2, 2).float()
    for name in ("local_response_norm", "same_map_norm"):
        with torch.compiler.set_stance("force_eager"):
            ours = outcome(lambda x, n=name: NORMS[n](x, "compiled"), x)
        torch.testing.assert_close(
            ours, outcome(lambda x, n=name: NORMS[n](x, "reference"), x), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("stride", [4, 2**40])
def test_a_stride_beyond_the_window_leaves_zeros(stride):
    def pool(x, backend):
        return max_pool2d(x, 2, stride, backend=backend)

    with torch.compiler.set_stance("force_eager"):
        assert_equals_the_reference(pool, X)


def test_an_infinity_stays_in_its_windows():
    """The kernel filled up with zeros to a multiple of the stride would multiply it by zero."""
    x, w = normals(1, 3, 12, 12).bfloat16(), normals(4, 3, 3, 3).bfloat16()
    x[0, 0, 3, 3] = float("inf")  # windows are 3 wide and 4 apart: none holds it
    y, _ = outcome(lambda x, w: conv2d(x, w, None, 4, backend="compiled"), x, w)
    expected, _ = outcome(lambda x, w: conv2d(x, w, None, 4, backend="reference"), x, w)
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("operation", ["linear", "conv2d", "max_pool2d", "relu", "dropout", "the block"])
def test_an_empty_batch_passes(operation):
    functions = {
        "linear": lambda x: linear(x.flatten(1), torch.ones(3, 576).double(), backend="compiled"),
        "conv2d": lambda x: conv2d(x, torch.ones(4, 8, 3, 3).double(), backend="compiled"),
        "relu": lambda x: relu(x, backend="compiled"),
        "dropout": lambda x: dropout(x, backend="compiled"),
        "max_pool2d": lambda x: NORMS["max_pool2d"](x, "compiled"),
        "the block": lambda x: NORMS["the block"](x, "compiled"),
    }
    y, [dx] = outcome(functions[operation], X[:0])
    assert (len(y), dx.shape) == (0, X[:0].shape)
    meta = functions[operation](X.to("meta")) if operation not in ("linear", "conv2d") else None
    assert meta is None or meta.shape[1:] == y.shape[1:]


@pytest.mark.parametrize(
    "operation", ["max_pool2d", "local_response_norm", "same_map_norm", "relu", "dropout"]
)
def test_an_output_may_be_changed_in_place(operation):
    function = {
        **NORMS,
        "relu": lambda x, backend: relu(x, backend=backend),
        "dropout": lambda x, backend: dropout(x, key=3, backend=backend),
    }[operation]

    def in_place(x, backend):
        return function(x, backend).mul_(2)

    with torch.compiler.set_stance("force_eager"):
        if operation == "relu":  # its backward reads what was changed: an error, as torch's own
            with pytest.raises(RuntimeError, match="inplace operation"):
                outcome(lambda x: in_place(x, "compiled"), X)
        else:
            assert_equals_the_reference(in_place, X)


@pytest.mark.parametrize("convolution", ["compiled", "library"])
def test_somebody_elses_graph_holds_the_compiled_pairs(convolution):
    """torch.compile around a network traces through the pairs, whose own graphs would not nest."""
    net, x = small_net("compiled", convolution), normals(3, 3, 29, 29).float()
    reference = small_net("reference", "reference")
    reference.load_state_dict(net.state_dict())
    graph = torch.compile(net, fullgraph=True, backend="eager")
    ours, expected = (
        torch.autograd.grad(f(x).square().sum(), list(n.parameters()))
        for f, n in ((graph, net), (reference, reference))
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_torch_func_and_batched_gradients_take_compiled_pairs():
    def loss(x):
        return relu(x, backend="compiled").square().sum()

    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(vmap(grad(loss))(X), 2 * X.clamp(min=0))
        x = X[0, 0, 0].clone().requires_grad_()
        y = relu(x, backend="compiled")
        (rows,) = torch.autograd.grad(y, x, torch.eye(8).double(), is_grads_batched=True)
        assert torch.equal(rows, (x > 0).double().diag())


def test_dropout_keeps_channels_last():
    x = X.to(memory_format=torch.channels_last)
    with torch.compiler.set_stance("force_eager"):
        assert dropout(x, backend="compiled").is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["relu_lrn_pool", "lrn_pool_relu"])
def test_a_batch_in_two_halves_gives_the_same_bits(order, monkeypatch):
    """Halves of different sizes, in the graph of the whole; three images stay whole, since one is another graph."""
    x, constants = 30 * normals(7, 6, 9, 9).float(), block_constants(SMALL, order, "all")
    pair = pair_for("relu_lrn_pool", "compiled")
    y, *saved = pair.forward(x, *constants)
    dy = normals(*y.shape, seed=1).float()
    whole = pair.backward(dy, *saved, *constants)
    graphs = counters["stats"]["unique_graphs"]
    monkeypatch.setattr("alexnet.layers.compiled.relu_lrn_pool.LARGE", 0)
    assert [halves(x[:n]) for n in (3, 4, 7)] == [1, 2, 2]
    assert torch.equal(pair.backward(dy, *saved, *constants), whole)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("block", "ties", "bytes_per_output"), [(SMALL, "first", 1), slow((*NORM, (3, 3), (2, 2)), "all", 2)]
)
def test_the_block_keeps_the_convolutions_output_and_the_winners(block, ties, bytes_per_output):
    x = X.to(memory_format=torch.channels_last)
    constants = block_constants(block, "relu_lrn_pool", ties)
    y, kept, *winners = pair_for("relu_lrn_pool", "compiled").forward(x, *constants)
    assert kept is x
    assert sum(w.numel() * w.element_size() for w in winners) == bytes_per_output * y.numel()


class Trace(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradient_operators(backend, dtype):
    pair = pair_for("conv2d", backend)
    x, w, b = (t.to(dtype) for t in (normals(2, 3, 20, 20), normals(6, 3, 5, 5), normals(6)))
    geometry = (2, 2), (1, 1, 1, 1), 1
    y, *saved = pair.forward(x, w, b, *geometry)
    dy = torch.ones_like(y)
    with torch.compiler.set_stance("force_eager"), Trace() as trace:  # what a graph is made of, one by one
        pair.backward(dy, *saved, *geometry, (True, True, True))
    return trace.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_kernel_of_the_library_in_fast(dtype):
    ours = gradient_operators("compiled", dtype)
    assert "mm" in ours
    assert not {name for name in ours if "backward" in name}
    assert "convolution_backward" in gradient_operators("library", dtype)  # the trace can see one


def small_net(backend="compiled", convolution="compiled"):
    return nn.Sequential(
        Conv2d(3, 8, 5, stride=2, backend=convolution),
        ReluLrnPool(*SMALL, groups=2, backend=backend),
        Conv2d(8, 4, 3, groups=2, backend=convolution),
        nn.Flatten(),
        Linear(160, 5, backend=backend),
        ReLU(backend=backend),
    )


def step(net, images, backend="compiled"):
    x, labels = normals(images, 3, 29, 29, seed=images).float(), torch.arange(images) % 5
    net.zero_grad()
    cross_entropy(net(x), labels, backend=backend).backward()
    return [p.grad.clone() for p in net.parameters()]


def assert_one_graph_serves_every_batch(net, step):
    torch._dynamo.reset()
    counters.clear()
    first = step(net, 6)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    for images in (6, 5, 2, 6):  # an epoch with a ragged last batch, and the next one
        again = step(net, images)
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # bitwise, run for run


@pytest.mark.slow
def test_one_graph_serves_every_batch_and_nothing_falls_back():
    net, reference = small_net(), small_net("reference", "reference")
    reference.load_state_dict(net.state_dict())
    assert_one_graph_serves_every_batch(net, step)
    torch.testing.assert_close(step(net, 6), step(reference, 6, "reference"), rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("pairs_of_cuda")
def test_one_graph_for_cuda_serves_every_batch():
    assert_one_graph_serves_every_batch(small_net(), step)


def test_other_threads_may_compile_as_much():
    """On CUDA autograd calls the backward from threads of its own, where torch's limit would be 8 graphs."""
    found = []

    def run():
        relu(X, backend="compiled")
        found.append(torch._dynamo.config.recompile_limit)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [VARIANTS]


@pytest.mark.slow
def test_deterministic_mode_raises_nothing():
    block = ReluLrnPool(*SMALL, groups=2, backend="compiled")
    convolution = Conv2d(8, 4, 3, backend="library")
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (outcome(lambda x: convolution(block(x)), X.float()) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[1][0], again[1][0])


@pytest.mark.parametrize(
    "module", [ReluLrnPool(*SMALL, groups=2, backend="compiled"), Conv2d(8, 4, 3, backend="compiled")]
)
def test_a_module_travels_after_use(module):
    expected = module.double()(X)
    assert "backend=compiled" in repr(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(X), expected)


def test_fast_is_ours_and_fastest_says_where_it_is_not():
    fast, fastest = Backends(default="fast").resolve("cpu"), Backends(default="fastest").resolve("cpu")
    assert set(fast) == set(OPERATIONS)
    assert set(fast.values()) == {"compiled"}
    assert {operation for operation, backend in fastest.items() if backend != "compiled"} == {"conv2d"}
    assert "backend=library" in repr(Conv2d(3, 4, 3, backend=fastest["conv2d"]))


def test_only_the_convolution_has_a_library_pair():
    with pytest.raises(UserError, match=r"Set backend\.relu=compiled"):
        pair_for("relu", "library")


def test_a_missing_compiler_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.delitem(PAIRS, ("relu", "compiled"), raising=False)
    one_line = r"no C\+\+ compiler \(no-such-compiler\).* set backend=reference"
    nowhere = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with nowhere, pytest.raises(UserError, match=one_line):
        Backends(relu="compiled").resolve("cpu")


def test_a_missing_triton_is_one_line_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    monkeypatch.delitem(PAIRS, ("relu", "compiled"), raising=False)
    with pytest.raises(UserError, match=r"no triton .* set backend=reference"):
        Backends(relu="fast").resolve("cpu")


def test_a_missing_header_is_one_line_with_the_way_out(monkeypatch):
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda name: "/nowhere")
    monkeypatch.delitem(PAIRS, ("relu", "compiled"), raising=False)
    with pytest.raises(UserError, match=r"no /nowhere/Python\.h.* set backend=reference"):
        Backends(relu="fast").resolve("cpu")
