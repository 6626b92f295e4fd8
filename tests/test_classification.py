"""Groups told from counts: planted ones are, others are not, and nothing leaks from the part tested."""

import numpy as np
import pytest
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from cytosae.classification import classify_groups


def _planted(n_latents=600, strength=6.0, seed=0):
    rng = np.random.default_rng(seed)
    groups = np.repeat([0, 1, 2], 12)
    counts = rng.poisson(1.0, size=(36, n_latents)).astype(float)
    counts[np.arange(36), groups] += strength
    return counts, groups


def test_planted_groups_are_told_by_the_planted_latents():
    counts, groups = _planted()
    found = classify_groups(counts, groups, ["a", "b", "c"])
    assert found.accuracy > 0.9
    assert found.balanced_accuracy > 0.9
    assert found.chance == pytest.approx(1 / 3)
    assert set(found.latents[:3].tolist()) == {0, 1, 2}
    for latent, weights in zip(found.latents[:3], found.latent_weight[:3], strict=True):
        assert np.argmax(weights) == latent
    assert (found.latent_share >= 0.5).all()
    assert (np.diff(found.latent_share) <= 0).all()


def test_the_confusion_matrix_counts_every_patient_once():
    counts, groups = _planted(strength=1.5)
    found = classify_groups(counts, groups, ["a", "b", "c"])
    assert found.confusion.sum(axis=1).tolist() == [12, 12, 12]
    assert np.trace(found.confusion) / 36 == pytest.approx(found.accuracy)
    assert (found.predicted >= 0).all()
    assert set(found.fold.tolist()) == {0, 1, 2, 3, 4}
    assert len(found.settings) == 5


def test_nothing_leaks():
    """40 patients, 3,000 latents of noise: choosing latents outside the folds would look like success."""
    groups = np.arange(40) % 2
    honest, leaking = [], []
    for seed in range(6):
        noise = np.random.default_rng(seed).poisson(0.5, size=(40, 3000)).astype(float)
        honest.append(classify_groups(noise, groups, ["a", "b"], seed=seed).accuracy)
        varying = noise[:, noise.std(axis=0) > 0]
        chosen = SelectKBest(f_classif, k=32).fit_transform(varying, groups)
        leaking.append(cross_val_score(LogisticRegression(), chosen, groups, cv=5).mean())
    assert np.mean(leaking) > 0.8
    assert 0.35 < np.mean(honest) < 0.65


def test_rows_of_a_patient_stay_together():
    rng = np.random.default_rng(0)
    patients = np.repeat([f"p{number}" for number in range(12)], 4)
    groups = np.repeat(np.arange(12) % 2, 4)
    found = classify_groups(rng.random((48, 50)), groups, ["a", "b"], patients=patients, n_folds=4)
    for patient in set(patients.tolist()):
        assert len(set(found.fold[patients == patient].tolist())) == 1
    assert len(set(found.fold.tolist())) == 4


def test_two_groups_have_coefficients_each():
    counts, groups = _planted()
    rows = groups < 2
    found = classify_groups(counts[rows], groups[rows], ["a", "b"])
    np.testing.assert_array_equal(found.latent_weight[:, 0], -found.latent_weight[:, 1])
    place = {latent: at for at, latent in enumerate(found.latents.tolist())}
    assert found.latent_weight[place[0], 0] > 0
    assert found.latent_weight[place[1], 1] > 0


def test_the_same_seed_gives_the_same_result():
    counts, groups = _planted(strength=1.0)
    first, again = (classify_groups(counts, groups, ["a", "b", "c"], seed=5) for _ in range(2))
    assert np.array_equal(first.predicted, again.predicted)
    assert np.array_equal(first.latent_weight, again.latent_weight)
    assert first.settings == again.settings


def test_tiny_groups_and_latents_that_never_vary():
    counts = np.zeros((6, 30))
    counts[:3, 0] = 5
    found = classify_groups(counts, np.array([0, 0, 0, 1, 1, 1]), ["a", "b"])
    assert found.accuracy == 1
    assert found.latents.tolist() == [0]
    assert (
        classify_groups(np.random.default_rng(0).random((7, 9)), np.array([0, 0, 0, 1, 1, 1, 1]), "ab").chance == 4 / 7
    )


def test_what_cannot_be_classified_is_refused():
    with pytest.raises(ValueError, match="needs two groups of 3 patients each, found a: 3, b: 1"):
        classify_groups(np.zeros((4, 2)), np.array([0, 0, 0, 1]), ["a", "b"])
    with pytest.raises(ValueError, match="found a: 3, b: 2"):
        classify_groups(np.zeros((6, 2)), np.array([0, 0, 0, 1, 1, 1]), ["a", "b"], patients=list("pqrstt"))
    with pytest.raises(ValueError, match="need one group and patient a row"):
        classify_groups(np.zeros((4, 2)), np.array([0, 0, 1]), ["a", "b"])
