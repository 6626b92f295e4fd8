"""Monosemanticity: the closed form equals the loop over all pairs; planted latents get what they must."""

import numpy as np
import pytest
import torch

from cytosae.statistics.monosemanticity import MonosemanticityStatistics, monosemanticity_by_pairs


def _make(n=25, seed=0):
    random = np.random.default_rng(seed)
    embeddings = torch.from_numpy(random.normal(size=(n, 6)).astype(np.float32)) + 0.5
    scores = np.maximum(random.normal(size=(n, 8)), 0).astype(np.float32)
    scores[:, 5] += 0.25  # never 0: the smallest score is taken off
    scores[:, 6] = 0
    scores[:, 7] = 0
    scores[4, 7] = 1
    return embeddings, torch.from_numpy(scores)


@pytest.mark.parametrize("splits", [[25], [1, 24], [10, 5, 10]])
@pytest.mark.parametrize("merged", [False, True])
def test_the_closed_form_is_the_loop_over_all_pairs(splits, merged):
    embeddings, scores = _make()
    found = MonosemanticityStatistics(8, 6)
    for vectors, acts in zip(embeddings.split(splits), scores.split(splits), strict=True):
        part = MonosemanticityStatistics(8, 6) if merged else found
        part.update(vectors, acts)
        if merged:
            found.merge(part)
    result, expected = found.result(), monosemanticity_by_pairs(embeddings, scores)
    torch.testing.assert_close(result.scores[:6], expected.scores[:6], rtol=1e-10, atol=1e-12)
    assert result.any_pair == pytest.approx(expected.any_pair, rel=1e-10)
    assert result.scores[6:].isnan().all(), "active on fewer than two images"


def test_a_latent_of_one_kind_of_image_has_1_and_one_of_all_has_that_of_any_pair():
    embeddings = torch.eye(3).repeat(4, 1)
    scores = torch.stack([torch.tensor([1.0, 0, 0]).repeat(4), torch.tensor([1.0, 0.5, 0]).repeat(4)], dim=1)
    scores = torch.cat([scores, torch.ones(12, 1)], dim=1)
    found = MonosemanticityStatistics(3, 3)
    found.update(embeddings, scores)
    result = found.result()
    assert float(result.scores[0]) == pytest.approx(1)
    assert float(result.scores[1]) == pytest.approx((4 * 3 + 4 * 3 * 0.25) / (6**2 - 5))
    assert result.scores[2].isnan(), "always equally active: it says nothing"
    assert result.any_pair == pytest.approx(3 / 11)


def test_nothing_is_defined_without_two_images():
    found = MonosemanticityStatistics(2, 3)
    found.update(torch.zeros(0, 3), torch.zeros(0, 2))
    assert np.isnan(found.result().any_pair)
    found.update(torch.ones(1, 3), torch.ones(1, 2))
    assert found.result().scores.isnan().all()
    assert np.isnan(found.result().any_pair)
