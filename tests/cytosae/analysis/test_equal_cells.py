"""Equal numbers of images of every subject: the draw, and what it does to a test in which groups differ in nothing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae.analysis.differential import compare_groups
from cytosae.analysis.equal_cells import draw_equal, median_images
from cytosae.analysis.subjects import pool_samples


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=60), st.integers(0, 9))
def test_every_subject_gives_as_many_images_each_at_most_once(subjects, seed):
    of = np.array(subjects)
    kept = np.unique(of[of >= 0])
    slots = np.where(of >= 0, np.searchsorted(kept, of), -1)
    if not len(kept):
        assert len(draw_equal(slots, 0, 1, seed=seed)) == 0
        return
    n_each = int(np.bincount(slots[slots >= 0]).min())
    rows = draw_equal(slots, len(kept), n_each, seed=seed)
    assert (np.diff(rows) > 0).all()
    assert np.bincount(slots[rows], minlength=len(kept)).tolist() == [n_each] * len(kept)
    turned = np.where(slots >= 0, len(kept) - 1 - slots, -1)
    np.testing.assert_array_equal(rows, draw_equal(turned, len(kept), n_each, seed=seed))


def test_every_image_is_equally_likely_and_seeds_differ():
    of = np.array([0] * 10 + [-1] * 5 + [1] * 3)
    drawn = np.zeros(18)
    for seed in range(2000):
        drawn[draw_equal(of, 2, 3, seed=seed)] += 1
    assert drawn[10:15].sum() == 0
    assert (drawn[15:] == 2000).all()
    np.testing.assert_allclose(drawn[:10] / 2000, 0.3, atol=0.05)


def test_errors():
    of = np.array([0, 0, 1, -1])
    with pytest.raises(ValueError, match="subject 1 has 1 images, fewer than 2"):
        draw_equal(of, 2, 2)
    with pytest.raises(ValueError, match="n_each must be at least 1, found 0"):
        draw_equal(of, 2, 0)
    with pytest.raises(ValueError, match=r"subjects must lie in -1\.\.0, found 1"):
        draw_equal(of, 1, 1)
    assert median_images(np.array([1, 9, 500, 4]), np.array([True, True, False, False])) == (5, 252)


def _cells(n_images, n_latents, rng, *, factor=1.0):
    """Token counts of every image of subjects that differ, and the subject of each; rare and frequent latents."""
    n = len(n_images)
    rate = np.exp(rng.uniform(np.log(0.003), np.log(0.3), n_latents)) * rng.lognormal(-0.125, 0.5, (n, n_latents))
    subjects = np.repeat(np.arange(n), n_images)
    active = rng.random((len(subjects), n_latents)) < np.minimum(rate * factor, 1)[subjects]
    return np.where(active, rng.geometric(1 / 8, active.shape), 0), subjects


def test_unequal_numbers_of_images_break_the_level_and_equal_ones_keep_it():
    rng = np.random.default_rng(0)
    n_images, first = np.array([300] * 5 + [30] * 5), np.arange(10) < 5
    tokens, subjects = _cells(n_images, 1500, rng)

    def shares(rows):
        pooled = pool_samples(tokens[rows], np.ones(len(rows), dtype=np.int64), subjects[rows], 10)
        found = compare_groups(pooled.counts, first)
        return [(found.p_value[found.tested] <= level).mean() for level in (0.01, 0.05)]

    assert shares(np.arange(len(tokens)))[1] > 0.08
    for seed in range(3):
        few, more = shares(draw_equal(subjects, 10, 30, seed=seed))
        assert few < 0.01 + 4 * np.sqrt(0.01 / 1500)
        assert more < 0.05 + 4 * np.sqrt(0.05 / 1500)


def test_a_difference_is_still_found_in_equal_numbers():
    rng = np.random.default_rng(1)
    n_images, first = np.array([200] * 8 + [40] * 8), np.arange(16) < 8
    tokens, subjects = _cells(n_images, 400, rng, factor=np.where(first[:, None] & (np.arange(400) < 200), 8, 1))
    rows = draw_equal(subjects, 16, 40)
    pooled = pool_samples(tokens[rows], np.ones(len(rows), dtype=np.int64), subjects[rows], 16)
    found = compare_groups(pooled.counts, first, level=0.05)
    assert (found.q_value[:200] < 0.05).mean() > 0.5
    assert (found.q_value[200:] < 0.05).mean() < 0.05
