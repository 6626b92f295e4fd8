"""Pearson correlations between the scores of two autoencoders' latents over the same images, in two passes."""

from typing import NamedTuple

import torch

_CONSTANT = 1e-12
"""Scores count as constant if their variance is at most this share of their mean square: float64 rounding."""


class ScoreMoments:
    """Mean, spread and activity of every latent's scores; state in float64 of S numbers.

    Args:
        n_latents: Latents S.
        device: Device of the state, which has float64.
    """

    def __init__(self, n_latents: int, *, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self._squares = torch.zeros_like(self._sums)
        self.n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """Images on which each latent is active, int64, shape `(S,)`."""
        self.n_images = 0
        """Images so far."""

    def update(self, scores: torch.Tensor) -> None:
        """Add images.

        Args:
            scores: Shape `(n, S)`, at least 0.
        """
        wide = scores.to(self._sums)
        self._sums += wide.sum(dim=0)
        self._squares += wide.square().sum(dim=0)
        self.n_active += (wide > 0).sum(dim=0)
        self.n_images += len(scores)

    def merge(self, other: "ScoreMoments") -> None:
        """Add the moments of other images."""
        self._sums += other._sums.to(self._sums.device)
        self._squares += other._squares.to(self._sums.device)
        self.n_active += other.n_active.to(self._sums.device)
        self.n_images += other.n_images

    @property
    def mean(self) -> torch.Tensor:
        """Mean score, float64, shape `(S,)`."""
        return self._sums / max(self.n_images, 1)

    @property
    def scale(self) -> torch.Tensor:
        """Population standard deviation, float64, shape `(S,)`; infinite where scores do not vary."""
        squares = self._squares / max(self.n_images, 1)
        variance = squares - self.mean.square()
        return torch.where(variance > _CONSTANT * squares, variance.clamp(min=0).sqrt(), torch.inf)

    def standardise(self, scores: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Scores of some latents less their mean over their standard deviation; 0 for those that do not vary.

        Args:
            scores: Shape `(n, S)`.
            latents: Which latents, int64, shape `(m,)`.

        Returns:
            Float64, shape `(n, m)`.
        """
        wide = scores.to(self._sums.device)[:, latents].double()
        return (wide - self.mean[latents]) / self.scale[latents]


class CrossCorrelations:
    """Correlation of each of m latents of one autoencoder with each of n latents of another; state of m x n float64.

    Args:
        first: Moments of all images of the first autoencoder.
        second: Moments of the second.
        first_latents: The m latents of the first, int64.
        second_latents: The n latents of the second, int64.
    """

    def __init__(
        self, first: ScoreMoments, second: ScoreMoments, first_latents: torch.Tensor, second_latents: torch.Tensor
    ) -> None:
        self._first, self._second = first, second
        self._rows, self._columns = first_latents.to(first.mean.device), second_latents.to(second.mean.device)
        shape = len(first_latents), len(second_latents)
        self._products = torch.zeros(shape, dtype=torch.float64, device=first.mean.device)

    def update(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """Add images.

        Args:
            first: Scores of the first autoencoder, shape `(n, S)`.
            second: Scores of the second on the same images, shape `(n, S')`.
        """
        one = self._first.standardise(first, self._rows)
        other = self._second.standardise(second, self._columns).to(one.device)
        self._products.addmm_(one.T, other)

    def result(self) -> torch.Tensor:
        """Pearson's correlation, float64, shape `(m, n)`; 0 where scores do not vary."""
        return (self._products / max(self._first.n_images, 1)).clamp_(-1, 1)


class BestPartners(NamedTuple):
    """The most similar latent of the other autoencoder, whether or not another latent has the same one."""

    latent: torch.Tensor
    """Int64, shape `(n,)`; -1 if there is none."""
    similarity: torch.Tensor
    """Float64, shape `(n,)`; -inf if there is none."""

    @classmethod
    def empty(cls, n: int) -> "BestPartners":
        """No partners yet."""
        return cls(torch.full((n,), -1), torch.full((n,), -torch.inf, dtype=torch.float64))

    def improve(self, at: slice | torch.Tensor, candidates: torch.Tensor, similarity: torch.Tensor) -> None:
        """Take candidates that are more similar; the earlier stays among equals.

        Args:
            at: Which entries; numbers are each there once.
            candidates: Int64, one for each of them.
            similarity: Their similarity.
        """
        better = similarity.cpu() > self.similarity[at]
        self.latent[at] = torch.where(better, candidates.cpu(), self.latent[at])
        self.similarity[at] = torch.where(better, similarity.cpu(), self.similarity[at])
