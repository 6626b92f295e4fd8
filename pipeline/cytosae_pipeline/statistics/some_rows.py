"""Any images of a store, encoded in their order: for statistics of a sample."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.accumulators import GroupCounts
from cytosae.statistics.block_encoder import PooledActs
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import aligned_buffer
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.runtime.memory import exceeds_page_cache
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import is_screened, make_encoder, require_batch_memory, rows_at_once
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.streaming import iter_parts, split_evenly

T = TypeVar("T")


class EncodedRows(NamedTuple):
    """Some of the requested images."""

    at: slice
    """Their positions among the requested rows."""
    activations: torch.Tensor
    """Activations, shape `(n, T, D)`; valid until the next are asked for."""
    pooled: PooledActs
    """What was pooled of each."""


def encode_rows(
    inputs: Inputs,
    config: StatisticsOptions,
    rows: IntArray,
    function: Callable[[EncodedRows], T],
    advance: Callable[[int], None],
    thresholds: Sequence[float] = (),
) -> Iterator[T]:
    """What a function makes of the given images, a batch at a time, in their order.

    Workers encode them if the options name a cluster; the results are the same.

    Args:
        inputs: Autoencoder and store.
        config: Batch size and precision, on which results do not depend, and the cluster.
        rows: Increasing row numbers, shape `(n,)`.
        function: What is to be made of a batch; picklable, as is its result, which must be independent of the batch's
            memory.
        advance: Called with the number of images after each batch.
        thresholds: Thresholds of the counts.

    Raises:
        NotEnoughMemoryError: If the batch size does not fit into memory.
        ClusterError: If the cluster cannot be used.
    """
    n_at_once = rows_at_once(config, len(rows))
    require_batch_memory(inputs, n_at_once)
    screened = None if config.dask is None else is_screened(inputs, config)
    parts = split_evenly(len(rows), n_at_once)
    encode = functools.partial(_encode, config, rows, function, tuple(thresholds), screened)
    for part, found in zip(parts, iter_parts(inputs, config, encode, parts), strict=True):
        yield found
        advance(len(part))


def count_rows(
    inputs: Inputs,
    config: StatisticsOptions,
    rows: IntArray,
    groups: npt.NDArray[np.integer],
    n_groups: int,
    threshold: float,
) -> npt.NDArray[np.int64]:
    """Tokens above a threshold in some images, by group (docs/definitions.md, section 7).

    Args:
        inputs: Autoencoder and store.
        config: Batch size, precision and cluster; results do not depend on them.
        rows: Rows of readable images, increasing, shape `(n,)`.
        groups: Group of each of them, shape `(n,)`.
        n_groups: Groups G.
        threshold: The threshold.

    Returns:
        Int64, shape `(G, S)`.
    """
    counts, numbers = GroupCounts(n_groups, inputs.n_latents, 1), torch.from_numpy(np.asarray(groups, dtype=np.int64))
    with Progress("count equal numbers of images", len(rows), "images") as bar:
        for at, found in encode_rows(inputs, config, rows, _counts_of, bar.advance, [threshold]):
            counts.update(numbers[at], found)
    return counts.counts[0].numpy()


def _counts_of(images: EncodedRows) -> tuple[slice, torch.Tensor]:
    return images.at, images.pooled.counts.cpu()


def _encode(
    config: StatisticsOptions,
    rows: IntArray,
    function: Callable[[EncodedRows], T],
    thresholds: Sequence[float],
    screened: bool | None,
    inputs: Inputs,
    parts: Sequence[range],
) -> Iterator[T]:
    """What a function makes of ranges among the rows, read ahead of the encoder.

    Args:
        config: Options.
        rows: Row numbers.
        function: As for `encode_rows`.
        thresholds: Thresholds of the counts.
        screened: As for `make_encoder`; on a worker, what was found where the command was typed.
        inputs: Store and autoencoder.
        parts: Positions among the rows; the first is the longest.
    """
    encoder, store = make_encoder(inputs, config, thresholds, screened=screened), inputs.store
    direct = exceeds_page_cache(store.n_images * store.spec.record_bytes)
    with store.open_reader(verify=not config.no_verify, direct=direct) as reader:

        def read(part: range, buffer: npt.NDArray[Any]) -> tuple[range, npt.NDArray[Any]]:
            reader.read_rows(rows[part.start : part.stop], buffer[: len(part)])
            return part, buffer[: len(part)]

        shape = (max(map(len, parts), default=0), *store.spec.image_shape)
        for part, values in Prefetcher(parts, read, lambda: aligned_buffer(shape, store.dtype)):
            activations = torch.from_numpy(values)
            # An image's position among the rows determines its block, so that blocks are full although rows are
            # scattered.
            pooled = encoder.reduce(activations, part.start)
            if screened is not None:  # on a worker, whose device the machine that asked may not have
                pooled = PooledActs(*(tensor.cpu() for tensor in pooled))
            yield function(EncodedRows(slice(part.start, part.stop), activations, pooled))
