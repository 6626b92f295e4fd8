"""The linear probe against scikit-learn, and its independence of how images are split."""

import numpy as np
import pytest
import torch

from cytosae.analysis.probe import LinearProbe

sklearn_linear = pytest.importorskip("sklearn.linear_model", reason="compares with scikit-learn")

N, D, C = 90, 7, 3


def make_case(seed=0, d=D):
    """Classes of different sizes whose means differ, with channels of very different location and scale."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(C, size=N, p=[0.6, 0.3, 0.1])
    features = rng.normal(size=(N, d)) + rng.normal(size=(C, d))[labels]
    features = features * rng.uniform(0.01, 100, size=d) + rng.normal(size=d) * 50
    return torch.from_numpy(features), torch.from_numpy(labels)


def fit(features, labels, ridge=0.01):
    probe = LinearProbe(features.shape[1], C)
    probe.update(features, labels)
    return probe.fit(ridge)


@pytest.mark.parametrize(("ridge", "d"), [(1e-3, D), (0.01, D), (2.0, D), (0.01, 150)])
def test_it_equals_the_ridge_regression_of_scikit_learn(ridge, d):
    features, labels = make_case(d=d)
    found = fit(features, labels, ridge)
    x = features.numpy()
    standardised = (x - x.mean(axis=0)) / x.std(axis=0)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.scale, x.std(axis=0), rtol=1e-9)
    model = sklearn_linear.Ridge(alpha=ridge * np.trace(standardised.T @ standardised) / d)
    model.fit(standardised, np.eye(C)[labels.numpy()])
    np.testing.assert_allclose(found.weights.T, model.coef_, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.intercept, model.intercept_, rtol=1e-9)
    # Targets of 1 and -1 instead of 1 and 0 double all logits and shift them equally.
    classifier = sklearn_linear.RidgeClassifier(alpha=ridge * N).fit(standardised, labels.numpy())
    assert found.logits(features).argmax(dim=1).tolist() == classifier.predict(standardised).tolist()


def test_the_split_of_the_images_does_not_matter():
    features, labels = make_case()
    whole = fit(features, labels)
    parts = [LinearProbe(D, C) for _ in range(3)]
    for start in range(0, N, 11):
        parts[start % 3].update(features[start : start + 11], labels[start : start + 11])
    merged = LinearProbe(D, C)
    for part in (parts[2], parts[0], parts[1]):
        merged.merge(part)
    assert merged.n_images.tolist() == torch.bincount(labels).tolist()
    for one, other in zip(merged.fit(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_units_of_the_channels_do_not_matter():
    features, labels = make_case()
    unit = torch.tensor([1e-6, 1, 3, 1e5, -2, 7, 0.1], dtype=torch.float64)
    moved = features * unit - 5 * unit
    torch.testing.assert_close(fit(moved, labels).logits(moved), fit(features, labels).logits(features))


def test_a_constant_channel_has_no_weight():
    features, labels = make_case()
    for value in (0.0, 0.1, -1e6 / 3):
        padded = torch.cat([features, torch.full((N, 1), value, dtype=torch.float64)], dim=1)
        found = fit(padded, labels, ridge=0.01 * (D + 1) / D)  # a trace of n D over D + 1 channels
        assert found.weights[-1].tolist() == [0, 0, 0]
        assert found.scale[-1] == 1
        torch.testing.assert_close(found.weights[:-1], fit(features, labels).weights)
    nothing = fit(torch.ones(N, D), labels)
    assert not nothing.weights.any()
    assert nothing.logits(torch.zeros(1, D)).argmax() == torch.bincount(labels).argmax()


def test_wrong_arguments_are_refused():
    features, labels = make_case()
    with pytest.raises(ValueError, match="needs images and a ridge above 0, found 0 images"):
        LinearProbe(D, C).fit()
    with pytest.raises(ValueError, match="found 90 images and 0"):
        fit(features, labels, ridge=0)
    with pytest.raises(ValueError, match=r"features must be \(90, 7\), found \(90, 6\)"):
        LinearProbe(D, C).update(features[:, :6], labels)
    for bad in (-1, C):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
            LinearProbe(D, C).update(features[:1], torch.tensor([bad]))
