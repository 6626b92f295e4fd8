"""Shuffled groups against scikit-learn's nested cross-validation, intervals against simulation, and calibration."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import cytosae.analysis.classification
from cytosae.analysis.classification import classify_groups
from cytosae.analysis.classification_chance import Chance, cross_validate, shuffle_groups
from cytosae.analysis.classification_quality import balanced_accuracy_interval, calibrate


@pytest.mark.parametrize(("sizes", "n_latents"), [((9, 9), 150), ((6, 10, 8), 200), ((3, 3), 40), ((2, 7), 5)])
def test_the_fast_cross_validation_is_that_of_the_page(sizes, n_latents, monkeypatch):
    # Both stop at the same minimum.
    exact = lambda **options: LogisticRegression(**(options | {"tol": 1e-10, "max_iter": 20_000}))  # noqa: E731
    monkeypatch.setattr(cytosae.analysis.classification, "LogisticRegression", exact)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        counts = rng.gamma(1.0, size=(len(groups), n_latents))
        counts[:, :4] *= 1 + groups[:, None]
        counts[:, 4] = 0
        page = classify_groups(counts, groups, list("abc")[: len(sizes)], seed=seed)
        assert cross_validate(np.log1p(counts), groups, seed=seed) == pytest.approx(page.balanced_accuracy, abs=1e-12)
        np.testing.assert_allclose(page.probability.sum(axis=1), 1)
        np.testing.assert_array_equal(page.probability.argmax(axis=1), page.predicted)


def test_noise_is_within_the_spread_and_a_difference_is_not():
    rng = np.random.default_rng(0)
    groups, counts = np.arange(24) % 2, rng.gamma(1.0, size=(24, 60))
    seen = []
    chance = shuffle_groups(counts, groups, n_shuffles=40, advance=lambda: seen.append(1))
    assert len(seen) == 40
    low, high = chance.spread()
    assert low < 0.5 < high
    observed = cross_validate(np.log1p(counts), groups)
    assert chance.p_value(observed) > 0.05
    counts[:, :5] *= 1 + 8 * groups[:, None]
    clear = shuffle_groups(counts, groups, n_shuffles=40)
    assert clear.p_value(cross_validate(np.log1p(counts), groups)) == pytest.approx(1 / 41)
    np.testing.assert_array_equal(
        clear.balanced_accuracy, shuffle_groups(counts, groups, n_shuffles=40).balanced_accuracy
    )


def test_three_against_three_of_noise_reach_anything():
    rng = np.random.default_rng(1)
    chance = shuffle_groups(rng.gamma(1.0, size=(6, 50)), np.arange(6) % 2, n_shuffles=60)
    low, high = chance.spread()
    assert low < 0.25
    assert high > 0.75
    assert Chance(np.array([0.5, 0.75, 1.0])).p_value(0.75) == pytest.approx(3 / 4)


def test_what_cannot_be_shuffled_is_refused():
    with pytest.raises(ValueError, match=r"n_shuffles at least 1, found \(4, 2\), \(4,\) and 0"):
        shuffle_groups(np.ones((4, 2)), np.arange(4) % 2, n_shuffles=0)
    assert cross_validate(np.ones((3, 2)), np.array([0, 0, 1])) is None


@pytest.mark.parametrize("confusion", [[[3, 0], [0, 3]], [[9, 3], [5, 7]], [[4, 1, 0], [2, 10, 3], [0, 0, 6]]])
def test_the_interval_is_that_of_independent_accuracies(confusion):
    confusion = np.array(confusion)
    rng = np.random.default_rng(0)
    right, sizes = np.diag(confusion), confusion.sum(axis=1)
    drawn = rng.beta(right + 1, sizes - right + 1, (200_000, len(confusion))).mean(axis=1)
    for level in (0.95, 0.5):
        expected = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
        np.testing.assert_allclose(balanced_accuracy_interval(confusion, level), expected, atol=0.004)


def test_calibration_has_bins_of_equal_numbers():
    rng = np.random.default_rng(2)
    first = rng.uniform(0.02, 0.98, 4000)
    groups = (rng.random(4000) >= first).astype(int)
    found = calibrate(np.stack([first, 1 - first], axis=1), groups)
    assert found.n_subjects.tolist() == [800] * 5
    np.testing.assert_allclose(found.right, found.predicted, atol=0.06)
    expected = np.mean((first - (groups == 0)) ** 2 + (1 - first - (groups == 1)) ** 2)
    assert found.brier == pytest.approx(expected)
    few = calibrate(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]), np.array([0, 1, 1]))
    assert few.n_subjects.tolist() == [3]
    assert few.right.tolist() == [pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match=r"probability must be \(P, G\) and groups \(P,\), found \(2, 2\) and \(3,\)"):
        calibrate(np.ones((2, 2)), np.zeros(3, dtype=int))
