"""The scores of some images of a store, a batch at a time, as often as they are wanted."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy.typing as npt
import torch

from cytosae_cache.format.spec import TokenLayout
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import aligned_buffer
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.statistics.encode import make_encoder, require_batch_memory, rows_at_once
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.init import choose_tokens

Tokens = Literal["all", "patches", "cls"]


class ScoredImages(NamedTuple):
    """Some of the images."""

    at: slice
    """Their positions among all that were asked for."""
    activations: torch.Tensor
    """All their tokens, as stored, shape `(n, T, D)`; valid until the next are asked for."""
    tokens: torch.Tensor
    """The chosen tokens among them, shape `(n, t, D)`."""
    scores: torch.Tensor
    """Mean activation of each latent over the chosen tokens, float32, shape `(n, S)`."""


class ImageScores:
    """Encodes the same images whenever it is iterated over; memory does not grow with their number.

    Args:
        inputs: Autoencoder and store.
        rows: Rows of readable images, shape `(n,)`; fastest if they increase.
        tokens: Which tokens are encoded.
        no_verify: Skip checksums while reading.

    Raises:
        NotEnoughMemoryError: If a batch does not fit into memory.
    """

    def __init__(self, inputs: Inputs, rows: IntArray, tokens: Tokens, *, no_verify: bool = False) -> None:
        self.inputs, self.rows, self.tokens = inputs, rows, tokens
        self._config = PassOptions(no_verify=no_verify)
        self._n_at_once = rows_at_once(self._config, len(rows))
        require_batch_memory(inputs, self._n_at_once)
        self._encoder = make_encoder(inputs, self._config)

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return self.inputs.n_latents

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ScoredImages]:
        store, n_at_once = self.inputs.store, self._n_at_once
        parts = [slice(start, min(start + n_at_once, len(self))) for start in range(0, len(self), n_at_once)]
        direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
        shape = (min(n_at_once, len(self)), *store.spec.image_shape)
        with store.open_reader(verify=not self._config.no_verify, direct=direct) as reader:

            def read(part: slice, buffer: npt.NDArray[Any]) -> tuple[slice, npt.NDArray[Any]]:
                values = buffer[: part.stop - part.start]
                reader.read_rows(self.rows[part], values)
                return part, values

            for part, values in Prefetcher(parts, read, lambda: aligned_buffer(shape, store.dtype)):
                activations = torch.from_numpy(values)
                chosen = choose_tokens(activations, self.tokens, store.spec.tokens)
                # An image's position among the rows decides its block: the bits do not depend on the batch size.
                yield ScoredImages(part, activations, chosen, self._encoder.reduce(chosen, part.start).scores)


def mean_tokens(tokens: torch.Tensor) -> torch.Tensor:
    """Mean token of each image, float64, shape `(n, D)`; one image at a time, so that the wide copy is small.

    Args:
        tokens: Shape `(n, t, D)`.
    """
    return torch.stack([image.double().mean(dim=0) for image in tokens])


def embed(images: ScoredImages, layout: TokenLayout) -> torch.Tensor:
    """The encoder's own embedding of each image: the CLS token where there is one, else the mean of all tokens.

    Args:
        images: The images.
        layout: Kinds of their tokens.

    Returns:
        Float64, shape `(n, D)`.
    """
    return images.activations[:, 0].double() if layout.n_cls else mean_tokens(images.activations)
