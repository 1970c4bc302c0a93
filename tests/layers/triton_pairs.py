"""The Triton pairs against the reference pairs. Run by test_triton.py: under Triton's interpreter, or on a GPU.

The interpreter takes a tenth of a second for a comparison: what a quick run can do without is marked slow.
"""

import pytest
import torch
from cases import assert_once_differentiable, gapped, layouts, normals
from triton import knobs

from alexnet.errors import UserError
from alexnet.layers import local_response_norm, relu_lrn_pool
from alexnet.layers.backend import Pair, pair_for
from alexnet.layers.local_response_norm import Norm
from alexnet.layers.max_pool2d import Pool, output_size
from alexnet.layers.triton import local_response_norm as norm_kernels
from alexnet.layers.triton import relu_lrn_pool as block_kernels

INTERPRETED = knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
ORDERS = pytest.mark.parametrize("order", ["relu_lrn_pool", "lrn_pool_relu"])
RULES = pytest.mark.parametrize("ties", ["first", "all"])
EXACT = {"rtol": 1e-11, "atol": 1e-12}  # float64: the same formulas in another order
NORM = 5, 0.3, 0.75, 2.0  # alpha large enough that the second term matters
POOL = (3, 3), (2, 2), True  # window, stride, rounded up


@pytest.fixture(autouse=True, scope="module")
def _deterministic():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(*shape, scale=2.0, dtype=torch.float64):
    return (scale * normals(*shape, dtype=dtype)).to(DEVICE)


def both_ways(pair, x, dy, constants):
    """y and dx of one pair, no autograd between."""
    y, *saved = pair.forward(x, *constants)
    return y, pair.backward(dy, *saved, *constants)


def assert_pairs_agree(operation, x, *constants, kernels=None, **tolerances):
    reference, triton = pair_for(operation, "reference"), kernels or pair_for(operation, "triton")
    y = reference.forward(x, *constants)[0]
    dy = gapped(normals(*y.shape, seed=1).to(DEVICE, x.dtype))
    ours, expected = (both_ways(pair, x, dy, constants) for pair in (triton, reference))
    torch.testing.assert_close(ours, expected, **(tolerances or EXACT))


def compare_norm(x, norm=NORM, groups=1, **choices):
    assert_pairs_agree("local_response_norm", x, *norm, groups, **choices)


def block_constants(order, ties="first", norm=NORM, pool=POOL, groups=2):
    """What the block's pair takes."""
    return Norm(*norm, groups), Pool(*pool[:2], (0, 0), pool[2], ties), order


def compare_block(x, order, ties="first", norm=NORM, pool=POOL, groups=1, **choices):
    assert_pairs_agree("relu_lrn_pool", x, *block_constants(order, ties, norm, pool, groups), **choices)


# Every branch of the launchers: rows that fill the last block and rows that do not, lanes without a map, one map.
SHAPES = {
    "rows for two blocks and a bit; 6 maps in 8 lanes": ((2, 12, 7, 9), 2),
    "blocks filled exactly, every lane a map": ((1, 8, 16, 16), 1),
    "a tower of one map has no neighbours": ((2, 3, 4, 5), 3),
    "a window wider than its tower": ((1, 6, 5, 5), 3),
    "fewer rows than a block; 96 maps in 128 lanes": ((1, 96, 2, 3), 1),
    "rows longer than a block": ((1, 1030, 2, 2), 1),
}
BLOCK_SHAPES = [
    pytest.param(*case, marks=[pytest.mark.slow] if case[0][1] > 12 else []) for case in SHAPES.values()
]


@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES.keys())
def test_norm_matches_reference(shape, groups):
    compare_norm(inputs(*shape), groups=groups)


@pytest.mark.parametrize("shape", [(5, 8), (3, 8, 5), (2, 8, 2, 3, 2)])
def test_norm_takes_any_number_of_dimensions(shape):
    compare_norm(inputs(*shape), groups=2)


@ORDERS
@pytest.mark.parametrize(("shape", "groups"), BLOCK_SHAPES, ids=SHAPES.keys())
def test_block_matches_reference(shape, groups, order):
    compare_block(inputs(*shape), order, groups=groups)


