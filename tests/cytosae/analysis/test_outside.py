"""Shares of known images: counted by hand, and at most a with a probability of at most a."""

import math

import numpy as np
import pytest

from cytosae.analysis.outside import known_share, unusual_share


def count(reference, image):
    """The definition, by loops over all images alike."""
    pool = [*map(list, reference), list(image)]
    ranks = [[sum(other[k] >= one[k] for other in pool) for k in range(len(one))] for one in pool]
    products = [math.prod(rank) for rank in ranks]
    return sum(product <= products[-1] for product in products) / len(pool)


@pytest.mark.parametrize(("n_kinds", "n_numbers"), [(3, 2), (1000, 2), (1000, 1), (50, 3)])
def test_shares_are_counted_with_ties(n_kinds, n_numbers):
    rng = np.random.default_rng(0)
    reference = rng.integers(0, n_kinds, (57, n_numbers)) / 7
    values = rng.integers(-1, n_kinds + 1, (40, n_numbers)) / 7
    assert known_share(reference, values).tolist() == [count(reference, image) for image in values]


def test_with_one_number_it_is_the_share_of_images_with_one_as_large():
    reference = np.array([[1.0], [2.0], [3.0], [4.0]])
    assert known_share(reference, np.array([[5.0], [4.0], [2.5], [0.0], [np.nan]])).tolist() == [0.2, 0.4, 0.6, 1, 0.2]


@pytest.mark.parametrize("n_kinds", [10**6, 4])
def test_of_images_drawn_alike_at_most_the_stated_share_is_outside(n_kinds):
    # Each of n + 1 images in turn is the new one: all are equally probable, so that the share is exact, not sampled.
    rng = np.random.default_rng(1)
    images = rng.integers(0, n_kinds, (400, 2)).astype(float)
    images[:, 1] += images[:, 0]  # the two numbers depend on each other
    shares = np.array([known_share(np.delete(images, at, axis=0), images[at : at + 1])[0] for at in range(400)])
    for level in (0.01, 0.02, 0.1, 0.5):
        assert np.mean(shares <= level) <= level
        if n_kinds > 4:
            assert np.mean(shares <= level) == pytest.approx(level, abs=0.01)


def test_unusual_latents_are_counted():
    scores = np.array([[0, 1, 2, 3], [0, 0, 0, 0], [0.1, 0, 0, 9]], dtype=np.float32)
    highest = np.array([0, 1, 1.5, 5], dtype=np.float32)
    expected = []
    for image in scores:
        active = [latent for latent in range(4) if image[latent] > 0]
        expected.append(sum(image[latent] > highest[latent] for latent in active) / max(1, len(active)))
    assert unusual_share(scores, highest).tolist() == expected == [1 / 3, 0, 1]


def test_errors():
    with pytest.raises(ValueError, match=r"reference must be \(n, K\) with n at least 1, and values \(m, K\), found"):
        known_share(np.zeros((0, 2)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match=r"found \(3, 2\) and \(1, 1\)"):
        known_share(np.zeros((3, 2)), np.zeros((1, 1)))
    with pytest.raises(ValueError, match="numbers of the reference must be finite"):
        known_share(np.array([[np.nan]]), np.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"scores must be \(n, S\) and highest \(S,\), found \(2, 3\) and \(4,\)"):
        unusual_share(np.zeros((2, 3)), np.zeros(4))
