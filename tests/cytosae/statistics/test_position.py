"""Position shares against plain correlations, and on planted latents."""

import numpy as np
import pytest
import torch

from cytosae.analysis.specificity import POSITION_LIMIT, depends_on_position
from cytosae.statistics.position import MIN_IMAGES, PositionMaps

N, P = 40, 64


@pytest.fixture
def acts():
    """Planted latents: a fixed position, content that moves, both, a constant one, a rare one, a dead one."""
    rng = np.random.default_rng(0)
    found = np.zeros((N, P, 6), np.float32)
    strength = rng.uniform(0.1, 10, size=(N, 1)).astype(np.float32)
    found[:, :8, 0] = strength * rng.uniform(0.8, 1.2, size=(N, 8))
    for image in range(N):
        at = rng.integers(0, P - 8)
        found[image, at : at + 8, 1] = strength[image]
        found[image, at : at + 8, 2] = 1
    found[:, :4, 2] += 0.7
    found[:, :, 3] = strength
    found[: MIN_IMAGES - 1, :8, 4] = 1
    return torch.from_numpy(found)


def test_the_share_is_the_mean_correlation_of_two_images_maps(acts):
    maps = PositionMaps(6, P)
    maps.add(acts, slice(0, 6))
    share = maps.result().numpy()
    for latent in range(3):
        plain = np.corrcoef(acts[:, :, latent].numpy().astype(np.float64))
        pairs = plain[np.triu_indices(N, 1)]
        assert share[latent] == pytest.approx(pairs.mean(), abs=1e-5)
    assert share[3:].tolist() == [-1, -1, -1], "a constant map, too few images, a dead latent"


def test_only_the_latent_of_a_fixed_position_is_flagged(acts):
    maps = PositionMaps(6, P)
    maps.add(acts, slice(0, 6))
    share = maps.result().numpy()
    assert depends_on_position(share).tolist() == [True, False, False, False, False, False]
    assert share[0] > 0.9
    assert abs(share[1]) < 0.1
    assert 0 < share[2] < POSITION_LIMIT


def test_parts_and_merging_give_the_same(acts):
    whole, one, other = PositionMaps(6, P), PositionMaps(6, P), PositionMaps(6, P)
    whole.add(acts, slice(0, 6))
    one.add(acts[:13, :, :2], slice(0, 2))
    one.add(acts[:13, :, 2:], slice(2, 6))
    other.add(acts[13:], slice(0, 6))
    other.merge(one)
    torch.testing.assert_close(other.result(), whole.result())


def test_no_bit_depends_on_the_order_of_images_or_merging(acts):
    whole, one, other = PositionMaps(6, P), PositionMaps(6, P), PositionMaps(6, P)
    whole.add(acts, slice(0, 6))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    one.add(acts[order[:13]], slice(0, 6))
    other.add(acts[order[13:]], slice(0, 6))
    one.merge(other)
    assert torch.equal(one.result(), whole.result())


def test_shapes_are_checked_and_images_without_patches_have_no_position(acts):
    with pytest.raises(ValueError, match=r"acts must be \(n, 64, 2\), found \(40, 64, 6\)"):
        PositionMaps(6, P).add(acts, slice(0, 2))
    maps = PositionMaps(3, 0)
    maps.add(torch.zeros(20, 0, 3), slice(0, 3))
    assert maps.result().tolist() == [-1, -1, -1]
