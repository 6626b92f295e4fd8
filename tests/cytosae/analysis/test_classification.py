"""Nested classification: planted groups are found, noise is not, and no patient is on both sides of a split."""

import numpy as np
import pytest
from sklearn.feature_selection import f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cytosae.analysis.classification import (
    DEFAULT_SETTING,
    SETTINGS,
    classify_groups,
    predict_groups,
    variance_share,
)


def _noise(n_rows: int, n_latents: int, seed: int) -> np.ndarray:
    """Counts of patients that are independent of their groups, most of them tied at zero."""
    return np.random.default_rng(seed).poisson(0.7, (n_rows, n_latents)) / 50


def _planted(n_rows: int, n_groups: int, n_latents: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Counts in which latents `10 g` and `10 g + 1` are high in group g."""
    counts = _noise(n_rows, n_latents, seed)
    groups = np.random.default_rng(seed + 1).permutation(np.arange(n_rows) % n_groups)
    for group in range(n_groups):
        counts[np.ix_(groups == group, [10 * group, 10 * group + 1])] += 0.1
    return counts, groups


def test_a_small_group_is_not_sacrificed_to_a_large_one():
    counts = _noise(128, 400, seed=3)
    groups = np.random.default_rng(4).permutation(np.arange(128) < 8).astype(np.int64)
    counts[np.ix_(groups == 1, [3, 4, 5, 6])] += 0.04
    result = classify_groups(counts, groups, ["many", "few"])
    assert result.balanced_accuracy > 0.8
    assert result.chance == 120 / 128


@pytest.mark.parametrize("n_groups", [2, 3, 4])
def test_planted_groups_and_latents_are_found(n_groups):
    counts, groups = _planted(36, n_groups)
    result = classify_groups(counts, groups, list("abcd"[:n_groups]))
    assert result.accuracy >= 0.95
    assert result.balanced_accuracy >= 0.95
    assert result.chance == pytest.approx(1 / n_groups)
    planted = {10 * group + other for group in range(n_groups) for other in (0, 1)}
    assert planted <= set(result.latents.tolist())
    for place, latent in enumerate(result.latents):
        if latent in planted:
            assert result.latent_share[place] == 1
            assert result.latent_weight[place].argmax() == latent // 10
    assert set(result.latents[: len(planted)]) == planted


def test_the_fields_of_a_result_agree():
    counts, groups = _planted(31, 3, seed=4)
    counts[:, :25] = _noise(31, 25, seed=5)
    counts[:, 0] += 0.02 * (groups == 0)
    result = classify_groups(counts, groups, list("abc"))
    assert result.confusion.shape == (3, 3)
    np.testing.assert_array_equal(result.confusion.sum(axis=1), np.bincount(groups))
    np.testing.assert_array_equal(result.confusion.sum(axis=0), np.bincount(result.predicted, minlength=3))
    assert result.accuracy == pytest.approx((result.predicted == groups).mean())
    recalls = [(result.predicted[groups == group] == group).mean() for group in range(3)]
    assert result.balanced_accuracy == pytest.approx(np.mean(recalls))
    assert result.chance == np.bincount(groups).max() / 31
    assert set(result.fold) == set(range(5))
    assert len(result.settings) == 5
    assert set(result.settings) <= set(SETTINGS)
    assert (np.diff(result.latent_share) <= 0).all()
    assert result.latent_share.min(initial=1) > 0.5
    assert result.latent_weight.shape == (len(result.latents), 3)
    np.testing.assert_allclose(result.latent_weight.sum(axis=1), 0, atol=1e-6)
    assert [array.dtype for array in (result.confusion, result.predicted, result.fold, result.latents)] == [
        np.int64
    ] * 4


def test_random_labels_are_not_predicted():
    """Selection outside the folds would separate noise: tested as well, which shows that this test can fail."""
    honest, leaking = [], []
    for seed in range(6):
        counts = _noise(40, 3000, seed)
        groups = np.random.default_rng(100 + seed).permutation(np.arange(40) % 2)
        honest.append(classify_groups(counts, groups, ["a", "b"], seed=seed).accuracy)
        features = np.log1p(counts)
        best = np.argsort(variance_share(features, groups))[-32:]
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1))
        leaking.append(cross_val_score(model, features[:, best], groups, cv=5).mean())
    assert np.mean(leaking) > 0.8
    assert 0.35 < np.mean(honest) < 0.6


def test_rows_of_a_patient_stay_together():
    rng = np.random.default_rng(6)
    patients = np.repeat(np.array([f"P{number}" for number in range(16)]), rng.integers(1, 6, 16))
    groups = np.unique(patients, return_inverse=True)[1] % 2
    counts = _noise(len(groups), 300, seed=7)
    result = classify_groups(counts, groups, ["a", "b"], patients=patients)
    assert len(set(result.fold)) == 5
    for patient in set(patients):
        assert len(set(result.fold[patients == patient])) == 1


def test_splitting_rows_of_a_patient_would_leak():
    """Rows of one patient are similar, so a split by rows recognises patients even if their groups are meaningless."""
    patients = np.repeat(np.arange(12), 5)
    groups = np.random.default_rng(8).permutation(np.arange(12) % 2)[patients]
    counts = _noise(12, 300, seed=9)[patients] + _noise(60, 300, seed=10) / 10
    together = classify_groups(counts, groups, ["a", "b"], patients=patients).accuracy
    apart = classify_groups(counts, groups, ["a", "b"]).accuracy
    assert apart > 0.95
    assert together < 0.75


def test_the_same_seed_gives_the_same_result():
    counts, groups = _noise(30, 200, seed=11), np.arange(30) % 3
    one, again = (classify_groups(counts, groups, list("abc"), seed=3) for _ in range(2))
    for left, right in zip(one, again, strict=True):
        np.testing.assert_array_equal(left, right)
    assert (classify_groups(counts, groups, list("abc"), seed=4).fold != one.fold).any()


@pytest.mark.parametrize(("smallest", "n_folds"), [(2, 2), (3, 3), (4, 4), (9, 5)])
def test_the_number_of_folds_is_limited_by_the_smallest_group(smallest, n_folds):
    counts, _ = _planted(20 + smallest, 2)
    groups = (np.arange(20 + smallest) < smallest).astype(np.int64)
    counts[groups == 1, 33] += 1
    result = classify_groups(counts, groups, ["many", "few"])
    assert result.fold.max() == n_folds - 1
    for number in range(n_folds):
        assert set(groups[result.fold == number]) == {0, 1}
    assert (set(result.settings) == {DEFAULT_SETTING}) == (smallest == 2)
    assert 33 in result.latents


@pytest.mark.parametrize("n_latents", [1, 5, 40])
def test_few_latents(n_latents):
    counts, groups = _planted(24, 2)
    result = classify_groups(counts[:, :n_latents], groups, ["a", "b"])
    assert result.accuracy > 0.9
    assert {setting.n_latents for setting in result.settings} <= {min(n, n_latents) for n in (8, 32, 128)}


def test_constant_latents_are_never_reported():
    groups = np.arange(20) % 2
    counts = np.full((20, 50), 0.1)
    nothing = classify_groups(counts, groups, ["a", "b"])
    assert len(nothing.latents) == 0
    assert nothing.latent_weight.shape == (0, 2)
    counts[:, 7] = groups
    assert classify_groups(counts, groups, ["a", "b"]).latents.tolist() == [7]


def test_variance_share_has_the_order_of_f():
    features, groups = _planted(30, 3)
    f, _ = f_classif(features, groups)
    share = variance_share(features, groups)
    np.testing.assert_allclose(share / (1 - share) * (30 - 3) / (3 - 1), f, rtol=1e-9, atol=1e-12)
    edge = np.stack([np.full(30, 0.1), groups / 3], axis=1)
    np.testing.assert_allclose(variance_share(edge, groups), [0, 1])


def test_errors():
    counts, groups = _noise(6, 4, seed=0), np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="at least 2 patients in each group: 'AML' has 5, 'healthy' has 1"):
        classify_groups(counts, np.array([0, 0, 0, 0, 0, 1]), ["AML", "healthy"])
    with pytest.raises(ValueError, match="'AML' has 3, 'healthy' has 1"):
        classify_groups(counts, groups, ["AML", "healthy"], patients=np.array(list("abcddd")))
    with pytest.raises(ValueError, match="'c' has 0"):
        classify_groups(counts, groups, ["a", "b", "c"])
    with pytest.raises(ValueError, match="whole numbers from 0 to 1"):
        classify_groups(counts, groups - 1, ["a", "b"])
    with pytest.raises(ValueError, match="at least 2 groups, found 1"):
        classify_groups(counts, groups * 0, ["a"])
    with pytest.raises(ValueError, match="n_folds must be at least 2, found 1"):
        classify_groups(counts, groups, ["a", "b"], n_folds=1)
    with pytest.raises(ValueError, match=r"found \(6, 4\), \(5,\) and \(5,\)"):
        classify_groups(counts, groups[:5], ["a", "b"])
    with pytest.raises(ValueError, match=r"found \(6, 0\)"):
        classify_groups(counts[:, :0], groups, ["a", "b"])
    with pytest.raises(ValueError, match="finite and not negative"):
        classify_groups(counts - 1, groups, ["a", "b"])
    # Any two of three patients share a group, and one side of any split contains two of them.
    with pytest.raises(ValueError, match="patients have rows in several groups"):
        classify_groups(counts, np.array([0, 0, 1, 1, 2, 2]), list("abc"), patients=np.array(list("xyyzxz")))


def test_new_rows_are_predicted_as_those_of_a_fold_are():
    counts, groups = _planted(36, 3)
    found = classify_groups(counts, groups, list("abc"))
    for fold in range(5):
        train, test = found.fold != fold, found.fold == fold
        again = predict_groups(counts[train], groups[train], list("abc"), counts[test])
        np.testing.assert_array_equal(again, found.probability[test])
    assert predict_groups(counts, groups, list("abc"), counts[:0]).shape == (0, 3)


def test_a_prediction_is_that_of_a_logistic_regression_written_out():
    counts, new, groups = _noise(12, 6, seed=0), _noise(4, 6, seed=9), np.arange(12) % 2
    rows = np.log1p(counts)
    mean, spread = rows.mean(axis=0), rows.std(axis=0)
    expected = []
    for c in sorted({setting.c for setting in SETTINGS}):  # all six latents are selected, whatever the setting
        model = LogisticRegression(C=c, class_weight="balanced", max_iter=1000).fit((rows - mean) / spread, groups)
        logit = ((np.log1p(new) - mean) / spread) @ model.coef_[0] + model.intercept_[0]
        expected.append(1 / (1 + np.exp(-logit)))
    found = predict_groups(counts, groups, ["a", "b"], new)
    assert sum(np.allclose(found[:, 1], one, rtol=1e-10) for one in expected) == 1
    np.testing.assert_allclose(found.sum(axis=1), 1)


def test_new_rows_that_do_not_fit_are_refused():
    counts, groups = _planted(12, 2, n_latents=40)
    with pytest.raises(ValueError, match=r"new_counts must be \(Q, 40\), found \(3, 5\)"):
        predict_groups(counts, groups, ["a", "b"], np.zeros((3, 5)))
    with pytest.raises(ValueError, match="new_counts must be finite and not negative"):
        predict_groups(counts, groups, ["a", "b"], np.full((3, 40), -1.0))
    with pytest.raises(ValueError, match="classification needs at least 2 groups, found 1"):
        predict_groups(counts, np.zeros(12, dtype=int), ["a"], counts)
