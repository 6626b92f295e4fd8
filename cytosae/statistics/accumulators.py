"""Accumulators of the statistics: top-k images, mean activations, sparsity, and thresholded counts by group.

Every accumulator is exact under any order: `update` with any split of the rows and `merge` in any order give the same
bits for counts and top-k. The encoder that feeds them runs on fixed blocks of rows, because a matrix product rounds
differently with its shape.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from cytosae.sae.base import Sae

BLOCK_IMAGES = 8
"""Images encoded at once, starting at multiples of it, whatever the batch read from disk is."""

LATENT_CHUNK = 4096
"""Latents computed at once: bounds memory at 8 x 257 x 4096 numbers however wide the autoencoder is."""

Normalization = Literal["image", "token", "none", "latents"]

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1


ActsHook = Callable[[slice, slice, torch.Tensor], None]
"""Takes a range of images, a range of latents, and their activations, float32, shape `(n, T, n_latents)`."""


class PooledActs(NamedTuple):
    """What the statistics need of each image."""

    scores: torch.Tensor
    """Mean activation over all tokens (docs/definitions.md, section 6), float32, shape `(n, S)`."""
    counts: torch.Tensor
    """Tokens above each threshold (docs/definitions.md, section 7), int32, shape `(n_thresholds, n, S)`."""


class FeatureResult(NamedTuple):
    """Feature data of docs/definitions.md, section 6."""

    indices: torch.Tensor
    """Rows of the k images with the largest scores, int64, shape `(S, k)`; -1 where fewer were active."""
    values: torch.Tensor
    """Their scores, float32, shape `(S, k)`, falling; 0 where fewer were active."""
    mean_acts: torch.Tensor
    """Mean score over the images where the latent is active, float32, shape `(S,)`; 0 where never active."""
    sparsity: torch.Tensor
    """Share of images where the latent is active, float32, shape `(S,)`."""


class BlockEncoder:
    """Reduces images to scores and counts with the encoder alone, in fixed blocks of rows.

    Args:
        sae: The autoencoder; its decoder is not used.
        thresholds: Thresholds t of the counts `a > t`.
        dtype: Type of the matrix product; sums are float32 in any case.
    """

    def __init__(self, sae: Sae, thresholds: Sequence[float] = (), *, dtype: torch.dtype = torch.float32) -> None:
        self._sae = sae
        self._b_dec = sae.b_dec.detach().float()
        self._bias = sae.b_enc.detach().float()
        # Where latents compete within a token, all are computed at once, for an image at a time.
        whole = sae.needs_whole_rows
        width = len(self._bias) if whole else LATENT_CHUNK
        self._n_at_once = 1 if whole else BLOCK_IMAGES
        self._chunks = [part.contiguous() for part in torch.split(sae.W_enc.detach().to(dtype), width, dim=1)]
        self._thresholds = [float(value) for value in thresholds]
        self._dtype = dtype

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return len(self._bias)

    @torch.no_grad()
    def reduce(self, activations: torch.Tensor, first_row: int, *, on_acts: ActsHook | None = None) -> PooledActs:
        """Scores and counts of consecutive rows.

        Args:
            activations: Shape `(n, T, D)`, any float type; moved to the autoencoder's device.
            first_row: Row number of the first image, which decides where blocks begin.
            on_acts: Called with every block's images, latents and activations before they are pooled.

        Returns:
            One entry an image, on the autoencoder's device.
        """
        n, n_tokens, width = activations.shape
        device = self._bias.device
        scores = torch.empty(n, self.n_latents, device=device)
        counts = torch.empty(len(self._thresholds), n, self.n_latents, dtype=torch.int32, device=device)
        size = self._n_at_once
        for start in range(-(first_row % size), n, size):
            low, high = max(start, 0), min(start + size, n)
            block = torch.zeros(size, n_tokens, width, device=device)
            inside = slice(low - start, high - start)
            block[inside] = activations[low:high].to(device=device, dtype=torch.float32)
            centred = (block - self._b_dec).to(self._dtype).view(-1, width)
            at = 0
            for chunk in self._chunks:
                latents = slice(at, at + chunk.shape[1])
                acts = self._encode(centred, chunk, latents).view(size, n_tokens, -1)
                scores[low:high, latents] = acts.mean(dim=1)[inside]
                for number, threshold in enumerate(self._thresholds):
                    above = (acts > threshold).sum(dim=1, dtype=torch.int32)
                    counts[number, low:high, latents] = above[inside]
                if on_acts is not None:
                    on_acts(slice(low, high), latents, acts[inside])
                at = latents.stop
        return PooledActs(scores, counts)

    def _encode(self, centred: torch.Tensor, weights: torch.Tensor, latents: slice) -> torch.Tensor:
        """Activations of some latents, float32."""
        if self._dtype == torch.float32:
            pre = torch.addmm(self._bias[latents], centred, weights)
        else:
            pre = (centred @ weights).float().add_(self._bias[latents])
        if type(self._sae) is Sae:
            return pre.relu_()
        return self._sae.activate(pre, latents)


class FeatureStatistics:
    """Top-k images, mean activation and sparsity of every latent (docs/definitions.md, section 6).

    Args:
        n_latents: Latents S.
        top_k: Images k kept a latent; at least 1.
        device: Where the state lives.

    Raises:
        ValueError: If `top_k` is below 1.
    """

    def __init__(self, n_latents: int, top_k: int, *, device: torch.device | str = "cpu") -> None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, found {top_k}")
        # One int64 key an entry: the score's bits above, the row's complement below. A positive float's bits grow with
        # its value, so the largest keys are the largest scores with ties broken by the smaller row, and all differ.
        self._keys = torch.zeros(n_latents, top_k, dtype=torch.int64, device=device)
        self._sums = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self._n_active = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.n_images = 0
        """Images counted so far."""

    def update(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        """Count images; each row may come once, in any order and split.

        Args:
            rows: Row numbers, int64, shape `(n,)`, below 2**32.
            scores: Float32, shape `(n, S)`, all at least 0.

        Raises:
            ValueError: If the shapes do not fit.
        """
        if scores.shape != (len(rows), len(self._sums)):
            raise ValueError(f"scores must be {(len(rows), len(self._sums))}, found {tuple(scores.shape)}")
        rows, scores = rows.to(self._keys.device), scores.to(device=self._keys.device, dtype=torch.float32)
        bits = scores.contiguous().view(torch.int32).to(torch.int64)
        keys = torch.where(scores > 0, (bits << _ROW_BITS) | (_ROW_MASK - rows)[:, None], 0)
        self._keep(keys.T)
        self._sums += scores.sum(dim=0, dtype=torch.float64)
        self._n_active += (scores > 0).sum(dim=0)
        self.n_images += len(rows)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add what another accumulator counted on other rows."""
        self._keep(other._keys.to(self._keys.device))
        self._sums += other._sums.to(self._sums.device)
        self._n_active += other._n_active.to(self._n_active.device)
        self.n_images += other.n_images

    def result(self) -> FeatureResult:
        """The statistics so far, on the CPU."""
        keys, sums, n_active = self._keys.cpu(), self._sums.cpu(), self._n_active.cpu()
        filled = keys != 0
        values = (keys >> _ROW_BITS).to(torch.int32).view(torch.float32)
        return FeatureResult(
            indices=torch.where(filled, _ROW_MASK - (keys & _ROW_MASK), -1),
            values=torch.where(filled, values, 0.0),
            mean_acts=torch.where(n_active > 0, sums / n_active.clamp(min=1), 0.0).float(),
            sparsity=(n_active.double() / max(self.n_images, 1)).float(),
        )

    def _keep(self, candidates: torch.Tensor) -> None:
        """Keep the k largest keys among those held and the candidates, shape `(S, n)`."""
        both = torch.cat([self._keys, candidates], dim=1)
        self._keys = both.topk(self._keys.shape[1], dim=1, sorted=True).values


