"""Noise on the activations that are trained on."""

import numpy as np
import torch

from cytosae.sae.world import ALONE, World
from cytosae_pipeline.training.init import DataInit
from cytosae_pipeline.training.runs import Run


class InputNoise:
    """Adds Gaussian noise, new in every step, so that a few tokens cannot be learned by heart.

    To second order it is a penalty on the model's derivatives (Bishop 1995, "Training with noise is equivalent to
    Tikhonov regularization"). A step's noise depends only on the seed and the step number: a resumed run adds the same
    noise as an uninterrupted one, and several processes the same as one.

    Args:
        stds: Standard deviation of the noise in every channel, float32, shape `(D,)`.
        seed: Seed of all steps.
        ranks: Processes that have other images of every batch.
    """

    def __init__(self, stds: torch.Tensor, *, seed: int, ranks: World = ALONE) -> None:
        self._stds, self._seed, self._ranks = stds, seed, ranks
        self._generator = torch.Generator(stds.device)

    def add(self, x: torch.Tensor, *, n_images: int, n_done: int) -> torch.Tensor:
        """Activations with a step's noise, as a new tensor.

        Args:
            x: This rank's images of a batch, float32, shape `(B, T, D)`, on the device of `stds`.
            n_images: Images of the whole batch.
            n_done: Steps before this one.
        """
        (seed,) = np.random.SeedSequence([self._seed, n_done]).generate_state(1, np.uint64)
        self._generator.manual_seed(int(seed))
        shape = n_images, *x.shape[1:]
        noise = torch.randn(shape, generator=self._generator, device=x.device, dtype=x.dtype)
        return noise[self._ranks.share(n_images)].mul_(self._stds).add_(x)


def find_noise(run: Run, start: DataInit) -> InputNoise | None:
    """The noise of a run, in terms of the spread of all activations; None for none."""
    if not run.config.input_noise:
        return None
    stds = run.config.input_noise * start.scaling.stds.to(run.device)
    return InputNoise(stds, seed=run.config.seed, ranks=run.token_ranks)
