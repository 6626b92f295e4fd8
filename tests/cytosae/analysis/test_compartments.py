"""Shares of activation and average precision by compartment, against scikit-learn and Pillow."""

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import average_precision_score

from cytosae.analysis.compartments import compare_compartments, patch_shares


@pytest.mark.parametrize("levels", [4, 10_000])
def test_compartments_are_compared_as_scikit_learn_says(levels):
    rng = np.random.default_rng(levels)
    acts = np.maximum(rng.integers(-levels, levels, 500), 0).astype(np.float32) / levels
    shares = rng.dirichlet([0.3, 0.3, 0.3], 500).astype(np.float32)
    found = compare_compartments(acts, shares)
    for at in range(3):
        expected = average_precision_score(shares[:, at] >= 0.5, acts)
        assert found.precision[at] == pytest.approx(expected, abs=1e-12)
        assert found.inside[at] == (shares[:, at] >= 0.5).mean()
        weights = acts.astype(np.float64)
        assert found.share[at] == pytest.approx((weights * shares[:, at]).sum() / weights.sum(), abs=1e-12)
        assert found.area[at] == pytest.approx(shares[:, at].mean(dtype=np.float64), abs=1e-12)
    assert found.share.sum() == pytest.approx(1, abs=1e-6)


def test_what_is_not_defined_is_nan():
    shares = np.array([[1, 0], [1, 0]], np.float32)
    found = compare_compartments(np.zeros(2, np.float32), shares)
    assert np.isnan(found.share).all()
    assert found.precision[0] == 1
    assert np.isnan(found.precision[1])


@pytest.mark.parametrize("shape", [(15, 13), (32, 20), (100, 257)])
def test_masks_are_resized_as_pillow_does_to_the_nearest_pixel(shape):
    mask = np.random.default_rng(0).integers(0, 4, shape).astype(np.uint8)
    found = patch_shares(mask, (4, 2), 57, 2)
    resized = np.asarray(Image.fromarray(mask).resize((57, 57), Image.Resampling.NEAREST))
    for row in range(4):
        for column in range(2):
            patch = resized[14 * row : 14 * row + 14, 28 * column : 28 * column + 28]
            for value in range(3):
                assert found[2 * row + column, value] == pytest.approx((patch == value).mean())
    assert found.shape == (8, 3)
