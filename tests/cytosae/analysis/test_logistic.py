"""Newton's method against scikit-learn's logistic regression, to the minimum."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from cytosae.analysis.logistic import fit_logistic


@pytest.mark.parametrize("n_groups", [2, 3, 5])
@pytest.mark.parametrize(("n", "k"), [(40, 6), (24, 90)])
@pytest.mark.parametrize("c", [0.1, 1.0])
def test_the_minimum_is_that_of_scikit_learn(n_groups, n, k, c):
    rng = np.random.default_rng(n_groups)
    groups = np.sort(rng.permutation(np.arange(n) % n_groups * (rng.random(n) < 0.9)))
    features = rng.normal(size=(n, k)) + 0.7 * groups[:, None]
    features[:, 1] = features[:, 0]
    coefficients, intercepts = fit_logistic(features, groups, n_groups, c)
    plain = LogisticRegression(C=c, class_weight="balanced", tol=1e-12, max_iter=100_000).fit(features, groups)
    expected = plain.predict_proba(features)
    logits = features @ coefficients + intercepts
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-5)
    np.testing.assert_allclose(coefficients.sum(axis=1), 0, atol=1e-12)
    np.testing.assert_array_equal(logits.argmax(axis=1), plain.predict(features))
    if n_groups > 2:
        np.testing.assert_allclose(coefficients, plain.coef_.T, atol=1e-4)


def test_separable_groups_and_constant_columns_have_a_finite_fit():
    features = np.array([[-1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    coefficients, intercepts = fit_logistic(features, np.array([0, 0, 1, 1]), 2, 1.0)
    assert np.isfinite(coefficients).all()
    assert coefficients[1].tolist() == [0, 0]
    assert abs(intercepts).max() < 1e-6
    assert coefficients[0, 1] > 0.3
