"""Accumulators of the statistics: top-k images, mean activations, sparsity, counts per group.

Nothing depends on the order: `update` with any split of the rows and `merge` in any order give the same bits.
"""

from typing import Any, Literal, NamedTuple, Protocol

import torch

from cytosae.statistics.exact_sums import ExactSums, Portable
from cytosae.statistics.ties import pack_keys, unpack_keys

Normalization = Literal["image", "token", "none", "latents"]


class Accumulator(Protocol):
    """State of a statistic that was updated with some of the images; it can be sent to other processes."""

    def merge(self, other: Any) -> None:  # noqa: ANN401 - of the same class
        """Add another accumulator's state for other images."""


class FeatureResult(NamedTuple):
    """Feature data of docs/definitions.md, section 6."""

    indices: torch.Tensor
    """Rows of the k images with the largest scores, int64, shape `(S, k)`; -1 if fewer were active."""
    values: torch.Tensor
    """Their scores, float32, shape `(S, k)`, descending; 0 if fewer were active."""
    mean_acts: torch.Tensor
    """Mean score over the images where the latent is active, float32, shape `(S,)`; 0 if never active."""
    sparsity: torch.Tensor
    """Share of images where the latent is active, float32, shape `(S,)`."""


class FeatureStatistics(Portable):
    """Top-k images, mean activation and sparsity of every latent (docs/definitions.md, section 6).

    Args:
        n_latents: Latents S.
        top_k: Number of images k kept per latent; at least 1.
        device: Device of the state.

    Raises:
        ValueError: If `top_k` is below 1.
    """

    def __init__(self, n_latents: int, top_k: int, *, device: torch.device | str = "cpu") -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        # Keys of cytosae.statistics.ties; 0 is an empty slot.
        self._keys = torch.zeros(n_latents, top_k, dtype=torch.int64, device=device)
        self._sums = ExactSums(n_latents, device=device)
        self._n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_images = 0
        """Images added so far."""

    def update(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Add images; each row at most once, in any order and split.

        Args:
            rows: Row numbers, int64, shape `(n,)`, below 2**32.
            scores: Float32, shape `(n, S)`, all at least 0.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if scores.shape != (len(rows), len(self._keys)):
            raise ValueError(f"scores must be {(len(rows), len(self._keys))}, found {tuple(scores.shape)}")
        rows, scores = rows.to(self._keys.device), scores.to(device=self._keys.device, dtype=torch.float32)
        keys = torch.where(scores > 0, pack_keys(scores, rows[:, None]), 0)
        self._keep(keys.T)
        self._sums.add(scores)
        self._n_active += (scores > 0).sum(dim=0)
        self.n_images += len(rows)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add another accumulator's state for other rows."""
        self._keep(other._keys.to(self._keys.device))
        self._sums.merge(other._sums)
        self._n_active += other._n_active.to(self._n_active.device)
        self.n_images += other.n_images

    def result(self) -> FeatureResult:
        """The statistics so far, on the CPU."""
        keys, sums, n_active = self._keys.cpu(), self._sums.result().cpu(), self._n_active.cpu()
        filled = keys != 0
        best = unpack_keys(keys)
        return FeatureResult(
            indices=torch.where(filled, best.indices, -1),
            values=torch.where(filled, best.values, 0.0),
            mean_acts=torch.where(n_active > 0, sums / n_active.clamp(min=1), 0.0).float(),
            sparsity=(n_active.double() / max(self.n_images, 1)).float(),
        )

    def _keep(self, candidates: torch.Tensor) -> None:
        """Keep the k largest among the current keys and the candidates, shape `(S, n)`."""
        both = torch.cat([self._keys, candidates], dim=1)
        self._keys = both.topk(self._keys.shape[1], dim=1, sorted=True).values


class GroupCounts(Portable):
    """Tokens above thresholds, summed per group, which is a patient or a class (docs/definitions.md, section 7).

    Args:
        n_groups: Groups G.
        n_latents: Latents S.
        n_thresholds: Thresholds.
        occurring: Group of each image that may come, int64, in any order and repeated; -1 is passed over. Only these
            groups take memory. Default all.
        device: Device of the state.
    """

    def __init__(
        self,
        n_groups: int,
        n_latents: int,
        n_thresholds: int,
        *,
        occurring: torch.Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        every = torch.arange(n_groups, device=device)
        self._occurring = every if occurring is None else torch.unique(occurring[occurring >= 0].to(device))
        shape = n_thresholds, len(self._occurring), n_latents
        self._counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self.n_images = torch.zeros(n_groups, dtype=torch.int64, device=device)
        """Images of each group so far, int64, shape `(G,)`."""

    @property
    def counts(self) -> torch.Tensor:
        """Counts so far of all groups, int64, shape `(n_thresholds, G, S)`."""
        return self._counts_of(torch.arange(len(self.n_images), device=self._occurring.device))

    def update(self, groups: torch.Tensor, counts: torch.Tensor) -> None:
        """Add images.

        Args:
            groups: Group of each image, int64, shape `(n,)`; -1 for images without a group, which are left out.
            counts: Tokens above each threshold, integer, shape `(n_thresholds, n, S)`.

        Raises:
            ValueError: If the shapes do not fit, or a group is not one of those that may occur.
        """
        expected = (self._counts.shape[0], len(groups), self._counts.shape[2])
        if counts.shape != expected:
            raise ValueError(f"counts must be {expected}, found {tuple(counts.shape)}")
        groups = groups.to(self._counts.device)
        known = groups >= 0
        slots = torch.searchsorted(self._occurring, groups[known])
        if len(self._occurring) < len(self.n_images):  # otherwise a group is its own slot
            last = len(self._occurring) - 1
            if len(slots) and (last < 0 or not torch.equal(self._occurring[slots.clamp(max=last)], groups[known])):
                raise ValueError("an image belongs to a group that was not among `occurring`")
        self._counts.index_add_(1, slots, counts.to(self._counts.device)[:, known].to(torch.int64))
        self.n_images += torch.bincount(groups[known], minlength=len(self.n_images))

    def merge(self, other: "GroupCounts") -> None:
        """Add another accumulator's state for other rows."""
        theirs = other._occurring.to(self._occurring.device)
        if not torch.equal(self._occurring, theirs):
            both = torch.unique(torch.cat([self._occurring, theirs]))
            self._counts, self._occurring = self._counts_of(both), both
        slots = torch.searchsorted(self._occurring, theirs)
        self._counts.index_add_(1, slots, other._counts.to(self._counts.device))
        self.n_images += other.n_images.to(self.n_images.device)

    def _counts_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Counts of some groups, increasing and with all that occurred among them; 0 for those that did not."""
        if len(groups) == len(self._occurring):
            return self._counts
        n_thresholds, _, n_latents = self._counts.shape
        counts = self._counts.new_zeros(n_thresholds, len(groups), n_latents)
        counts[:, torch.searchsorted(groups, self._occurring)] = self._counts
        return counts


def normalise_counts(counts: torch.Tensor, n_images: torch.Tensor, n_tokens: int, how: Normalization) -> torch.Tensor:
    """Counts as in `cls_sae_cnt.npy` (docs/definitions.md, section 7).

    Args:
        counts: Raw counts of one threshold, int64, shape `(G, S)`.
        n_images: Images of each group, int64, shape `(G,)`.
        n_tokens: Tokens T per image.
        how: `image` divides by the group's number of images, `token` by its number of tokens, `latents` by S (as in
            the published files), `none` leaves counts as they are.

    Returns:
        Float64, shape `(G, S)`; 0 for groups without images.

    Raises:
        ValueError: If `how` is unknown.
    """
    raw = counts.to(torch.float64)
    images = n_images.to(torch.float64).clamp(min=1)[:, None]
    match how:
        case "image":
            return raw / images
        case "token":
            return raw / (images * n_tokens)
        case "latents":
            return raw / counts.shape[1]
        case "none":
            return raw
    raise ValueError(f"normalization must be image, token, none or latents, found {how!r}")
