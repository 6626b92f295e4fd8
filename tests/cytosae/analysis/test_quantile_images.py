"""Images at quantiles: against a plain sort, with ties, few images, and nothing active."""

import numpy as np
import pytest

from cytosae.analysis.quantile_images import images_at_quantiles

QUANTILES = (0.9, 0.5, 0.0)


def plain(scores, quantile, n):
    """The same by sorting tuples."""
    falling = sorted((-float(score), place) for place, score in enumerate(scores) if score > 0)
    value = np.quantile([-score for score, _ in falling], quantile, method="inverted_cdf")
    # Of equals at the quantile, the one whose rank from below is the quantile's.
    m = len(falling)
    rank = m - max(int(np.ceil(quantile * m - 1e-9)), 1)
    assert -falling[rank][0] == value
    first = min(max(rank - n // 2, 0), max(m - n, 0))
    return value, [place for _, place in falling[first : first + n]]


@pytest.mark.parametrize("levels", [5, 1000])
def test_images_are_those_of_a_plain_sort(levels):
    rng = np.random.default_rng(levels)
    for n_images in (1, 2, 3, 7, 10, 100, 333):
        scores = (rng.integers(0, levels, n_images) / levels).astype(np.float32)
        for n in (1, 3, 4):
            found = images_at_quantiles(scores, QUANTILES, n)
            assert bool(found) == bool((scores > 0).any())
            for one in found:
                value, places = plain(scores, one.quantile, n)
                assert one.value == np.float32(value)
                assert one.places.tolist() == places
                assert np.array_equal(one.scores, scores[places])


def test_the_smallest_scores_are_above_zero_and_equals_come_by_place():
    scores = np.array([0, 2, 1, 1, 0, 1, 3], np.float32)
    low = images_at_quantiles(scores, [0.0], 2)[0]
    assert low.value == 1
    assert low.places.tolist() == [3, 5]
    assert images_at_quantiles(np.zeros(4, np.float32), QUANTILES, 3) == []


def test_the_order_of_the_images_does_not_decide_between_different_scores():
    rng = np.random.default_rng(0)
    scores = rng.permutation(np.arange(1, 101)).astype(np.float32)
    order = rng.permutation(100)
    for one, other in zip(
        images_at_quantiles(scores, QUANTILES, 3), images_at_quantiles(scores[order], QUANTILES, 3), strict=True
    ):
        assert np.array_equal(one.places, order[other.places])
    assert [one.value for one in images_at_quantiles(scores, QUANTILES, 3)] == [90, 50, 1]
