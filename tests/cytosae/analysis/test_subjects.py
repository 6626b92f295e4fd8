"""Pooling of samples by subject against plain loops, and what several samples of a person do to a test."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae.analysis.differential import compare_groups
from cytosae.analysis.subjects import SplitSubjectError, pool_samples, subject_groups


@given(st.lists(st.integers(-1, 4), max_size=12), st.integers(0, 3), st.integers(0, 100))
def test_pooling_adds_up_counts_and_images(subjects, n_latents, seed):
    rng = np.random.default_rng(seed)
    of = np.array(subjects, dtype=np.int64)
    raw, n_images = rng.integers(0, 100, (len(of), n_latents)), rng.integers(1, 9, len(of))
    pooled = pool_samples(raw, n_images, of, 5)
    for subject in range(5):
        mine = [at for at, other in enumerate(subjects) if other == subject]
        assert pooled.n_images[subject] == sum(int(n_images[at]) for at in mine)
        for latent in range(n_latents):
            total = sum(int(raw[at, latent]) for at in mine)
            assert pooled.raw[subject, latent] == total
            assert pooled.counts[subject, latent] == (total / pooled.n_images[subject] if mine else 0)
    assert pooled.raw.dtype == pooled.n_images.dtype == np.int64
    assert pooled.raw.shape == pooled.counts.shape == (5, n_latents)


def test_every_image_has_the_same_weight():
    pooled = pool_samples(np.array([[90], [0]]), np.array([10, 90]), np.array([0, 0]), 1)
    assert pooled.counts.tolist() == [[0.9]], "not 4.5, the mean over the samples"


def test_a_subject_has_the_group_of_its_samples():
    groups, subjects = np.array([1, 1, -1, 0, -1, 0]), np.array([2, 2, 2, 0, 1, -1])
    assert subject_groups(groups, subjects, 4).tolist() == [0, -1, 1, -1]
    assert subject_groups(np.zeros(0, dtype=int), np.zeros(0, dtype=int), 2).tolist() == [-1, -1]


def test_samples_of_a_subject_in_two_groups_are_refused():
    with pytest.raises(SplitSubjectError, match="subject 2 has samples in groups 0 and 1") as caught:
        subject_groups(np.array([1, 3, 1, 0, 1]), np.array([0, 2, 0, 2, 2]), 3)
    assert (caught.value.subject, caught.value.groups) == (2, (0, 1))


def test_errors():
    raw, n_images, of = np.ones((3, 2), dtype=np.int64), np.ones(3, dtype=np.int64), np.zeros(3, dtype=np.int64)
    with pytest.raises(ValueError, match=r"raw must be \(P, S\), .* found \(3, 2\), \(2,\) and \(3,\)"):
        pool_samples(raw, n_images[:2], of, 1)
    with pytest.raises(ValueError, match=r"subjects must lie in -1\.\.0, found 0 to 1"):
        pool_samples(raw, n_images, np.array([0, 1, 0]), 1)
    with pytest.raises(ValueError, match=r"groups and subjects must be \(P,\), found \(2,\) and \(3,\)"):
        subject_groups(of[:2], of, 1)
    with pytest.raises(ValueError, match=r"subjects must lie in -1\.\.0, found -2 to 0"):
        subject_groups(of, np.array([0, -2, 0]), 1)


def test_samples_taken_as_persons_find_what_is_not_there_and_pooled_ones_do_not():
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(12), 4)
    rate = rng.gamma(2, 1, (12, 500))  # of a person
    raw = rng.poisson(50 * rate[subjects] * rng.gamma(20, 1 / 20, (48, 500)))
    n_images, in_first = np.full(48, 50), subjects < 6
    naive = compare_groups(raw / n_images[:, None], in_first)
    pooled = pool_samples(raw, n_images, subjects, 12)
    honest = compare_groups(pooled.counts, np.arange(12) < 6)
    assert (naive.q_value < 0.05).sum() > 50
    assert (honest.q_value < 0.05).sum() == 0
    assert (honest.p_value <= 0.05).mean() < 0.07
