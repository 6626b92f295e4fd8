"""Noise on the activations that are trained on: its spread, and that it depends on seed and step alone."""

import numpy as np
import pytest
import torch

from cytosae.sae.world import World
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.training.init import find_scaling
from cytosae_pipeline.training.noise import InputNoise

N_IMAGES, N_TOKENS = 30, 40
STDS = torch.tensor([0.1, 1.0, 0.0, 3.0])


class _Rank(World):
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def _make_x():
    return torch.randn(N_IMAGES, N_TOKENS, len(STDS), generator=torch.Generator().manual_seed(0))


def _noise(n_done, *, seed=7):
    x = _make_x()
    return InputNoise(STDS, seed=seed).add(x, n_images=N_IMAGES, n_done=n_done) - x


def test_noise_has_the_spread_of_its_channel():
    noise = _noise(3).flatten(0, 1)
    torch.testing.assert_close(noise.std(dim=0), STDS, rtol=0.1, atol=1e-6)
    assert (noise.mean(dim=0).abs() <= 0.1 * STDS + 1e-6).all()


def test_noise_depends_on_seed_and_step_alone():
    x = _make_x()
    before = x.clone()
    noise = InputNoise(STDS, seed=7)
    found = [noise.add(x, n_images=N_IMAGES, n_done=number) for number in (3, 4, 3)]
    assert torch.equal(x, before)  # other autoencoders are trained on it, too
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[0], InputNoise(STDS, seed=7).add(x, n_images=N_IMAGES, n_done=3))
    assert not torch.allclose(_noise(3), _noise(3, seed=8))
    for one, other in ((_noise(3), _noise(4)), (_noise(3), _noise(3, seed=8))):
        assert abs(np.corrcoef(one[..., 1].flatten(), other[..., 1].flatten())[0, 1]) < 0.1


@pytest.mark.parametrize("n_images", [30, 29, 2])
def test_ranks_add_what_a_single_process_adds(n_images):
    x = _make_x()[:n_images]
    wanted = InputNoise(STDS, seed=7).add(x, n_images=n_images, n_done=5)
    ranks = [_Rank(number, 3) for number in range(3)]
    parts = [
        InputNoise(STDS, seed=7, ranks=rank).add(x[rank.share(n_images)], n_images=n_images, n_done=5) for rank in ranks
    ]
    assert torch.equal(torch.cat(parts), wanted)


def test_noise_is_in_terms_of_the_channels_spread(with_store, monkeypatch):
    from cytosae.training.step import TrainStep

    seen = []
    step = TrainStep.step

    def watched(self, x, **more):
        seen.append(x.clone())
        return step(self, x, **more)

    monkeypatch.setattr(TrainStep, "step", watched)
    options = ("--run_name", "r", "--total_training_tokens", 24, "--batch_size", 24, "--standardise")
    with_store.train(*options)
    with_store.train(*options[2:], "--run_name", "noisy", "--input_noise", 0.5)
    scaling = find_scaling([ActivationStore.open(with_store.store)])
    noise = (seen[1] - seen[0]).flatten(0, 1) * scaling.scale
    torch.testing.assert_close(noise.std(dim=0), 0.5 * scaling.stds, rtol=0.25, atol=1e-6)
