"""Unexplained variance of images: as numpy computes it, and 1 minus the explained variance on average."""

import numpy as np
import pytest
import torch

from cytosae.statistics.fidelity import FidelityStatistics
from cytosae.statistics.unexplained import unexplained_variance


def test_it_is_what_numpy_computes_and_its_mean_complements_the_explained_variance():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(9, 5, 8, generator=generator) * 3 + 1
    reconstructions = images + torch.randn(9, 5, 8, generator=generator)
    tokens = images.double().numpy().reshape(-1, 8)
    variance = float(((tokens - tokens.mean(axis=0)) ** 2).sum(axis=1).mean())
    found = [unexplained_variance(x, again, variance) for x, again in zip(images, reconstructions, strict=True)]
    errors = (images.double().numpy() - reconstructions.double().numpy()) ** 2
    np.testing.assert_allclose(found, errors.sum(axis=2).mean(axis=1) / variance, rtol=1e-14)
    statistics = FidelityStatistics(8, 1)
    statistics.update(images.flatten(0, 1), torch.zeros(1, dtype=torch.int64), reconstructions.flatten(0, 1))
    assert np.mean(found) == pytest.approx(1 - statistics.overall().explained_variance, rel=1e-6)


def test_a_perfect_reconstruction_leaves_nothing():
    x = torch.ones(4, 3)
    assert unexplained_variance(x, x, 2.0) == 0
