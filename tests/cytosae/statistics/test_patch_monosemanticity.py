"""Monosemanticity of patches: the closed form equals the loop over all pairs of patches of different images."""

import numpy as np
import pytest
import torch

from cytosae.statistics.patch_monosemanticity import PatchMonosemanticityStatistics, patch_monosemanticity_by_pairs


def _make(sizes=(3, 5, 0, 1, 4), seed=0):
    """Images with patches; latent 4 is active on one image alone, latent 5 on none."""
    random = np.random.default_rng(seed)
    images = []
    for number, n in enumerate(sizes):
        tokens = torch.from_numpy(random.normal(size=(n, 6)).astype(np.float32)) + 0.4
        acts = torch.from_numpy(np.maximum(random.normal(size=(n, 6)), 0).astype(np.float32))
        acts[:, 4] *= number == 1
        acts[:, 5] = 0
        images.append((tokens, acts))
    return images


@pytest.mark.parametrize("merged", [False, True])
def test_the_closed_form_is_the_loop_over_all_pairs(merged):
    images = _make()
    found = PatchMonosemanticityStatistics(6, 6)
    for tokens, acts in images:
        part = PatchMonosemanticityStatistics(6, 6) if merged else found
        part.update(tokens, acts)
        if merged:
            found.merge(part)
    result, expected = found.result(), patch_monosemanticity_by_pairs(images)
    torch.testing.assert_close(result.scores[:4], expected.scores[:4], rtol=1e-9, atol=1e-12)
    assert result.any_pair == pytest.approx(expected.any_pair, rel=1e-9)
    assert result.scores[4:].isnan().all(), "active on patches of fewer than two images"
    assert found.n_patches == 13


def test_patches_of_one_image_are_no_pair():
    found = PatchMonosemanticityStatistics(1, 2)
    found.update(torch.eye(2), torch.ones(2, 1))
    assert found.result().scores.isnan().all()
    assert np.isnan(found.result().any_pair)
    found.update(torch.tensor([[2.0, 0]]), torch.tensor([[3.0]]))
    # Of the two pairs across the images one has cosine 1, the other 0.
    assert float(found.result().scores[0]) == pytest.approx(0.5)
    assert found.result().any_pair == pytest.approx(0.5)


def test_a_latent_of_one_kind_of_patch_has_1():
    found = PatchMonosemanticityStatistics(2, 3)
    for _ in range(4):
        found.update(torch.eye(3), torch.tensor([[1.0, 1.0], [0, 1], [0, 1]]))
    result = found.result()
    assert result.scores.tolist() == pytest.approx([1, 1 / 3])
    assert result.any_pair == pytest.approx(1 / 3)
