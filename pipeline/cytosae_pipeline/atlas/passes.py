"""One pass over images of a store that judges each of them: those of the reference and new ones alike."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.unexplained import unexplained_variance
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import aligned_buffer
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.evaluation.image_scores import Tokens
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.statistics.encode import make_encoder, require_batch_memory, rows_at_once
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.training.evaluation import reconstruct
from cytosae_pipeline.training.init import choose_tokens
from cytosae_pipeline.training.matmul import fp32_matmul


class JudgedImages(NamedTuple):
    """Some images."""

    rows: IntArray
    """Their rows in the store, shape `(n,)`."""
    scores: npt.NDArray[np.float32]
    """Score of each latent, shape `(n, S)`."""
    counts: npt.NDArray[np.int32]
    """Tokens above the threshold, shape `(n, S)`."""
    unexplained: npt.NDArray[np.float64]
    """Unexplained variance of each image, shape `(n,)`."""


def judge_images(
    inputs: Inputs,
    rows: IntArray,
    *,
    tokens: Tokens,
    threshold: float,
    variance: float,
    options: PassOptions,
    advance: Callable[[int], None],
) -> Iterator[JudgedImages]:
    """Scores, counts and reconstruction of images, a batch at a time; memory does not grow with their number.

    Args:
        inputs: Autoencoder, with its decoder, and store.
        rows: Rows of readable images, increasing, shape `(n,)`.
        tokens: Tokens by which reconstruction is judged; scores and counts are of all.
        threshold: Activation above which a token counts.
        variance: Variance of the reference.
        options: How images are read and encoded.
        advance: Called with the number of images after each batch.

    Raises:
        NotEnoughMemoryError: If a batch does not fit into memory.
    """
    store, sae = inputs.store, inputs.sae
    n_at_once = rows_at_once(options, len(rows))
    require_batch_memory(inputs, n_at_once, 1)
    encoder, matmul = make_encoder(inputs, options, (threshold,)), fp32_matmul(sae.b_enc.device)
    parts = [slice(start, min(start + n_at_once, len(rows))) for start in range(0, len(rows), n_at_once)]
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    shape = (min(n_at_once, len(rows)), *store.spec.image_shape)
    with store.open_reader(verify=not options.no_verify, direct=direct) as reader:

        def read(part: slice, buffer: npt.NDArray[Any]) -> tuple[slice, npt.NDArray[Any]]:
            values = buffer[: part.stop - part.start]
            reader.read_rows(rows[part], values)
            return part, values

        for part, values in Prefetcher(parts, read, lambda: aligned_buffer(shape, store.dtype)):
            activations = torch.from_numpy(values)
            pooled = encoder.reduce(activations, part.start)
            unexplained = np.empty(len(values))
            # One image at a time: a product rounds differently with its shape.
            for at, image in enumerate(choose_tokens(activations, tokens, store.spec.tokens)):
                x = image.to(sae.b_enc.device).float()
                with torch.no_grad():
                    unexplained[at] = unexplained_variance(x, reconstruct(sae, x, matmul)[1], variance)
            yield JudgedImages(rows[part], pooled.scores.cpu().numpy(), pooled.counts[0].cpu().numpy(), unexplained)
            advance(len(values))