class GroupCounts:
    """Tokens above thresholds, summed per group: patients or classes (docs/definitions.md, section 7).

    Args:
        n_groups: Groups G.
        n_latents: Latents S.
        n_thresholds: Thresholds.
        device: Where the state lives.
    """

    def __init__(self, n_groups: int, n_latents: int, n_thresholds: int, *, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(n_thresholds, n_groups, n_latents, dtype=torch.int64, device=device)
        """Counts so far, int64, shape `(n_thresholds, G, S)`."""
        self.n_images = torch.zeros(n_groups, dtype=torch.int64, device=device)
        """Images of each group so far, int64, shape `(G,)`."""

    def update(self, groups: torch.Tensor, counts: torch.Tensor) -> None:
        """Count images.

        Args:
            groups: Group of each image, int64, shape `(n,)`; -1 for images of no group, which are left out.
            counts: Tokens above each threshold, integer, shape `(n_thresholds, n, S)`.

        Raises:
            ValueError: If the shapes do not fit.
        """
        expected = (self.counts.shape[0], len(groups), self.counts.shape[2])
        if counts.shape != expected:
            raise ValueError(f"counts must be {expected}, found {tuple(counts.shape)}")
        groups = groups.to(self.counts.device)
        known = groups >= 0
        self.counts.index_add_(1, groups[known], counts.to(self.counts.device)[:, known].to(torch.int64))
        self.n_images += torch.bincount(groups[known], minlength=len(self.n_images))

    def merge(self, other: "GroupCounts") -> None:
        """Add what another accumulator counted on other rows."""
        self.counts += other.counts.to(self.counts.device)
        self.n_images += other.n_images.to(self.n_images.device)


def normalise_counts(counts: torch.Tensor, n_images: torch.Tensor, n_tokens: int, how: Normalization) -> torch.Tensor:
    """Counts as `cls_sae_cnt.npy` holds them (docs/definitions.md, section 7).

    Args:
        counts: Raw counts of one threshold, int64, shape `(G, S)`.
        n_images: Images of each group, int64, shape `(G,)`.
        n_tokens: Tokens T an image.
        how: `image` divides by the group's images, `token` by its tokens, `latents` by S (what the published files
            hold), `none` not at all.

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
