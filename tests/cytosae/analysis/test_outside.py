"""Shares of known images: counted by hand, and at most a with a probability of at most a."""

import numpy as np
import pytest

from cytosae.analysis.outside import known_share, unusual_share, worse_share


def count(reference, values):
    """The definition, by loops."""
    return [(1 + sum(one >= value for one in reference)) / (len(reference) + 1) for value in values]


@pytest.mark.parametrize("n_values", [3, 1000])
def test_shares_are_counted_with_ties(n_values):
    rng = np.random.default_rng(0)
    reference, values = np.sort(rng.integers(0, n_values, 97) / 7), rng.integers(-1, n_values + 1, 60) / 7
    assert worse_share(reference, values).tolist() == count(reference, values)


@pytest.mark.parametrize("n_kinds", [10**6, 4])
def test_of_images_drawn_alike_at_most_the_stated_share_is_outside(n_kinds):
    # Each of n + 1 values in turn is the new one: all are equally probable, so that the share is exact, not sampled.
    rng = np.random.default_rng(1)
    values = np.stack([rng.integers(0, n_kinds, 400), rng.integers(0, n_kinds, 400)]).astype(float)
    shares = [
        [worse_share(np.sort(np.delete(one, at)), one[at : at + 1])[0] for at in range(400)] for one in values
    ]  # fmt: skip
    for level in (0.01, 0.02, 0.1, 0.5):
        for one in shares:
            assert np.mean(np.array(one) <= level) <= level
            if n_kinds > 4:
                assert np.mean(np.array(one) <= level) == pytest.approx(level, abs=1 / 400)
        assert np.mean(known_share(*map(np.array, shares)) <= level) <= level


def test_several_shares_become_one():
    found = known_share(np.array([0.3, 0.01, 0.9, np.nan]), np.array([0.2, 0.5, 0.8, 0.1]))
    assert found[:3].tolist() == [0.4, 0.02, 1.0]
    assert np.isnan(found[3])
    assert np.isnan(worse_share(np.array([1.0]), np.array([np.nan]))).all()


def test_unusual_latents_are_counted():
    scores = np.array([[0, 1, 2, 3], [0, 0, 0, 0], [0.1, 0, 0, 9]], dtype=np.float32)
    highest = np.array([0, 1, 1.5, 5], dtype=np.float32)
    expected = []
    for image in scores:
        active = [latent for latent in range(4) if image[latent] > 0]
        expected.append(sum(image[latent] > highest[latent] for latent in active) / max(1, len(active)))
    assert unusual_share(scores, highest).tolist() == expected == [1 / 3, 0, 1]


def test_errors():
    with pytest.raises(ValueError, match=r"reference must be \(n,\), rising, with n at least 1, found shape \(0,\)"):
        worse_share(np.zeros(0), np.zeros(1))
    with pytest.raises(ValueError, match="rising"):
        worse_share(np.array([2.0, 1.0]), np.zeros(1))
    with pytest.raises(ValueError, match=r"scores must be \(n, S\) and highest \(S,\), found \(2, 3\) and \(4,\)"):
        unusual_share(np.zeros((2, 3)), np.zeros(4))
