"""Profiles of chosen latents over many images: histograms of activations, and means per label."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.exact_sums import ExactSums, Portable

BINS_PER_OCTAVE = 2
"""Histogram bins per doubling of the activation."""

LOWEST_EXPONENT, HIGHEST_EXPONENT = -10, 8
"""The histogram spans activations from 2^-10 to 2^8; smaller and larger ones go to the first and last bin."""

N_BINS = (HIGHEST_EXPONENT - LOWEST_EXPONENT) * BINS_PER_OCTAVE


class ProfileResult(NamedTuple):
    """Profiles of M latents over n images with L labels, on the CPU."""

    histogram: torch.Tensor
    """Tokens per bin, int64, shape `(M, N_BINS)`: bin b counts `2^(-10 + b/2) <= a < 2^(-10 + (b+1)/2)`."""
    n_zero: torch.Tensor
    """Tokens on which the latent is inactive, int64, shape `(M,)`."""
    n_active: torch.Tensor
    """Images of each label with a score above 0, int64, shape `(M, L)`."""
    mean_scores: torch.Tensor
    """Mean score of each label's images, active or not, float64, shape `(M, L)`; 0 for labels without images."""
    n_images: torch.Tensor
    """Images of each label, int64, shape `(L,)`."""

    def take(self, latents: npt.NDArray[np.int64]) -> "ProfileResult":
        """The profiles of some latents only, in their order."""
        at = torch.from_numpy(latents)
        return ProfileResult(
            self.histogram[at], self.n_zero[at], self.n_active[at], self.mean_scores[at], self.n_images
        )


class LatentProfiles(Portable):
    """Accumulates profiles, which do not depend on the split of the images or the order of merging.

    Args:
        n_latents: Latents M.
        n_labels: Labels L; images without a label count in the histograms alone.
    """

    def __init__(self, n_latents: int, n_labels: int) -> None:
        self._histogram = torch.zeros(n_latents, N_BINS, dtype=torch.int64)
        self._n_zero = torch.zeros(n_latents, dtype=torch.int64)
        self._n_active = torch.zeros(n_labels, n_latents, dtype=torch.int64)
        self._sums = ExactSums(n_labels, n_latents)
        self._n_images = torch.zeros(n_labels, dtype=torch.int64)

    def update(self, acts: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images.

        Args:
            acts: Activations of the chosen latents, float32, shape `(n, T, M)`, all at least 0.
            labels: Label of each image, int64, shape `(n,)`; -1 for none.

        Raises:
            ValueError: If the shapes do not fit.
        """
        self.count_images(labels)
        self.add(acts, labels, slice(0, len(self._n_zero)))

    def count_images(self, labels: torch.Tensor) -> None:
        """Count images whose activations are passed to `add`, some latents at a time.

        Args:
            labels: Label of each image, int64, shape `(n,)`; -1 for none.
        """
        self._n_images += torch.bincount(labels[labels >= 0], minlength=len(self._n_images))

    def add(self, acts: torch.Tensor, labels: torch.Tensor, latents: slice) -> None:
        """Add activations of some of the latents on some of the images.

        Args:
            acts: Float32, shape `(n, T, m)`, all at least 0.
            labels: Label of each image, int64, shape `(n,)`; -1 for none.
            latents: Which m of the M latents these are.

        Raises:
            ValueError: If the shapes do not fit.
        """
        histogram, n_zero = self._histogram[latents], self._n_zero[latents]
        if acts.ndim != 3 or acts.shape[0] != len(labels) or acts.shape[2] != len(n_zero):
            raise ValueError(
                f"need acts (n, T, {len(n_zero)}) and labels (n,), found {tuple(acts.shape)} and {tuple(labels.shape)}"
            )
        acts = acts.cpu()
        tokens = acts.flatten(0, 1)
        at, latent = tokens.nonzero(as_tuple=True)
        exponents = tokens[at, latent].log2().sub_(LOWEST_EXPONENT).mul_(BINS_PER_OCTAVE)
        bins = exponents.floor_().clamp_(0, N_BINS - 1).to(torch.int64)
        flat = torch.bincount(latent * N_BINS + bins, minlength=histogram.numel())
        histogram += flat.view_as(histogram)
        n_zero += len(tokens) - torch.bincount(latent, minlength=len(n_zero))
        known = labels >= 0
        scores = acts.mean(dim=1)[known]
        self._n_active[:, latents].index_add_(0, labels[known], (scores > 0).to(torch.int64))
        self._sums.add_to(labels[known], scores, latents)

    def merge(self, other: "LatentProfiles") -> None:
        """Add another accumulator's state for other images."""
        for name in ("_histogram", "_n_zero", "_n_active", "_n_images"):
            getattr(self, name).add_(getattr(other, name))
        self._sums.merge(other._sums)

    def result(self) -> ProfileResult:
        """The profiles so far."""
        means = self._sums.result() / self._n_images.clamp(min=1)[:, None]
        return ProfileResult(
            self._histogram.clone(), self._n_zero.clone(), self._n_active.T.clone(), means.T, self._n_images.clone()
        )
