"""Nearest latents of another autoencoder: in blocks as at once, in float64."""

import numpy as np
import pytest
import torch

from cytosae.analysis import partners
from cytosae.analysis.partners import nearest_partners


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_partners_are_those_of_all_cosines_at_once(block, monkeypatch):
    monkeypatch.setattr(partners, "BLOCK", block)
    rng = np.random.default_rng(0)
    mine, theirs = rng.normal(size=(17, 6)), rng.normal(size=(11, 6))
    theirs[4] = 3 * mine[2]
    mine[5] = 0
    theirs[7] = 0
    theirs[9] = theirs[4]  # of equals the smaller number
    with np.errstate(invalid="ignore"):
        cosine = (mine @ theirs.T) / np.linalg.norm(mine, axis=1)[:, None] / np.linalg.norm(theirs, axis=1)
    cosine[:, 9] = cosine[:, 4]
    expected = np.nan_to_num(cosine, nan=-2).argmax(axis=1)
    expected[5] = -1
    found = nearest_partners(torch.from_numpy(mine).float(), torch.from_numpy(theirs).float())
    assert found.latent.tolist() == expected.tolist()
    assert found.latent[2] == 4
    others = np.arange(17) != 5
    np.testing.assert_allclose(found.cosine[others], np.nanmax(cosine[others], axis=1), atol=1e-6)
    assert found.cosine[5] == 0


def test_a_permutation_of_latents_is_found_again():
    decoder = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = nearest_partners(decoder, 2 * decoder[order])
    assert order[found.latent].tolist() == list(range(40))
    assert found.cosine.min() > 0.9999


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="decoder rows have 8 and 4 numbers, expected equal numbers"):
        nearest_partners(torch.ones(3, 8), torch.ones(3, 4))
