"""Correlations of latents in two passes: numpy's on the whole arrays, and nothing of the size of the images is kept."""

import numpy as np
import torch

from cytosae.statistics.cross_correlations import BestPartners, CrossCorrelations, ScoreMoments


def _scores(n=60, seed=0):
    random = np.random.default_rng(seed)
    first = np.maximum(random.normal(size=(n, 9)), 0).astype(np.float32)
    second = np.maximum(0.5 * first[:, :7] + random.normal(size=(n, 7)), 0).astype(np.float32)
    first[:, 3], second[:, 2] = 0.3, 0
    return torch.from_numpy(first), torch.from_numpy(second)


def _correlate(first, second, splits, rows, columns):
    moments = ScoreMoments(first.shape[1]), ScoreMoments(second.shape[1])
    for part in splits:
        for one, scores in zip(moments, (first, second), strict=True):
            one.update(scores[part])
    found = CrossCorrelations(*moments, rows, columns)
    for part in splits:
        found.update(first[part], second[part])
    return found.result()


def test_they_are_numpys():
    first, second = _scores()
    with np.errstate(invalid="ignore"):
        whole = np.corrcoef(first.double().numpy(), second.double().numpy(), rowvar=False)
    expected = np.nan_to_num(whole[:9, 9:])
    every = torch.arange(9), torch.arange(7)
    for splits in ([slice(None)], [slice(0, 1), slice(1, 37), slice(37, 60)]):
        found = _correlate(first, second, splits, *every)
        np.testing.assert_allclose(found, expected, atol=1e-12)
    some = _correlate(first, second, [slice(None)], torch.tensor([8, 2]), torch.tensor([5]))
    np.testing.assert_allclose(some, expected[[8, 2]][:, [5]], atol=1e-12)
    assert not found[3].any()
    assert not found[:, 2].any(), "latents that do not vary"


def test_moments_merge():
    first, _ = _scores()
    whole, part = ScoreMoments(9), ScoreMoments(9)
    whole.update(first)
    other = ScoreMoments(9)
    part.update(first[:11])
    other.update(first[11:])
    part.merge(other)
    assert torch.equal(part.n_active, (first > 0).sum(dim=0))
    assert torch.equal(part.n_active, whole.n_active)
    torch.testing.assert_close(part.mean, first.double().mean(dim=0))
    varies = torch.arange(9) != 3
    torch.testing.assert_close(part.scale[varies], first.double().std(dim=0, correction=0)[varies])
    assert part.scale[3].isinf()


def test_the_best_partner_is_the_largest_and_the_first_among_equals():
    best = BestPartners.empty(2)
    best.improve(slice(0, 2), torch.tensor([4, 4]), torch.tensor([0.5, -0.2]).double())
    best.improve(slice(0, 2), torch.tensor([7, 7]), torch.tensor([0.5, 0.1]).double())
    assert best.latent.tolist() == [4, 7]
    torch.testing.assert_close(best.similarity, torch.tensor([0.5, 0.1]).double(), rtol=1e-6, atol=0)
