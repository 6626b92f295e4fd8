"""Profiles of latents against numpy on all images at once."""

import numpy as np
import pytest
import torch

from cytosae.statistics.histograms import BINS_PER_OCTAVE, LOWEST_EXPONENT, N_BINS, LatentProfiles


def _data(n=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randn(n, 6, 4, generator=generator).relu() * torch.tensor([1e-5, 0.1, 3.0, 1e4])
    acts[0, 0, 1] = 2.0**-3  # an edge belongs to the bin above it
    return acts, torch.arange(n) % 4 - 1


def test_profiles_equal_numpy():
    acts, labels = _data()
    profiles = LatentProfiles(4, 3)
    profiles.update(acts, labels)
    found = profiles.result()
    edges = 2.0 ** (LOWEST_EXPONENT + np.arange(N_BINS + 1) / BINS_PER_OCTAVE)
    edges[0], edges[-1] = 0, np.inf
    for latent in range(4):
        tokens = acts[..., latent].double().numpy().ravel()
        expected = np.histogram(tokens[tokens > 0], edges)[0]
        assert found.histogram[latent].tolist() == expected.tolist()
        assert int(found.n_zero[latent]) == (tokens == 0).sum()
        for label in range(3):
            scores = acts[labels == label, :, latent].mean(dim=1).double()
            assert int(found.n_active[latent, label]) == int((scores > 0).sum())
            assert float(found.mean_scores[latent, label]) == pytest.approx(float(scores.mean()), rel=1e-6)
    assert found.n_images.tolist() == [int((labels == label).sum()) for label in range(3)]
    assert int(found.histogram[1, -LOWEST_EXPONENT * BINS_PER_OCTAVE - 3 * BINS_PER_OCTAVE]) >= 1


@pytest.mark.parametrize("splits", [[1] * 13, [5, 8], [12, 1]])
def test_any_split_and_merge_gives_the_same(splits):
    acts, labels = _data()
    whole = LatentProfiles(4, 3)
    whole.update(acts, labels)
    parts = []
    for one, some in zip(acts.split(splits), labels.split(splits), strict=True):
        parts.append(LatentProfiles(4, 3))
        parts[-1].update(one, some)
    merged = parts.pop()
    for part in parts:
        merged.merge(part)
    for name, value in whole.result()._asdict().items():
        assert torch.equal(getattr(merged.result(), name), value)


def test_labels_without_images_and_no_labels_at_all():
    profiles = LatentProfiles(4, 0)
    profiles.update(_data()[0], torch.full((13,), -1))
    assert profiles.result().mean_scores.shape == (4, 0)
    assert LatentProfiles(2, 3).result().mean_scores.tolist() == [[0.0] * 3] * 2


def test_shapes_must_fit():
    with pytest.raises(ValueError, match=r"need acts \(n, T, 4\) and labels \(n,\), found \(13, 6, 4\) and \(12,\)"):
        LatentProfiles(4, 3).update(_data()[0], torch.zeros(12, dtype=torch.int64))
