import math

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
from alexnet.layers import Dropout, dropout, dropout_key, dropout_mask
from alexnet.layers.dropout import WORD, mix

X = normals(8, 16)
KEY = dropout_key(seed=1, step=2, layer=3)
SIGMAS = 5  # keys are fixed, so a bound that holds once holds always


def drop(p=0.3, mode="inverted", key=KEY):
    return lambda x, backend="reference": dropout(x, p, key=key, mode=mode, backend=backend)


@pytest.mark.parametrize("mode", ["inverted", "mask_only"])
@pytest.mark.parametrize("shape", [(8, 16), (1, 16), (4, 3, 5, 2), (7,)])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_matches_native(mode, shape, p):
    assert_matches_native(drop(p, mode), normals(*shape))


@pytest.mark.parametrize(("mode", "scale"), [("inverted", 1 / 0.7), ("mask_only", 1.0)])
def test_forward_and_gradient_are_the_scaled_mask(mode, scale):
    y, (dx,) = outcome(drop(0.3, mode), X)
    mask = dropout_mask(X.shape, 0.3, KEY) * scale
    torch.testing.assert_close(y, mask * X)
    torch.testing.assert_close(dx, mask * normals(*X.shape, seed=1))


def test_gradient_against_finite_differences():
    assert torch.autograd.gradcheck(drop(), X.clone().requires_grad_())


def test_layout_does_not_matter():
    assert_layouts_agree(drop(), normals(4, 3, 5, 2))


def test_every_term_matters():
    wrong = {
        "no mask": lambda dy, keep, p, first_row, scale: dy * scale,
        "no scale": lambda dy, keep, p, first_row, scale: dy * keep,
        "the mask of the dropped": lambda dy, keep, p, first_row, scale: dy * ~keep * scale,
        "another mask": lambda dy, keep, p, first_row, scale: dy * keep.roll(1) * scale,
    }
    assert_wrong_gradients_are_noticed("dropout", wrong, lambda: assert_matches_native(drop(), X))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_at_test_time_inverted_does_nothing_and_mask_only_scales(backend):
    options = {"training": False, "backend": backend}
    torch.testing.assert_close(dropout(X, 0.3, mode="inverted", **options), X)
    torch.testing.assert_close(dropout(X, 0.3, mode="mask_only", **options), 0.7 * X)


def test_both_modes_train_alike_with_the_rates_of_the_docstring():
    """Mask-only with (W, rate, decay) is inverted with (W/2, rate/4, 4 decay) at p = 1/2."""

    def train(mode, weights, rate, decay):
        outputs = []
        for step in range(4):
            weights.requires_grad_()
            y = dropout(X, 0.5, key=dropout_key(0, step, 6), mode=mode) @ weights
            outputs.append(y.detach())
            (gradient,) = torch.autograd.grad(y.square().mean(), weights)
            weights = (weights - rate * (gradient + decay * weights)).detach()
        return outputs

    start = normals(16, 3, seed=4)
    expected = train("mask_only", start, 0.1, 0.05)
    torch.testing.assert_close(train("inverted", start / 2, 0.1 / 4, 0.05 * 4), expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(train("inverted", start / 2, 0.1, 0.05), expected)


# The mask as a random sample. Bounds are SIGMAS standard deviations of the statistic under independence.


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("key", [0, 1, KEY])
def test_share_kept(p, key):
    shape = (512, 2048)
    share = dropout_mask(shape, p, key).double().mean().item()
    assert abs(share - (1 - p)) < SIGMAS * math.sqrt(p * (1 - p) / math.prod(shape))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("key", [0, KEY])
def test_sums_of_rows_and_units_vary_as_binomials(dim, key):
    mask, p = dropout_mask((1024, 1024), 0.5, key).double(), 0.5
    chi_square = ((mask.sum(dim) - 1024 * (1 - p)) ** 2 / (1024 * p * (1 - p))).sum().item()
    assert abs(chi_square - 1024) < SIGMAS * math.sqrt(2 * 1024)


def correlation(first, second):
    return torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1].item()


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 16, 32, 64, 128, 256])
def test_neighbouring_units_and_rows_are_uncorrelated(lag):
    mask = dropout_mask((512, 512), 0.5, KEY)
    bound = SIGMAS / math.sqrt(512 * (512 - lag))
    assert abs(correlation(mask[:, lag:], mask[:, :-lag])) < bound
    assert abs(correlation(mask[lag:], mask[:-lag])) < bound
    assert abs(correlation(mask[lag:, lag:], mask[:-lag, :-lag])) < SIGMAS / (512 - lag)
    assert abs(correlation(mask[lag:, :-lag], mask[:-lag, lag:])) < SIGMAS / (512 - lag)


@pytest.mark.parametrize("bit", [*range(0, 63, 7), 31, 32])
def test_neighbouring_keys_are_uncorrelated(bit):
    masks = [dropout_mask((512, 512), 0.5, key) for key in (KEY, KEY + 1, KEY ^ (1 << bit))]
    assert abs(correlation(masks[0], masks[1])) < SIGMAS / 512
    assert abs(correlation(masks[0], masks[2])) < SIGMAS / 512


def test_layers_steps_and_seeds_have_masks_of_their_own():
    words = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1 << 32, 0, 0), (0, 1 << 32, 0), (-1, 0, 0)]
    keys = [dropout_key(*word) for word in words]
    assert all(0 <= key < 1 << 63 for key in keys)
    masks = [dropout_mask((512, 512), 0.5, key) for key in keys]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert abs(correlation(first, second)) < SIGMAS / 512


