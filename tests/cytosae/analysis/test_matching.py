"""Matching of latents: the Hungarian method of scipy on the dense matrix, planted partners, and bounded memory."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from cytosae.analysis import matching
from cytosae.analysis.matching import PairCollector, Pairs, TooManyPairsError, match, pairs_by_cosine, similarity_of


def _pairs(similarity, above=0.0):
    first, second = np.nonzero(similarity > above)
    return Pairs(first, second, similarity[first, second])


def _dense(similarity, above):
    """Total similarity of the Hungarian method on the dense matrix in which other entries are 0."""
    kept = np.where(similarity > above, similarity, 0.0)
    rows, columns = linear_sum_assignment(kept, maximize=True)
    return kept[rows, columns].sum()


@pytest.mark.parametrize("shape", [(1, 1), (40, 40), (30, 70), (70, 30)])
@pytest.mark.parametrize("above", [0.1, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("most_dense", [1 << 24, 0])
def test_it_is_the_hungarian_method_on_the_dense_matrix(monkeypatch, shape, above, most_dense):
    monkeypatch.setattr(matching, "_MOST_DENSE", most_dense)
    for seed in range(10):
        similarity = np.random.default_rng(seed).random(shape)
        pairs = _pairs(similarity, above)
        partner = match(pairs, *shape)
        found = similarity_of(pairs, partner)
        assert found.sum() == pytest.approx(_dense(similarity, above), abs=1e-9)
        kept = partner >= 0
        assert len(set(partner[kept].tolist())) == kept.sum(), "one to one"
        np.testing.assert_array_equal(found[kept], similarity[np.flatnonzero(kept), partner[kept]])
        assert (found[kept] > above).all()
        assert not found[~kept].any()


def test_a_pair_gives_way_where_the_total_is_larger():
    similarity = np.array([[0.9, 0.8], [0.85, 0.0]])
    assert match(_pairs(similarity), 2, 2).tolist() == [1, 0]


def test_nothing_is_matched_without_pairs():
    assert match(PairCollector().result(), 3, 2).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("at_once", [1, 7, 1024])
def test_cosines_in_blocks_are_those_of_the_whole_matrix(monkeypatch, at_once):
    monkeypatch.setattr(matching, "_ROWS_AT_ONCE", at_once)
    random = torch.Generator().manual_seed(0)
    first = torch.randn(50, 4, generator=random)
    second = torch.cat([first[:20] * 3, torch.randn(25, 4, generator=random), torch.zeros(1, 4)])
    one, other = first.double().numpy(), second.double().numpy()
    with np.errstate(invalid="ignore"):
        cosine = np.nan_to_num(one @ other.T / np.linalg.norm(one, axis=1)[:, None] / np.linalg.norm(other, axis=1))
    expected = np.argwhere(cosine > 0.7)
    pairs = pairs_by_cosine(first, second, 0.7)
    found = zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)
    assert sorted(found) == sorted(map(tuple, expected.tolist()))
    np.testing.assert_allclose(pairs.similarity, cosine[pairs.first, pairs.second], rtol=1e-12)


def test_planted_partners_of_many_latents_are_found():
    random = torch.Generator().manual_seed(1)
    first = torch.randn(6000, 32, generator=random)
    order = torch.randperm(6000, generator=random)
    second = first[order] + 0.05 * torch.randn(6000, 32, generator=random)
    partner = torch.from_numpy(match(pairs_by_cosine(first, second, 0.7), 6000, 6000))
    assert (order[partner] == torch.arange(6000)).float().mean() > 0.999


def test_more_pairs_than_fit_are_refused(monkeypatch):
    monkeypatch.setattr(matching, "MOST_PAIRS", 5)
    with pytest.raises(TooManyPairsError, match="more than 5 pairs of latents are above the threshold"):
        pairs_by_cosine(torch.ones(3, 2), torch.ones(3, 2), 0.7)
