"""How often and how strongly each latent is active on the images of each label."""

from typing import NamedTuple

import torch

from cytosae.statistics.exact_sums import ExactSums, Portable


class LabelActivityResult(NamedTuple):
    """Activity of S latents on images of L labels, on the CPU."""

    n_images: torch.Tensor
    """Images of each label, int64, shape `(L,)`."""
    n_active: torch.Tensor
    """Those of them on which the latent is active, int64, shape `(S, L)`."""
    mean_scores: torch.Tensor
    """Mean score over each label's images, active or not, float32, shape `(S, L)`; 0 for labels without images."""


class LabelActivity(Portable):
    """Accumulates activity per label; images without a label are left out.

    Args:
        n_latents: Latents S.
        n_labels: Labels L.
        device: Device of the state.
    """

    def __init__(self, n_latents: int, n_labels: int, *, device: torch.device | str = "cpu") -> None:
        self._n_images = torch.zeros(n_labels, dtype=torch.int64, device=device)
        self._n_active = torch.zeros(n_labels, n_latents, dtype=torch.int64, device=device)
        self._sums = ExactSums(n_labels, n_latents, device=device)

    def update(self, labels: torch.Tensor, scores: torch.Tensor) -> None:
        """Add images.

        Args:
            labels: Label of each image, int64, shape `(n,)`; -1 for none.
            scores: Scores of docs/definitions.md, section 6, shape `(n, S)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if scores.shape != (len(labels), self._n_active.shape[1]):
            raise ValueError(f"scores must be {(len(labels), self._n_active.shape[1])}, found {tuple(scores.shape)}")
        known, device = labels >= 0, self._n_active.device
        labels = labels[known].to(device)
        scores = scores[known.to(scores.device)].to(device)
        self._n_images += torch.bincount(labels, minlength=len(self._n_images))
        self._n_active.index_add_(0, labels, (scores > 0).to(torch.int64))
        self._sums.add_to(labels, scores)

    def merge(self, other: "LabelActivity") -> None:
        """Add another accumulator's state for other images."""
        self._n_images += other._n_images.to(self._n_images.device)
        self._n_active += other._n_active.to(self._n_active.device)
        self._sums.merge(other._sums)

    def result(self) -> LabelActivityResult:
        """The activity so far."""
        means = self._sums.result() / self._n_images.clamp(min=1)[:, None]
        return LabelActivityResult(
            self._n_images.cpu().clone(), self._n_active.T.cpu().contiguous(), means.T.float().cpu().contiguous()
        )
