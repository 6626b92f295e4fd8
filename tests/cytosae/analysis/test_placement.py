"""New patients among reference patients: the correlation of the page, and its order."""

import numpy as np
import pytest

from cytosae.analysis.latents import correlate
from cytosae.analysis.placement import correlate_with, find_nearest


def test_correlation_is_that_of_one_cohort_and_of_numpy():
    rng = np.random.default_rng(0)
    new, reference = rng.poisson(2, (5, 40)) / 3, rng.poisson(2, (7, 40)) / 3
    found = correlate_with(new, reference)
    np.testing.assert_allclose(found, correlate(np.concatenate([new, reference]))[:5, 5:], rtol=1e-13)
    both = np.log1p(np.concatenate([new, reference]))
    np.testing.assert_allclose(found, np.corrcoef(both)[:5, 5:], rtol=1e-12)


def test_a_patient_without_variance_correlates_with_nobody():
    reference = np.arange(12.0).reshape(3, 4)
    assert correlate_with(np.full((1, 4), 2.0), reference).tolist() == [[0, 0, 0]]
    assert correlate_with(np.zeros((0, 4)), reference).shape == (0, 3)
    assert correlate_with(reference, np.zeros((0, 4))).shape == (3, 0)


def test_nearest_come_first_and_ties_by_index():
    found = find_nearest(np.array([[0.1, 0.9, 0.9, -1], [0, 0, 0, 0.0]]), 3)
    assert found.tolist() == [[1, 2, 0], [0, 1, 2]]
    assert find_nearest(np.zeros((2, 1)), 3).tolist() == [[0], [0]]


def test_errors():
    with pytest.raises(
        ValueError, match=r"counts must be \(Q, S\) and reference \(P, S\), found \(2, 3\) and \(2, 4\)"
    ):
        correlate_with(np.zeros((2, 3)), np.zeros((2, 4)))
