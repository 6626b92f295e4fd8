"""Kappas against scikit-learn's, and against sums made by hand."""

import math

import numpy as np
import pytest
from sklearn.metrics import cohen_kappa_score

from cytosae.analysis.agreement import cohen_kappa, fleiss_kappa


@pytest.mark.parametrize("weights", ["none", "quadratic"])
@pytest.mark.parametrize("n", [1, 2, 7, 60, 1001])
def test_cohens_kappa_is_that_of_scikit_learn(n, weights):
    rng = np.random.default_rng(n)
    for n_categories in (2, 3, 5):
        first = rng.integers(n_categories, size=n)
        second = np.where(rng.random(n) < 0.6, first, rng.integers(n_categories, size=n))
        if len(set(first) | set(second)) < 2:
            continue
        expected = cohen_kappa_score(
            first, second, labels=range(n_categories), weights=None if weights == "none" else weights
        )
        assert cohen_kappa(first, second, n_categories, weights=weights) == pytest.approx(expected, abs=1e-12)


def test_cohens_kappa_by_hand():
    # 20 items: 9 + 6 agree, 3 and 2 do not. p_o = 15/20; p_e = (12/20)(11/20) + (8/20)(9/20) = 204/400.
    first = [1] * 12 + [0] * 8
    second = [1] * 9 + [0] * 3 + [1] * 2 + [0] * 6
    assert cohen_kappa(first, second, 2) == pytest.approx((15 / 20 - 204 / 400) / (1 - 204 / 400))
    assert cohen_kappa(first, second, 2, weights="quadratic") == pytest.approx(cohen_kappa(first, second, 2))


def test_fleiss_kappa_by_hand():
    # Four items, three raters, three categories. Agreeing pairs of 3: 3, 1, 0, 3; so P = 7/12.
    # Of 12 ratings 6 are category 0, 2 category 1 and 4 category 2: Pe = (36 + 4 + 16) / 144 = 56/144.
    ratings = [[0, 0, 0], [0, 1, 0], [0, 1, 2], [2, 2, 2]]

    assert fleiss_kappa(ratings, 3) == pytest.approx((7 / 12 - 56 / 144) / (1 - 56 / 144))


def test_fleiss_kappa_of_two_raters_with_equal_shares_is_cohens():
    first, second = [0, 0, 1, 1, 2, 2], [0, 1, 1, 0, 2, 2]
    assert fleiss_kappa(np.stack([first, second], axis=1), 3) == pytest.approx(cohen_kappa(first, second, 3))


def test_agreement_that_is_full_by_chance_is_not_defined():
    assert math.isnan(cohen_kappa([1, 1], [1, 1], 3))
    assert math.isnan(cohen_kappa([], [], 3))
    assert math.isnan(fleiss_kappa([[1, 1], [1, 1]], 3))
    assert math.isnan(fleiss_kappa(np.zeros((0, 3)), 3))
    assert cohen_kappa([0, 1, 2], [0, 1, 2], 3) == 1
    assert fleiss_kappa([[0, 0], [1, 1]], 2) == 1


def test_wrong_shapes_and_categories_are_refused():
    with pytest.raises(ValueError, match=r"first and second must be \(n,\), found \(2,\) and \(3,\)"):
        cohen_kappa([0, 1], [0, 1, 1], 2)
    with pytest.raises(ValueError, match=r"categories must lie in 0..1, found 0 to 2"):
        cohen_kappa([0, 1], [0, 2], 2)
    with pytest.raises(ValueError, match=r"at least two raters, found \(2, 1\)"):
        fleiss_kappa([[0], [1]], 2)
