"""Any images of a store, encoded in their order: for statistics of a sample."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.accumulators import GroupCounts
from cytosae.statistics.block_encoder import PooledActs
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_pipeline.config import PassOptions
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import make_encoder, require_batch_memory, rows_at_once
from cytosae_pipeline.statistics.inputs import Inputs


class EncodedRows(NamedTuple):
    """Some of the requested images."""

    at: slice
    """Their positions among the requested rows."""
    activations: torch.Tensor
    """Activations, shape `(n, T, D)`; valid until the next are asked for."""
    pooled: PooledActs
    """What was pooled of each."""


def open_rows(inputs: Inputs, config: PassOptions) -> StoreReader:
    """A reader of scattered images."""
    size = inputs.store.n_images * inputs.store.spec.record_bytes
    return StoreReader(inputs.store, verify=not config.no_verify, direct=exceeds_page_cache(size))


def iter_encoded(
    inputs: Inputs,
    config: PassOptions,
    reader: StoreReader,
    rows: IntArray,
    advance: Callable[[int], None],
    thresholds: Sequence[float] = (),
) -> Iterator[EncodedRows]:
    """Encode the given rows in their order, read ahead of the encoder.

    Args:
        inputs: Autoencoder and store.
        config: Batch size and precision; results do not depend on the batch size.
        reader: A reader of the store.
        rows: Rows, shape `(n,)`.
        advance: Called with the number of images after each batch.
        thresholds: Thresholds of the counts.

    Raises:
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    encoder, n_at_once = make_encoder(inputs, config, thresholds), rows_at_once(config, len(rows))
    require_batch_memory(inputs, n_at_once)

    def read(start: int, buffer: npt.NDArray[Any]) -> tuple[int, npt.NDArray[Any]]:
        part = rows[start : start + n_at_once]
        reader.read_rows(part, buffer[: len(part)])
        return start, buffer[: len(part)]

    shape = (min(n_at_once, len(rows)), *inputs.store.spec.image_shape)
    plans = range(0, len(rows), n_at_once)
    for start, values in Prefetcher(plans, read, lambda: aligned_buffer(shape, inputs.store.dtype)):
        activations = torch.from_numpy(values)
        # An image's position among the rows determines its block, so that blocks are full although rows are scattered.
        pooled = encoder.reduce(activations, start)
        yield EncodedRows(slice(start, start + len(values)), activations, pooled)
        advance(len(values))


def count_rows(
    inputs: Inputs,
    config: PassOptions,
    rows: IntArray,
    groups: npt.NDArray[np.integer],
    n_groups: int,
    threshold: float,
) -> npt.NDArray[np.int64]:
    """Tokens above a threshold in some images, by group (docs/definitions.md, section 7).

    Args:
        inputs: Autoencoder and store.
        config: Batch size and precision.
        rows: Rows of readable images, increasing, shape `(n,)`.
        groups: Group of each of them, shape `(n,)`.
        n_groups: Groups G.
        threshold: The threshold.

    Returns:
        Int64, shape `(G, S)`.
    """
    counts, numbers = GroupCounts(n_groups, inputs.n_latents, 1), torch.from_numpy(np.asarray(groups, dtype=np.int64))
    with (
        open_rows(inputs, config) as reader,
        Progress("count equal numbers of images", len(rows), "images") as bar,
    ):
        for images in iter_encoded(inputs, config, reader, rows, bar.advance, [threshold]):
            counts.update(numbers[images.at], images.pooled.counts.cpu())
    return counts.counts[0].numpy()
