"""Sparse probing: moments equal the dense formula, selection sees no test image, accuracies are scikit-learn's."""

import numpy as np
import pytest
import torch
from sklearn.feature_selection import f_classif
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from cytosae.analysis.classification import variance_share
from cytosae.analysis.sparse_probe import ProbeMoments, probe_folds, score_predictions


def _make(n=90, n_latents=12, seed=0):
    random = np.random.default_rng(seed)
    labels, folds = random.integers(0, 3, n), np.arange(n) % 4
    scores = np.maximum(random.normal(size=(n, n_latents)), 0)
    scores[:, 0] += labels == 1
    scores[:, 1] += labels
    scores[:, 2] = 0.125
    return scores.astype(np.float32), labels, folds


def _moments(scores, labels, folds, parts=3):
    found = ProbeMoments(4, 3, scores.shape[1])
    for at in np.array_split(np.arange(len(scores)), parts):
        found.update(*(torch.from_numpy(array[at]) for array in (scores, folds, labels)))
    return found


@pytest.mark.parametrize("parts", [1, 7])
def test_variance_shares_are_those_of_the_training_images(parts):
    scores, labels, folds = _make()
    found = _moments(scores, labels, folds, parts)
    for fold in range(4):
        train = folds != fold
        wide = scores[train].astype(np.float64)
        np.testing.assert_allclose(found.variance_shares(fold), variance_share(wide, labels[train]), atol=1e-12)
        for label in range(3):
            one = (labels[train] == label).astype(int)
            np.testing.assert_allclose(found.variance_shares(fold, label), variance_share(wide, one), atol=1e-12)
        varying = np.arange(12) != 2
        best = np.argmax(f_classif(wide[:, varying], labels[train])[0])
        assert found.select(fold, 1).tolist() == [np.flatnonzero(varying)[best]]
        assert found.select(fold, 50).shape == (12,)
        assert found.select(fold, 3, 1)[0] == 0


def test_selection_does_not_look_at_test_images():
    scores, labels, folds = _make()
    before = _moments(scores, labels, folds).select(2, 12)
    scores[folds == 2] = np.random.default_rng(9).random((int((folds == 2).sum()), 12)) * 100
    np.testing.assert_array_equal(_moments(scores, labels, folds).select(2, 12), before)


def test_labels_without_meaning_are_not_predicted():
    """Selecting on all images first would report far more than chance."""
    random = np.random.default_rng(3)
    scores, labels = random.normal(size=(60, 3000)).astype(np.float32), random.integers(0, 2, 60)
    folds = np.arange(60) % 4
    moments = ProbeMoments(4, 2, 3000)
    moments.update(*map(torch.from_numpy, (scores, folds, labels)))
    predicted = probe_folds(scores, labels, folds, [moments.select(fold, 20) for fold in range(4)])
    assert score_predictions(labels, predicted).balanced_accuracy < 0.7
    leaking = np.argsort(-variance_share(scores.astype(float), labels))[:20]
    assert score_predictions(labels, probe_folds(scores[:, leaking], labels, folds)).balanced_accuracy > 0.85


def test_accuracies_are_those_of_scikit_learn_and_planted_latents_are_used():
    scores, labels, folds = _make()
    moments = _moments(scores, labels, folds)
    predicted = probe_folds(scores, labels, folds, [moments.select(fold, 2) for fold in range(4)])
    found = score_predictions(labels, predicted)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert found.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert found.balanced_accuracy > 0.5
    np.testing.assert_array_equal(probe_folds(scores, labels, folds), probe_folds(scores, labels, folds))
