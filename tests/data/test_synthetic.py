"""The embedded set: ten classes that neither colour nor single pixels give away, the same on every call."""

import numpy as np
import pytest

from alexnet.data import synthetic
from alexnet.data.synthetic import CLASSES, blocks, draw, labels_of

PX = 64


def images_of(n: int, split: int, seed: int = 0) -> np.ndarray:
    return np.concatenate([images for _, images in blocks(n, PX, seed, split)])


@pytest.fixture(scope="module")
def train() -> np.ndarray:
    return images_of(1000, 0)


@pytest.fixture(scope="module")
def val() -> np.ndarray:
    return images_of(400, 1)


def linear_error(train_x: np.ndarray, val_x: np.ndarray) -> float:
    """The lowest error on val of a linear classifier (least squares, over a range of ridges)."""
    train_x, val_x = (_standard(x, train_x) for x in (train_x, val_x))
    targets = np.eye(10)[labels_of(len(train_x))]
    gram = train_x @ train_x.T
    scale = np.trace(gram) / len(gram)
    errors = []
    for ridge in (1e-4, 1e-2, 1.0, 10.0):
        dual = np.linalg.solve(gram + ridge * scale * np.eye(len(gram)), targets)
        guess = (val_x @ (train_x.T @ dual)).argmax(1)
        errors.append(float((guess != labels_of(len(val_x))).mean()))
    return min(errors)


def _standard(x: np.ndarray, reference: np.ndarray) -> np.ndarray:
    flat = (x.reshape(len(x), -1).astype(np.float32) - reference.mean(0).ravel()) / 64
    return np.concatenate([flat, np.ones((len(flat), 1), dtype=np.float32)], 1)


def test_mean_colour_does_not_tell_the_classes(train: np.ndarray, val: np.ndarray) -> None:
    assert linear_error(train.mean((1, 2)), val.mean((1, 2))) > 0.60


def test_single_pixels_do_not_tell_the_classes(train: np.ndarray, val: np.ndarray) -> None:
    assert linear_error(train, val) > 0.30


def test_the_linear_classifier_of_these_tests_can_learn(train: np.ndarray, val: np.ndarray) -> None:
    told = [x.copy() for x in (train, val)]
    for x in told:
        x[np.arange(len(x)), labels_of(len(x)), 0] = 255
    assert linear_error(*told) < 0.2


def test_the_same_seed_draws_the_same_images_however_many() -> None:
    few, many = images_of(synthetic.BLOCK, 0), images_of(3 * synthetic.BLOCK, 0)
    assert np.array_equal(few, many[: synthetic.BLOCK])
    assert np.array_equal(few, images_of(synthetic.BLOCK, 0))


@pytest.mark.parametrize(("split", "seed"), [(1, 0), (0, 1)])
def test_another_split_or_seed_draws_other_images(split: int, seed: int) -> None:
    other, first = images_of(64, split, seed).astype(int), images_of(64, 0).astype(int)
    assert np.abs(other - first).mean((1, 2, 3)).min() > 5


def test_classes_are_balanced() -> None:
    assert len(CLASSES) == 10
    assert np.bincount(labels_of(1007)).tolist() == [101] * 7 + [100] * 3


def drawn_alike(label: int) -> np.ndarray:
    """60 images of one class whose nuisances are those of every other class drawn by this function."""
    return draw(np.full(60, label), PX, np.random.default_rng(3)).astype(int)


@pytest.mark.parametrize("shape", range(5))
def test_the_textures_of_a_shape_differ_inside_its_outline_only(shape: int) -> None:
    changed = np.abs(drawn_alike(2 * shape) - drawn_alike(2 * shape + 1)).max(-1) > 0
    assert 0.03 < changed.mean() < 0.4
    assert not changed[:, [0, 0, -1, -1], [0, -1, 0, -1]].any()


def test_any_two_shapes_of_one_texture_differ_clearly() -> None:
    pictures = [drawn_alike(2 * shape) for shape in range(5)]
    for first in range(5):
        for second in range(first):
            changed = np.abs(pictures[first] - pictures[second]).max(-1) > 40
            assert changed.mean((1, 2)).min() > 0.015


@pytest.mark.parametrize("px", [32, 64, 96])
def test_every_size_shows_the_same_kind_of_picture(px: int) -> None:
    images = draw(labels_of(40), px, np.random.default_rng(0))
    assert images.shape == (40, px, px, 3)
    assert images.dtype == np.uint8
    assert 20 < images.std((1, 2)).mean() < 80