def test_every_bit_of_the_hash_depends_on_every_bit():
    words = torch.randint(WORD, (4096,), generator=torch.Generator().manual_seed(0))
    bits = torch.arange(32)
    for bit in range(32):
        flipped = (mix(words) ^ mix(words ^ (1 << bit)))[:, None] >> bits & 1
        share = flipped.double().mean(0)
        assert (share - 0.5).abs().max() < 6 * math.sqrt(0.25 / 4096)  # 1,024 comparisons: 6, not 5


def test_the_hash_is_the_documented_one_in_unsigned_words():
    def literal(h):
        h = (h + 0x9E3779B9) % 2**32
        h = (h ^ (h >> 16)) * 0x7FEB352D % 2**32
        h = (h ^ (h >> 15)) * 0x846CA68B % 2**32
        return h ^ (h >> 16)

    words = [0, 1, 2, 0x7FFFFFFF, 0x80000000, WORD, 123456789, 0xDEADBEEF]
    assert [mix(word) for word in words] == [literal(word) for word in words]
    assert mix(torch.tensor(words)).tolist() == [literal(word) for word in words]
    for r, u in ((0, 0), (3, 5), (70, 1)):
        row = literal(literal(literal(KEY & WORD) ^ KEY >> 32) ^ r)
        kept = literal(row ^ literal(u)) >= 0.3 * 2**32
        assert dropout_mask((71, 6), 0.3, KEY)[r, u].item() is kept


def test_masks_are_those_of_earlier_versions():
    """A resumed run must repeat its masks: these bits may never change."""
    assert dropout_key(1, 2, 3) == 2495690234699860299
    kept = ["".join(map(str, row)) for row in dropout_mask((2, 16), 0.5, 42).int().tolist()]
    assert kept == ["1111000010100111", "0111001101111110"]


# The mask as a rule.


@pytest.mark.parametrize("key", [7, KEY, torch.tensor(KEY)])
def test_a_slice_of_the_batch_has_its_rows_of_the_mask(key):
    whole = dropout_mask((10, 3, 4), 0.5, key)
    assert torch.equal(whole[4:9], dropout_mask((5, 3, 4), 0.5, key, first_row=4))
    x = normals(10, 3, 4)
    part = dropout(x[4:9], 0.5, key=key, first_row=4)
    torch.testing.assert_close(part, dropout(x, 0.5, key=key)[4:9])


@pytest.mark.parametrize("key", [0, KEY, -5])
def test_an_int_and_a_tensor_are_the_same_key(key):
    assert torch.equal(dropout_mask((4, 9), 0.5, key), dropout_mask((4, 9), 0.5, torch.tensor(key)))


def test_the_shape_does_not_change_the_mask():
    assert torch.equal(dropout_mask((4, 6), 0.5, KEY), dropout_mask((4, 2, 3), 0.5, KEY).flatten(1))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_without_a_key_torch_seeds_the_mask(backend):
    torch.manual_seed(3)
    first, second = (dropout(X, backend=backend) for _ in range(2))
    torch.manual_seed(3)
    torch.testing.assert_close(dropout(X, backend=backend), first)
    assert not torch.equal(first, second)


@COMPILES
def test_a_new_key_does_not_compile_again():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(lambda x, key: dropout(x, 0.5, key=key), backend=counter, fullgraph=True)
    for key in (1, 2, KEY):
        torch.testing.assert_close(compiled(X, torch.tensor(key)), dropout(X, 0.5, key=key))
    assert counter.frame_count == 1


def test_mean_is_kept():
    ones = torch.ones(64, 4096)
    assert abs(dropout(ones, 0.3, key=KEY).mean().item() - 1) < SIGMAS * math.sqrt(0.3 / 0.7 / ones.numel())


def test_p_of_one_drops_everything_as_torch_does():
    torch.testing.assert_close(dropout(X, 1.0, key=KEY), F.dropout(X, 1.0))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_kept_and_rounded_once(autocast):
    x = X.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, (dx,) = outcome(drop(), x)
    mask = dropout_mask(X.shape, 0.3, KEY)
    assert torch.equal(y, (mask * x.float() * (1 / 0.7)).bfloat16())
    assert torch.equal(dx, (mask * normals(*X.shape, seed=1).bfloat16().float() * (1 / 0.7)).bfloat16())


@COMPILES
def test_module_copies_pickles_compiles_and_prints():
    module = Dropout(0.3, mode="mask_only")
    assert_module_travels(module, X, torch.tensor(KEY))
    assert repr(module) == "Dropout(p=0.3, mode=mask_only, backend=reference)"
    torch.testing.assert_close(
        module(X, KEY, first_row=2), dropout(X, 0.3, key=KEY, first_row=2, mode="mask_only")
    )
    torch.testing.assert_close(module.eval()(X), 0.7 * X)


def test_second_derivative_is_refused():
    assert_once_differentiable(drop(), X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p=1.5 must be in .0, 1."),
        ({"mode": "alpha"}, "mode='alpha' must be one of inverted, mask_only"),
        ({"inplace": True}, "inplace=True must be False"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Dropout(**options)
    with pytest.raises(UserError, match=message):
        dropout(X, **options)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_nan_stays_one_though_its_unit_is_dropped(p):
    x = torch.full((4, 8), float("nan"))
    assert dropout(x, p, key=KEY).isnan().all()


def test_the_layout_is_kept():
    x = torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert dropout(x, key=KEY).is_contiguous(memory_format=torch.channels_last)


def test_p_of_zero_is_an_operation_like_any_other():
    """A tensor of its own, in the graph, whose backward runs once."""
    x = X.clone().requires_grad_()
    y = dropout(x, 0.0)
    assert y is not x
    assert torch.equal(y, x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_attributes_that_are_set_later_count():
    module = Dropout()
    module.inplace = True
    with pytest.raises(UserError, match="inplace=True"):
        module(X)