# beta 3/4 by square roots, any other by an exponential; an even window is not its own reflection; n = 1 has no
# neighbours; n = 9 reaches the whole tower from either side.
NORMS = [(4, 0.3, 0.75, 1.0), (4, 0.3, 0.5, 1), (1, 1, 1.2, 0.5), (9, 0.2, 1, 2.0), (2, 0.0, 0.75, 2.0)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_other_constants(norm):
    x = inputs(2, 12, 4, 5)
    compare_norm(x, norm, groups=2)
    compare_block(x, "relu_lrn_pool", norm=norm, groups=2)
    compare_block(x, "lrn_pool_relu", norm=norm, groups=2)


# Windows that overlap, touch, leave gaps, and cover a pixel three times; the last ones cut or dropped at the edge.
POOLS = [
    ((3, 3), (2, 2), False),
    ((2, 2), (2, 2), True),
    ((2, 3), (3, 1), True),
    ((1, 1), (2, 2), False),
    ((3, 2), (1, 3), True),
]


@pytest.mark.slow
@pytest.mark.parametrize("pool", POOLS)
def test_other_windows(pool):
    compare_block(inputs(2, 6, 6, 8), "relu_lrn_pool", "first", pool=pool, groups=2)
    compare_block(inputs(2, 6, 6, 8), "lrn_pool_relu", "all", pool=pool, groups=2)


@pytest.mark.slow
def test_bits_of_the_winners():
    x = inputs(1, 4, 6, 6).round()
    for kernel, kept in ((3, 5), torch.int16), ((4, 4), torch.int32):
        pool = kernel, (2, 2), True
        compare_block(x, "relu_lrn_pool", "all", pool=pool)
        constants = block_constants("relu_lrn_pool", "all", pool=pool, groups=1)
        assert block_kernels.relu_lrn_pool_forward(x, *constants)[2].dtype == kept
    with pytest.raises(UserError, match=r"room for 31 places.*Set backend\.relu_lrn_pool=reference"):
        relu_lrn_pool(x, *NORM, 6, 2, ties="all", backend="triton")


@ORDERS
@RULES
def test_ties(ties, order):
    x = inputs(3, 8, 6, 5, scale=0.7).round()  # mostly -1, 0 and 1
    x[1], x[2] = 1, 0
    compare_block(x, order, ties, groups=2)


@ORDERS
@RULES
def test_windows_of_negative_responses_only(ties, order):
    x = inputs(2, 8, 6, 6)
    x[..., :3] = -x[..., :3].abs()
    compare_block(x, order, ties, groups=2)


@pytest.mark.filterwarnings(
    "ignore:(invalid|overflow):RuntimeWarning"
)  # numpy, on whose arrays Triton interprets
@ORDERS
@RULES
def test_what_is_not_finite_shows_as_in_the_reference(ties, order):
    x = inputs(2, 6, 5, 6)
    x[0, 2, 2, 2] = x[0, 4, 4, 5] = float("nan")
    x[1, 2, 2, 2] = x[1, 4, 4, 5] = float("inf")
    compare_block(x, order, ties, equal_nan=True, **EXACT)


@pytest.mark.slow
def test_layout_does_not_matter():
    x = inputs(2, 6, 5, 6)
    for function in (
        lambda x: local_response_norm(x, *NORM, groups=2, backend="triton"),
        lambda x: relu_lrn_pool(x, *NORM, groups=2, backend="triton"),
    ):
        expected = outcome(function, x)
        for kind in layouts(x).values():
            ours = outcome(function, kind)
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def outcome(function, x):
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    y.backward(gapped(normals(*y.shape, seed=1).to(DEVICE, y.dtype)))
    return y.detach(), leaf.grad


@ORDERS
@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16)),
    ],
)
def test_narrow_types_are_computed_in_float32_and_rounded_once(dtype, order):
    # A unit in the last place: the interpreter cuts bfloat16 off where the chip rounds.
    ulp = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    x = inputs(2, 12, 7, 6).to(dtype)
    norm, block = Norm(*NORM, 2), block_constants(order)
    for operation, constants in (("local_response_norm", norm), ("relu_lrn_pool", block)):
        reference, triton = pair_for(operation, "reference"), pair_for(operation, "triton")
        y = reference.forward(x.float(), *constants)[0]
        dy = gapped(normals(*y.shape, seed=1).to(DEVICE, dtype))
        expected = both_ways(reference, x.float(), dy.float(), constants)
        ours = both_ways(triton, x, dy, constants)
        assert [part.dtype for part in ours] == [dtype, dtype]
        torch.testing.assert_close([part.float() for part in ours], list(expected), rtol=ulp, atol=2e-6)


