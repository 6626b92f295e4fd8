"""The scores of all images, in order of the row, in one pass."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.block_encoder import PooledActs
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.runtime.cluster import connect, iter_ranges
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.statistics.encode import encode_shards, encode_store, is_screened, rows_of
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.sharing import SharedInputs, share

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def pass_scores(
    inputs: Inputs, config: StatisticsOptions, consume: Callable[[npt.NDArray[np.float32]], object], *, what: str
) -> None:
    """Pass on the scores of all readable images, some at a time, in order of the row.

    Args:
        inputs: Autoencoder and store.
        config: Options; a cluster computes the scores if they name one.
        consume: Takes the scores of the next images, shape `(n, S)`.
        what: Name of the work, shown with the progress.

    Raises:
        ClusterError: If the cluster cannot be used.
        NotEnoughMemoryError: If the batch size does not fit into memory.
    """
    if config.dask is None:

        def pass_on(rows: torch.Tensor, pooled: PooledActs) -> None:
            consume(pooled.scores.cpu().numpy())

        encode_store(inputs, config, [pass_on], what=what)
        return
    store = inputs.store
    device: Any = inputs.sae.W_enc.device.type
    shared = share(inputs, getattr(config, "device", device))
    function = functools.partial(_scores_of, shared, config, is_screened(inputs, config))
    # One shard at a time, however many there are: this process holds the scores of a few.
    ranges = [range(shard, shard + 1) for shard in range(store.n_shards)]
    with connect(config.dask) as client, Progress(what, store.n_images, "images") as bar:
        for part, blocks in zip(ranges, iter_ranges(client, function, ranges), strict=True):
            for block in blocks:
                consume(block.toarray())
            bar.advance(len(rows_of(inputs, part)))


def _scores_of(shared: SharedInputs, config: StatisticsOptions, screened: bool, shards: range) -> "list[csr_matrix]":
    """What a worker does for a range of shards."""
    from scipy.sparse import csr_matrix

    blocks: list[csr_matrix] = []

    def consume(rows: torch.Tensor, pooled: PooledActs) -> None:
        blocks.append(csr_matrix(pooled.scores.cpu().numpy()))

    encode_shards(shared.open(), config, shards, [consume], screened=screened)
    return blocks
