"""The encoder of the statistics for autoencoders of which few latents are active, which a screen finds."""

from collections.abc import Iterator, Sequence

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.statistics.block_encoder import BLOCK_IMAGES, LATENT_CHUNK, ActsHook, ImageEncoder, PooledActs
from cytosae.statistics.screened_encoder import ScreenedEncoder


class ScreenedImageEncoder(ImageEncoder):
    """Computes only latents that can be active: the scores and counts of `BlockEncoder`, up to rounding.

    Args:
        sae: The autoencoder, on the CPU; its decoder is not used.
        encoder: Encodes its tokens.
        thresholds: Thresholds t of the counts `a > t`.
    """

    def __init__(self, sae: Sae, encoder: ScreenedEncoder, thresholds: Sequence[float] = ()) -> None:
        super().__init__(sae, thresholds)
        self._encoder = encoder
        self._zeros = torch.empty(0)

    @torch.no_grad()
    def reduce(self, activations: torch.Tensor, first_row: int, *, on_acts: ActsHook | None = None) -> PooledActs:
        """See `ImageEncoder`."""
        n, n_tokens, width = activations.shape
        scores = torch.empty(n, self.n_latents)
        counts = torch.empty(len(self._thresholds), n, self.n_latents, dtype=torch.int32)
        for start in range(-(first_row % BLOCK_IMAGES), n, BLOCK_IMAGES):
            images = slice(max(start, 0), min(start + BLOCK_IMAGES, n))
            tokens = (activations[images].float() - self._b_dec).view(-1, width)
            for first, acts in self._encoder.encode(tokens):
                latents = slice(first, first + acts.shape[0])
                here = _Images(acts, n_tokens)
                scores[images, latents] = here.scores()
                for number, threshold in enumerate(self._thresholds):
                    counts[number, images, latents] = here.counts_above(threshold)
                end = first
                for dense in self._dense(here) if on_acts is not None else ():
                    start, end = end, end + dense.shape[2]
                    assert on_acts is not None
                    on_acts(images, slice(start, end), dense)
        return PooledActs(scores, counts)

    def _dense(self, images: "_Images") -> Iterator[torch.Tensor]:
        """Activations with zeros, in memory that the next images use again."""
        n_tokens = images.n_images * images.n_tokens
        if len(self._zeros) < n_tokens:
            self._zeros = torch.zeros(n_tokens, LATENT_CHUNK)
        return images.dense(self._zeros[:n_tokens])


class _Images:
    """Activations of the tokens of some images.

    Args:
        acts: A row for each of n latents and a column for each token, without zeros.
        n_tokens: Tokens T of an image.
    """

    def __init__(self, acts: CooMatrix, n_tokens: int) -> None:
        self._acts, self.n_tokens = acts, n_tokens
        self._n_latents, self.n_images = acts.shape[0], acts.shape[1] // n_tokens
        self._places = acts.columns // n_tokens * self._n_latents + acts.rows

    def scores(self) -> torch.Tensor:
        """Mean over all tokens, float32, shape `(n_images, n)`."""
        sums = self._count(self._places, self._acts.values.double())
        return (sums / self.n_tokens).float()

    def counts_above(self, threshold: float) -> torch.Tensor:
        """Tokens above a threshold, int64, shape `(n_images, n)`."""
        if threshold < 0:
            return torch.full((self.n_images, self._n_latents), self.n_tokens)
        return self._count(self._places[self._acts.values > threshold])

    def dense(self, zeros: torch.Tensor) -> Iterator[torch.Tensor]:
        """Activations with zeros, some latents at a time in order, shape `(n_images, T, at most m)`.

        Args:
            zeros: What they are put into, shape `(n_images T, m)`; zero again when the next ones are asked for.
        """
        width = zeros.shape[1]
        for part in self._acts.split_rows([*range(0, self._n_latents, width), self._n_latents]):
            dense = zeros[:, : part.shape[0]]
            dense[part.columns, part.rows] = part.values
            yield dense.view(self.n_images, self.n_tokens, part.shape[0])
            dense[part.columns, part.rows] = 0

    def _count(self, places: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        counts = torch.bincount(places, weights, minlength=self.n_images * self._n_latents)
        return counts.view(self.n_images, self._n_latents)
