"""The encoder of the statistics, which reduces every image to scores and counts.

It runs on fixed blocks of rows, because the rounding of a matrix product depends on its shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.devices import runs_ahead

BLOCK_IMAGES = 8
"""Images encoded together; blocks start at multiples of it, independently of the batches read from disk."""

LATENT_CHUNK = 2048
"""Latents computed together: bounds memory to 8 x 257 x 2048 numbers for any width of the autoencoder.

They are 17 MB. From 32 MB on, the C library takes new memory for every block, which costs a third of the product.
"""

LATENT_CHUNK_GPU = 16_384
"""The same on a GPU, where every block starts some twenty small kernels."""

ActsHook = Callable[[slice, slice, torch.Tensor], None]
"""Takes a range of images, a range of latents, and their activations, float32, shape `(n, T, n_latents)`, which are
valid until it returns."""


class PooledActs(NamedTuple):
    """Activations of each image, pooled over its tokens."""

    scores: torch.Tensor
    """Mean activation over all tokens (docs/definitions.md, section 6), float32, shape `(n, S)`."""
    counts: torch.Tensor
    """Tokens above each threshold (docs/definitions.md, section 7), int32, shape `(n_thresholds, n, S)`."""


class ImageEncoder(ABC):
    """Encodes images and reduces them to scores and counts; no bit depends on how rows are split.

    Args:
        sae: The autoencoder; its decoder is not used.
        thresholds: Thresholds t of the counts `a > t`.
    """

    def __init__(self, sae: Sae, thresholds: Sequence[float]) -> None:
        self._sae = sae
        self._b_dec = sae.b_dec.detach().float()
        self._bias = sae.b_enc.detach().float()
        self._thresholds = [float(value) for value in thresholds]

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return len(self._bias)

    @property
    def device(self) -> torch.device:
        """Device of the autoencoder, and of what is computed."""
        return self._bias.device

    @abstractmethod
    def reduce(self, activations: torch.Tensor, first_row: int, *, on_acts: ActsHook | None = None) -> PooledActs:
        """Scores and counts of consecutive rows.

        Args:
            activations: Shape `(n, T, D)`, any float type; moved to the autoencoder's device.
            first_row: Row number of the first image, which determines where blocks begin.
            on_acts: Called with every block's images, latents and activations before they are pooled.

        Returns:
            One entry per image, on the autoencoder's device.
        """


class BlockEncoder(ImageEncoder):
    """Computes all latents of fixed blocks of rows.

    Args:
        sae: The autoencoder; its decoder is not used.
        thresholds: Thresholds t of the counts `a > t`.
        dtype: Type of the factors of the matrix product; sums are always float32.
    """

    def __init__(self, sae: Sae, thresholds: Sequence[float] = (), *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(sae, thresholds)
        # If latents compete within a token, all are computed together, one image at a time.
        whole = sae.needs_whole_rows
        chunk = LATENT_CHUNK_GPU if runs_ahead(self.device) else LATENT_CHUNK
        width = len(self._bias) if whole else chunk
        self._n_at_once = 1 if whole else BLOCK_IMAGES
        self._chunks = [part.contiguous() for part in torch.split(sae.W_enc.detach().to(dtype), width, dim=1)]
        self._dtype = dtype

    @torch.no_grad()
    def reduce(self, activations: torch.Tensor, first_row: int, *, on_acts: ActsHook | None = None) -> PooledActs:
        """See `ImageEncoder`."""
        n, n_tokens, width = activations.shape
        device = self._bias.device
        # CPU-GPU sync point, once for all blocks.
        activations = activations.to(device)
        scores = torch.empty(n, self.n_latents, device=device)
        counts = torch.empty(len(self._thresholds), n, self.n_latents, dtype=torch.int32, device=device)
        size = self._n_at_once
        for start in range(-(first_row % size), n, size):
            low, high = max(start, 0), min(start + size, n)
            block = torch.zeros(size, n_tokens, width, device=device)
            inside = slice(low - start, high - start)
            block[inside] = activations[low:high].float()
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
        return self._sae.activate_(pre, latents)
