"""Augmentation against slow, obvious versions, and its draws against their rules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torchvision.transforms.v2 import functional as tv

from alexnet.data.augment import (
    CHUNK,
    Augment,
    AugmentConfig,
    Colour,
    Crop,
    Draws,
    Flip,
    InputScale,
    augment_in_one_kernel,
    crop_starts,
    crops_at,
    draw_epoch,
    mirror,
    mirror_without_waiting,
    principal_colours,
    stream,
)
from alexnet.errors import UserError

PX, CROP = 13, 9
MARGIN = PX - CROP


def images_of(n: int, px: int = PX) -> Tensor:
    return torch.randint(
        0, 256, (n, px, px, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def statistics_of_random_pixels(px: int = PX) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(500, 3, generator=generator, dtype=torch.float64) @ torch.tensor(
        [[60.0, 55, 50], [5, -20, 9], [3, 2, -8]], dtype=torch.float64
    )
    return {
        "mean": 255 * torch.rand(px, px, 3, generator=generator),
        "channel_mean": torch.tensor([120.3, 110.7, 99.1], dtype=torch.float64),
        "covariance": mixed.T.cov(),
    }


def augment_of(**fields: Any) -> Augment:
    return Augment(AugmentConfig(crop_px=CROP, **fields), PX, statistics_of_random_pixels())


def draws_of(n: int, config: AugmentConfig, epoch: int = 0) -> Draws:
    return draw_epoch(config, torch.arange(n), PX, seed=5, epoch=epoch)


def slow(augment: Augment, image: Tensor, top: int, left: int, flip: bool, noise: Tensor | None) -> Tensor:
    """One image, pixel by pixel, in float64, by the text of the rule. noise (3,) or None -> (3, c, c)."""
    config, statistics = augment.config, statistics_of_random_pixels()
    half, out = MARGIN // 2, torch.empty(3, CROP, CROP, dtype=torch.float64)
    for row in range(CROP):
        for column in range(CROP):
            source = left + (CROP - 1 - column if flip else column)
            pixel = image[top + row, source].double()
            if config.input == InputScale.mean_image:  # the mean's centre crop, never moved or mirrored
                pixel = pixel - statistics["mean"][half + row, half + column]
            else:
                pixel = pixel - statistics["channel_mean"]
            if noise is not None:
                pixel = pixel + noise
                pixel = pixel / (1 + config.colour_std) if config.colour_divide else pixel
            if config.input == InputScale.normalised:
                pixel = pixel / statistics["covariance"].diagonal().sqrt()
            out[:, row, column] = pixel
    return out


def noise_by_the_formula(normals: Tensor, colour: Colour, std: float) -> Tensor:
    """Sum over i of p_i a_i s_i for one image, in float64, with p_i, l_i from `principal_colours`."""
    values, vectors = principal_colours(statistics_of_random_pixels()["covariance"])
    strength = {Colour.stdev: values**0.5, Colour.eigenvalue: values / 65025 * 255, Colour.literal: values}
    terms = [vectors[:, i] * normals[i].double() * std * strength[colour][i] for i in range(3)]
    return terms[0] + terms[1] + terms[2]


# One image at a time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(InputScale))
def test_crop_flip_and_mean_equal_the_slow_version(scale: InputScale) -> None:
    augment = augment_of(input=scale, colour=Colour.none)
    images, draws = images_of(20), draws_of(20, augment.config)
    assert draws.flip.any()
    assert not draws.flip.all()
    expected = torch.stack(
        [
            slow(augment, images[i], int(draws.top[i]), int(draws.left[i]), bool(draws.flip[i]), None)
            for i in range(20)
        ]
    )
    # one rounding of the mean and one of the difference (and of the quotient): 3 halves of 2^-24 x 255
    torch.testing.assert_close(augment(images, draws).double(), expected, rtol=1e-6, atol=3e-5)


@pytest.mark.parametrize("margin", [0, 4])
def test_crops_and_whole_images_are_told_apart_by_the_caller(margin: int) -> None:
    """Not by their shape, which is the same where the crop is the whole image."""
    augment = Augment(AugmentConfig(crop_px=CROP), CROP + margin, statistics_of_random_pixels(CROP + margin))
    images = images_of(20, CROP + margin)
    draws = draw_epoch(augment.config, torch.arange(20), CROP + margin, seed=5, epoch=0)
    starts = crop_starts(torch.arange(20), draws.top, draws.left, CROP + margin, CROP + margin)
    crops = crops_at(images, starts, CROP)
    assert torch.equal(augment(images, draws), augment.from_crops(crops, draws))
    with pytest.raises(ValueError, match=r"\(20, 10, 10, 3\) must be \(N, 9, 9, 3\)"):
        augment.from_crops(images_of(20, 10), draws)
    with pytest.raises(ValueError, match=rf"must be \(N, {CROP + margin}, {CROP + margin}, 3\)"):
        augment(images_of(20, CROP + margin - 1), draws)


def test_crops_are_cut_from_any_rows_up_to_the_last_byte() -> None:
    images = images_of(6)
    rows, top, left = torch.tensor([5, 0, 5, 2]), torch.tensor([4, 0, 1, 3]), torch.tensor([4, 0, 3, 1])
    expected = torch.stack(
        [
            images[r, y : y + CROP, x : x + CROP]
            for r, y, x in zip(rows.tolist(), top.tolist(), left.tolist(), strict=True)
        ]
    )
    out = torch.empty_like(expected)
    crops = crops_at(images, crop_starts(rows, top, left, PX, PX), CROP, out)
    assert torch.equal(out, expected)
    assert crops.data_ptr() == out.data_ptr()


def test_both_ways_to_mirror_are_one_and_leave_their_input_alone() -> None:
    images, flip = images_of(5), torch.tensor([True, False, True, True, False])
    before = images.clone()
    expected = torch.stack([i.flip(1) if f else i for i, f in zip(images, flip, strict=True)])
    for way in (mirror, mirror_without_waiting):
        assert torch.equal(way(images, flip), expected)
    assert torch.equal(images, before)


def test_crops_and_flips_copy_bytes_exactly() -> None:
    augment = Augment(AugmentConfig(crop_px=CROP, colour=Colour.none), PX)  # mean 0
    images, draws = images_of(20), draws_of(20, augment.config)
    out = augment(images, draws)
    for i in range(20):
        top, left = int(draws.top[i]), int(draws.left[i])
        crop = images[i, top : top + CROP, left : left + CROP]
        assert torch.equal(out[i].permute(1, 2, 0), (crop.flip(1) if draws.flip[i] else crop).float())


@pytest.mark.parametrize("colour", [Colour.stdev, Colour.eigenvalue, Colour.literal])
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("scale", list(InputScale))
def test_colour_noise_equals_the_slow_version(colour: Colour, divide: bool, scale: InputScale) -> None:
    augment = augment_of(input=scale, colour=colour, colour_divide=divide, colour_std=0.3)
    images, draws = images_of(4), draws_of(4, augment.config)
    out = augment(images, draws)
    for i in range(4):
        noise = noise_by_the_formula(draws.colour[i], colour, 0.3)
        expected = slow(augment, images[i], int(draws.top[i]), int(draws.left[i]), bool(draws.flip[i]), noise)
        largest = expected.abs().max().item()  # ten float32 roundings of terms up to the largest
        torch.testing.assert_close(out[i].double(), expected, rtol=0, atol=10 * 2**-24 * max(largest, 512))


@pytest.mark.parametrize("colour_on", [True, False])
def test_noise_and_division_stop_together(colour_on: bool) -> None:
    augment = augment_of(colour=Colour.stdev, colour_divide=True)
    still = augment_of(colour=Colour.none, colour_divide=True)
    images, draws = images_of(3), draws_of(3, augment.config)
    assert torch.equal(augment(images, draws, colour_on), still(images, draws)) is not colour_on


def test_noise_has_the_images_own_covariance_times_colour_std_squared() -> None:
    augment = augment_of(colour=Colour.stdev, colour_std=0.1)
    noise = augment.colour_noise(torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0)))
    expected = statistics_of_random_pixels()["covariance"] / 100
    torch.testing.assert_close(noise.double().T.cov(), expected, rtol=0.02, atol=0.02 * expected.max().item())


def test_principal_colours_diagonalise_and_fix_the_sign() -> None:
    covariance = statistics_of_random_pixels()["covariance"]
    values, vectors = principal_colours(covariance)
    assert values[0] > values[1] > values[2] > 0
    torch.testing.assert_close(covariance @ vectors, vectors * values)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3, dtype=torch.float64))
    assert (vectors.max(0).values == vectors.abs().max(0).values).all()


def test_input_is_channels_last_float32() -> None:
    augment = augment_of()
    out = augment(images_of(4), draws_of(4, augment.config))
    assert out.shape == (4, 3, CROP, CROP)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_cut_anywhere_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet.data.augment.SLAB", 7 * CROP * CROP * 3)  # slabs that divide neither batch
    augment = augment_of(colour=Colour.stdev, colour_divide=True)
    images, draws = images_of(45), draws_of(45, augment.config)
    whole = augment(images, draws)
    parts = [augment(images[a:b], draws.rows(a, b)) for a, b in ((0, 1), (1, 18), (18, 45))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.slow
@pytest.mark.parametrize("colour_on", [True, False])
@pytest.mark.parametrize("scale", list(InputScale))
def test_one_pass_gives_the_bits_of_several(scale: InputScale, colour_on: bool) -> None:
    """The same roundings in the same order; one graph for every batch but that of a single image."""
    several = augment_of(input=scale, colour=Colour.stdev, colour_divide=True)
    one = augment_of(input=scale, colour=Colour.stdev, colour_divide=True)
    one.in_one_pass = True
    images, draws = images_of(19), draws_of(19, one.config)
    torch.compiler.reset()
    counters.clear()
    for n in (19, 7, 2):
        part = images[:n], draws.rows(0, n), colour_on
        assert torch.equal(one(*part), several(*part))
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(one(images[:1], draws.rows(0, 1)), several(images[:1], draws.rows(0, 1)))


@pytest.mark.parametrize("colour_on", [True, False])
@pytest.mark.parametrize("scale", list(InputScale))
def test_the_one_kernel_of_a_gpu_computes_the_same_bits(scale: InputScale, colour_on: bool) -> None:
    """Its function, run on the CPU as it stands."""
    augment = augment_of(input=scale, colour=Colour.stdev, colour_divide=True, colour_std=0.3)
    crops, draws = images_of(9, CROP), draws_of(9, augment.config)
    out = augment_in_one_kernel(
        crops,
        draws.flip,
        draws.colour if colour_on else None,
        augment.mean,
        augment.std if scale == InputScale.normalised else None,
        1.3,
        (augment.eigenvalues, augment.eigenvectors, Colour.stdev, 0.3),
    )
    assert torch.equal(out.permute(0, 3, 1, 2), augment.from_crops(crops, draws, colour_on))


@pytest.mark.slow
def test_the_one_kernel_of_a_gpu_is_one_graph_for_every_batch() -> None:
    augment = augment_of(colour=Colour.stdev)
    crops, draws = images_of(19, CROP), draws_of(19, augment.config)
    torch.compiler.reset()
    counters.clear()
    for n in (19, 7, 2):
        part = draws.rows(0, n)
        out = augment._in_one_kernel(crops[:n], part.flip, part.colour)
        assert torch.equal(out, augment.from_crops(crops[:n], part))
        assert out.is_contiguous(memory_format=torch.channels_last)
    assert counters["stats"]["unique_graphs"] == 1


def test_non_contiguous_images_are_read_correctly() -> None:
    augment = augment_of()
    images = images_of(6)
    draws = draws_of(6, augment.config)
    assert torch.equal(augment(images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1), draws),
                       augment(images, draws))  # fmt: skip


# The views of a test image --------------------------------------------------------------------------------


def test_ten_views_are_torchvisions_ten_crops() -> None:
    augment = augment_of()
    images = images_of(3)
    mean = augment.mean.permute(2, 0, 1)
    crops = tv.ten_crop(images.permute(0, 3, 1, 2), [CROP, CROP])
    ours = [0, 1, 2, 3, 4, 6, 5, 8, 7, 9]  # torchvision crops the mirrored image; ours mirrors the crops
    expected = torch.stack([crops[i].float() - mean for i in ours], dim=1)
    assert torch.equal(augment.ten_views(images), expected)


def test_centre_is_the_fifth_view_and_the_mean_is_cut_like_it() -> None:
    augment = augment_of()
    images = images_of(3)
    assert torch.equal(augment.centre(images), augment.ten_views(images)[:, 4])
    half = MARGIN // 2
    assert torch.equal(augment.mean, statistics_of_random_pixels()["mean"][half:-half, half:-half].float())


@pytest.mark.parametrize("margin", [0, 1, 3])
def test_ten_views_fit_any_margin(margin: int) -> None:
    augment = Augment(AugmentConfig(crop_px=CROP), CROP + margin)
    images = images_of(2, CROP + margin)
    views = augment.ten_views(images)
    assert torch.equal(views[:, 3].permute(0, 2, 3, 1), images[:, margin:, margin:].float())
    assert torch.equal(views[:, 5:], views[:, :5].flip(-1))


# The draws ------------------------------------------------------------------------------------------------


def test_draws_follow_the_image_not_its_place() -> None:
    config = AugmentConfig(crop_px=CROP)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    by_place = draw_epoch(config, order, PX, seed=5, epoch=3)
    by_image = draw_epoch(config, torch.arange(100), PX, seed=5, epoch=3)
    for shuffled, table in zip(by_place, by_image, strict=True):
        assert torch.equal(shuffled, table[order])


def test_per_32_shares_crop_and_flip_by_place_but_not_colour() -> None:
    config = AugmentConfig(crop_px=CROP, crop=Crop.per_32, flip=Flip.per_32)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    draws = draw_epoch(config, order, PX, seed=5, epoch=0)
    for table in draws[:3]:
        first_of_its_chunk = table[torch.arange(400) // CHUNK * CHUNK]
        assert torch.equal(table, first_of_its_chunk)
        assert len(table[::CHUNK].unique()) > 1
    assert len(draws.colour.unique(dim=0)) == 400
    same_places = draw_epoch(config, torch.arange(400), PX, seed=5, epoch=0)
    assert torch.equal(draws.top, same_places.top)


def test_draws_change_with_epoch_and_with_seed_and_repeat() -> None:
    config, order = AugmentConfig(crop_px=CROP), torch.arange(200)
    first = draw_epoch(config, order, PX, seed=5, epoch=0)
    assert all(map(torch.equal, first, draw_epoch(config, order, PX, seed=5, epoch=0)))
    for seed, epoch in ((5, 1), (6, 0), (0, 5)):
        assert not any(map(torch.equal, first, draw_epoch(config, order, PX, seed=seed, epoch=epoch)))


def test_order_crop_flip_and_colour_are_streams_of_their_own() -> None:
    streams = [torch.rand(4, generator=stream(5, 0, what)) for what in ("order", "crop", "flip", "colour")]
    assert len(torch.stack(streams).unique()) == 16


def test_switching_one_draw_off_keeps_the_others() -> None:
    order = torch.arange(200)
    full = draw_epoch(AugmentConfig(crop_px=CROP), order, PX, seed=5, epoch=0)
    no_flip = draw_epoch(AugmentConfig(crop_px=CROP, flip=Flip.none), order, PX, seed=5, epoch=0)
    no_crop = draw_epoch(AugmentConfig(crop_px=CROP, crop=Crop.centre), order, PX, seed=5, epoch=0)
    assert not no_flip.flip.any()
    assert torch.equal(no_flip.top, full.top)
    assert (no_crop.top == MARGIN // 2).all()
    assert torch.equal(no_crop.flip, full.flip)
    assert torch.equal(no_crop.colour, full.colour)


def test_offsets_are_uniform_flips_are_fair_and_colours_are_normal() -> None:
    n = 50_000
    draws = draw_epoch(AugmentConfig(crop_px=CROP), torch.arange(n), PX, seed=0, epoch=0)
    cells = (draws.top * (MARGIN + 1) + draws.left).bincount(minlength=(MARGIN + 1) ** 2)
    expected = n / (MARGIN + 1) ** 2
    assert len(cells) == (MARGIN + 1) ** 2  # every offset 0..margin inclusive, nothing else
    chi2 = ((cells - expected) ** 2 / expected).sum().item()  # 24 degrees of freedom
    assert chi2 < 24 + 5 * math.sqrt(48)
    assert abs(draws.flip.float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)
    assert draws.colour.mean(0).abs().max() < 5 / math.sqrt(n)
    torch.testing.assert_close(draws.colour.T.cov(), torch.eye(3), rtol=0, atol=5 * math.sqrt(2 / n))


# Buffers and errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", list(InputScale))
def test_a_checkpoint_brings_the_statistics_along(scale: InputScale) -> None:
    trained = augment_of(input=scale, colour=Colour.stdev)
    restored = Augment(trained.config, PX)
    restored.load_state_dict(trained.state_dict())
    images, draws = images_of(3), draws_of(3, trained.config)
    assert torch.equal(restored(images, draws), trained(images, draws))
    assert set(trained.state_dict()) == {"mean", "std", "eigenvalues", "eigenvectors"}


def test_a_crop_that_does_not_fit_is_explained() -> None:
    with pytest.raises(UserError, match=r"augment\.crop_px=14 .* 13-pixel images: choose a network"):
        Augment(AugmentConfig(crop_px=14), PX)