@ORDERS
def test_kept_are_the_input_and_one_byte_an_output(order):
    x = inputs(2, 6, 7, 8)
    y, *saved = block_kernels.relu_lrn_pool_forward(x, *block_constants(order))
    assert saved[0] is x
    assert (len(saved), saved[1].dtype, saved[1].numel()) == (2, torch.int8, y.numel())
    assert y.shape[-2:] == output_size((7, 8), (3, 3), (2, 2), (0, 0), True)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y, *saved = norm_kernels.local_response_norm_forward(x, *NORM, 2)
    assert len(saved) == 1
    assert saved[0] is x


def test_second_derivative_is_refused():
    assert_once_differentiable(lambda x: local_response_norm(x, *NORM, backend="triton"), inputs(1, 4, 3, 3))


def test_a_tower_too_long_for_a_program_is_refused():
    with pytest.raises(UserError, match="at most 2048 maps, not 2049: set backend=reference"):
        local_response_norm(inputs(1, 2049), 5, backend="triton")


# A bug planted inside a kernel needs the interpreter, which looks names up when it runs.
INSIDE = pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel is what it was")
competition = norm_kernels.competition
BUGS_INSIDE = {
    "no second term": lambda q, *_: q * 0,
    "window not reflected": lambda q, c, maps, before, after: competition(q, c, maps, after, before),
    "a neighbour too few": lambda q, c, maps, before, after: competition(q, c, maps, before - 1, after),
}


@INSIDE
@pytest.mark.parametrize("bug", BUGS_INSIDE)
def test_a_wrong_second_term_is_noticed(bug, monkeypatch):
    x, even = inputs(2, 12, 3, 4), (4, *NORM[1:])
    monkeypatch.setattr(norm_kernels, "competition", BUGS_INSIDE[bug])
    with pytest.raises(AssertionError):
        compare_norm(x, even, groups=2)
    for order in ("relu_lrn_pool", "lrn_pool_relu"):
        with pytest.raises(AssertionError):
            compare_block(x, order, norm=even, groups=2)


def test_a_norm_across_the_towers_is_noticed():
    forward, backward, _ = pair_for("local_response_norm", "triton")
    for wrong in (
        Pair(lambda x, *a: forward(x, *a[:-1], 1), backward),
        Pair(forward, lambda *a: backward(*a[:-1], 1)),
    ):
        with pytest.raises(AssertionError):
            compare_norm(inputs(2, 12, 3, 4), groups=2, kernels=wrong)


def wrong_blocks():
    forward, backward = block_kernels.relu_lrn_pool_forward, block_kernels.relu_lrn_pool_backward
    other = {"relu_lrn_pool": "lrn_pool_relu", "lrn_pool_relu": "relu_lrn_pool"}
    return {
        "forward across the towers": Pair(lambda x, n, *a: forward(x, n._replace(groups=1), *a), backward),
        "backward across the towers": Pair(
            forward, lambda dy, x, won, n, *a: backward(dy, x, won, n._replace(groups=1), *a)
        ),
        "winners off by one": Pair(forward, lambda dy, x, won, *a: backward(dy, x, won + 1, *a)),
        "the other order": Pair(forward, lambda *a: backward(*a[:-1], other[a[-1]])),
        "windows rounded down": Pair(
            lambda x, n, pool, order: forward(x, n, pool._replace(ceil_mode=False), order), backward
        ),
    }


@pytest.mark.slow
@ORDERS
@pytest.mark.parametrize("bug", wrong_blocks())
def test_a_wrong_block_is_noticed(bug, order):
    with pytest.raises((AssertionError, IndexError)):
        compare_block(inputs(2, 12, 6, 6), order, groups=2, kernels=wrong_blocks()[bug])
