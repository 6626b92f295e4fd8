"""Halves of the images: single images take turns as whole groups do."""

import numpy as np
import pytest

from cytosae_pipeline.report.measures.halves import halve_images
from cytosae_pipeline.statistics.halves import split_in_halves


@pytest.mark.parametrize("seed", [0, 7])
def test_images_alone_are_halved_as_groups_of_one(seed):
    labels = np.random.default_rng(seed).choice([0, 1, 3], 101, p=[0.7, 0.2, 0.1])
    compact = np.unique(labels, return_inverse=True)[1]
    expected = split_in_halves(np.arange(101), compact, seed=seed)
    assert np.array_equal(halve_images(labels, seed=seed), expected)
    for label in (0, 1, 3):
        assert abs(2 * expected[labels == label].sum() - (labels == label).sum()) <= 1


def test_no_images_have_no_halves():
    assert len(halve_images(np.zeros(0, np.int64), seed=0)) == 0
