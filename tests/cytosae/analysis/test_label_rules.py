"""AUROC, thresholds and F1 per label, against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_recall_curve, precision_score, recall_score, roc_auc_score

from cytosae.analysis.label_rules import auroc_of_labels, choose_rules, try_rules


def draw(seed, levels):
    """Scores with ties and zeros that depend on the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, 300)
    scores = np.maximum(rng.integers(-levels // 2, levels, 300) + (labels == 2) * levels // 3, 0) / levels
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("levels", [6, 10_000])
def test_rules_are_scikit_learns(levels):
    scores, labels = draw(0, levels)
    rules = choose_rules(scores, labels, 4)
    for label in range(4):
        is_label = labels == label
        assert rules.auroc[label] == pytest.approx(roc_auc_score(is_label, scores), abs=1e-12)
        precision, recall, thresholds = precision_recall_curve(is_label, scores)
        f1 = np.divide(2 * precision * recall, precision + recall, out=np.zeros(len(recall)), where=recall > 0)
        f1 = f1[:-1][thresholds > 0]
        assert rules.f1[label] == pytest.approx(f1.max(), abs=1e-12)
        best = thresholds[thresholds > 0][np.isclose(f1, f1.max(), atol=1e-12)].max()
        assert rules.threshold[label] == best
        assert rules.n_images[label] == is_label.sum()


@pytest.mark.parametrize("levels", [6, 10_000])
def test_tests_on_other_images_are_scikit_learns(levels):
    rules = choose_rules(*draw(0, levels), 4)
    scores, labels = draw(1, levels)
    tests = try_rules(rules, scores, labels)
    for label in range(4):
        is_label, said = labels == label, scores >= rules.threshold[label]
        assert tests.auroc[label] == pytest.approx(roc_auc_score(is_label, scores), abs=1e-12)
        assert tests.f1[label] == pytest.approx(f1_score(is_label, said), abs=1e-12)
        assert tests.precision[label] == pytest.approx(precision_score(is_label, said), abs=1e-12)
        assert tests.recall[label] == pytest.approx(recall_score(is_label, said), abs=1e-12)


def test_a_perfect_latent_is_told_exactly():
    labels = np.repeat([0, 1, 2], 10)
    scores = np.where(labels == 1, 0.5, 0).astype(np.float32)
    rules = choose_rules(scores, labels, 3)
    assert rules.auroc.tolist() == [0.25, 1, 0.25]
    assert (rules.threshold[1], rules.f1[1]) == (0.5, 1)
    assert np.isnan(rules.threshold[[0, 2]]).all()
    tests = try_rules(rules, scores, labels)
    assert (tests.precision[1], tests.recall[1], tests.f1[1]) == (1, 1, 1)
    assert tests.f1[[0, 2]].tolist() == [0, 0]
    assert np.isnan(tests.precision[[0, 2]]).all()


def test_what_is_not_defined_is_nan():
    scores = np.array([0.1, 0.2], np.float32)
    assert np.isnan(auroc_of_labels(scores, np.array([1, 1]), 3)).all()
    rules = choose_rules(np.zeros(4, np.float32), np.array([0, 0, 1, 1]), 2)
    assert np.isnan(rules.threshold).all()
    assert rules.f1.tolist() == [0, 0]
    assert rules.auroc.tolist() == [0.5, 0.5]
    tests = try_rules(choose_rules(scores, np.array([0, 1]), 2), scores, np.array([0, 0]))
    assert np.isnan(tests.recall[1])
    assert np.isnan(tests.f1[1])


def test_of_equal_f1_the_largest_threshold_is_taken():
    # One of two at 0.9: F1 2/3; both at 0.5 with a wrong one between: 4/5; all four: 4/6.
    scores = np.array([0.9, 0.7, 0.5, 0.3], np.float32)
    assert choose_rules(scores, np.array([0, 1, 0, 1]), 2).threshold[0] == np.float32(0.5)
    # 2/3 at 0.9, 2/4, 2/5 ... and 4/6 at the end are equal.
    assert choose_rules(scores, np.array([0, 1, 1, 0]), 2).threshold[0] == np.float32(0.9)
