"""Shares of a latent's activity, and when it is of one patient."""

import numpy as np

from cytosae.analysis.shares import largest_shares


def test_the_largest_share_of_each_latent():
    counts = np.array([[6, 0, 5, 1], [2, 0, 5, 1], [2, 0, 0, 8]])
    found = largest_shares(counts, np.array([10, 10, 80]))
    assert found.source.tolist() == [0, -1, 0, 2]
    np.testing.assert_allclose(found.share, [0.6, 0, 0.5, 0.8])
    # The third has exactly half, the fourth is of a patient with as large a share of the images.
    assert found.is_one.tolist() == [True, False, False, False]


def test_a_share_must_be_at_least_twice_that_of_the_images():
    counts = np.array([[8], [2]])
    assert largest_shares(counts, np.array([40, 60])).is_one.tolist() == [True]
    assert largest_shares(counts, np.array([41, 59])).is_one.tolist() == [False]


def test_without_patients_there_is_no_share():
    found = largest_shares(np.zeros((0, 3), np.int64), np.zeros(0, np.int64))
    assert found.source.tolist() == [-1, -1, -1]
    assert not found.is_one.any()
