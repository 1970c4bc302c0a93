"""Pictures: the numbers that go into them, and that each one is written."""

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet.pages.figures import (
    Curve,
    curves_figure,
    kernel_grid,
    kernels_figure,
    neighbours_figure,
    predictions_figure,
    training_figure,
)


def curves_of(quantity):
    return {"train": ([0.5, 1, 1.5, 2], [21, 41, 61, 81]), "holdout": ([1, 2], [0, 2])}


def test_no_epoch_done_is_an_empty_plot(tmp_path):
    path = training_figure(lambda quantity: {}, torch.randn(4, 3, 5, 5), tmp_path / "run.png")
    assert path.stat().st_size > 0


def test_kernels_stand_in_rows_with_white_between():
    weight = torch.rand(5, 3, 2, 4)
    picture = kernel_grid(weight, per_row=3)
    assert picture.shape == (2 * 3 + 1, 3 * 5 + 1, 3)
    np.testing.assert_array_equal(picture[4:6, 6:10], weight[4].permute(1, 2, 0))
    assert (picture[:, 5] == 1).all()  # between the first and the second kernel
    assert (picture[4:6, 11:] == 1).all()  # there is no sixth


def test_all_kernels_share_one_scale(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "alexnet.pages.figures.kernel_grid", lambda w, per_row: drawn.append(w) or np.zeros((2, 2, 3))
    )
    weight = torch.randn(8, 3, 5, 5)
    weight[:4] *= 0.1
    kernels_figure(weight, tmp_path / "kernels.png", towers=2)
    expected = (weight - weight.min()) / (weight.max() - weight.min())
    assert [len(part) for part in drawn] == [4, 4]
    torch.testing.assert_close(torch.cat(drawn), expected)


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_same_numbers_give_the_same_file(tmp_path, suffix):
    weight = torch.randn(8, 3, 5, 5)
    paths = [training_figure(curves_of, weight, tmp_path / f"{i}.{suffix}", towers=2) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_every_figure_is_written(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3)).astype(np.uint8)
    p = torch.rand(3, 7).softmax(1)
    bands = {"ReLU": Curve([0, 1], [3, 2], [2, 1], [4, 3]), "tanh": Curve([0, 1], [3, 3], style="--")}
    near = np.stack([images] * 3)
    paths = [
        curves_figure(bands, tmp_path / "deep" / "curves.png", level=2.5),
        predictions_figure(images, p, [0, 6, 3], ["cat, feline", "x" * 40, *"cdefg"], tmp_path / "p.png"),
        neighbours_figure(images, near, tmp_path / "n.png", agree=np.eye(3, dtype=bool)),
        neighbours_figure(images[:1], near[:1], tmp_path / "one.png"),
    ]
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 100
            assert len(set(picture.convert("L").tobytes())) > 2  # something was drawn
