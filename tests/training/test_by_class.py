"""Errors by class and calibration, against counts by hand."""

import numpy as np
import pytest
import torch

from alexnet.training.by_class import calibration, confusion_matrix, errors_by_class, table

NAMES = ["cat", "dog", "owl", "empty"]


def log_probs(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_a_confusion_matrix_has_the_truth_in_rows() -> None:
    p = log_probs([0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1], [0.1, 0.1, 0.7, 0.1])
    counts = confusion_matrix(p, np.array([0, 0, 1, 2]))
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_each_class_with_images_names_what_it_is_taken_for() -> None:
    counts = np.array([[4, 1, 3, 2], [0, 5, 0, 0], [9, 0, 1, 0], [0, 0, 0, 0]])
    cat, dog, owl = errors_by_class(counts, NAMES)
    assert (cat.n, cat.error, cat.taken_for) == (10, 0.6, [("owl", 3), ("empty", 2), ("dog", 1)])
    assert (dog.error, dog.taken_for) == (0.0, [])
    lines = table([cat, dog, owl]).splitlines()
    assert [line.split()[0] for line in lines] == ["class", "owl", "cat", "dog"]  # the worst first
    assert "90.0  cat (9)" in lines[1]


def test_calibration_error_by_hand() -> None:
    # Two images at .75, one right: |.5 - .75|; two at .55, both right: |1 - .55|.
    p = log_probs([0.75, 0.25], [0.75, 0.25], [0.55, 0.45], [0.45, 0.55])
    found = calibration(p, torch.tensor([0, 1, 0, 1]), bins=10)
    assert [(b.n, round(b.low, 1)) for b in found.bins] == [(2, 0.5), (2, 0.7)]
    assert found.ece == pytest.approx((2 * 0.25 + 2 * 0.45) / 4, abs=1e-6)


def test_labels_drawn_from_the_probabilities_are_calibrated() -> None:
    """40,000 images in 15 bins: the ECE of a calibrated network is noise, about .8 sqrt(p (1-p) / images in a bin)."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(40_000, 5, generator=generator).softmax(1)
    labels = torch.multinomial(p, 1, generator=generator)[:, 0]
    assert calibration(p.log(), labels).ece < 0.015
    sharper = p.log().mul(3).log_softmax(1)
    assert calibration(sharper, labels).ece > 0.2
