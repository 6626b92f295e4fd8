"""Checking all shards of a store, in this process or on a cluster."""

import functools

from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import ShardFindings, VerifyReport, verify_shards, verify_store
from cytosae_pipeline.runtime.cluster import connect, count_workers, map_ranges, plan_ranges
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.shared_store import SharedStore


def verify_files(store: ActivationStore, dask: str | None) -> VerifyReport:
    """`verify_store` with a progress bar.

    Args:
        store: A complete store.
        dask: Value of `--dask`; None for this process alone.

    Raises:
        ClusterError: If the cluster cannot be used.
    """
    with Progress("verify", store.n_shards, "shards") as bar:
        if dask is None:
            return verify_store(store, on_shard=lambda shard: bar.advance())

        def check() -> ShardFindings:
            with connect(dask) as client:
                function = functools.partial(_verify_range, SharedStore.of(store))
                ranges = plan_ranges(store.n_shards, count_workers(client))
                return map_ranges(client, function, ranges, ShardFindings.merge, lambda part: bar.advance(len(part)))

        return verify_store(store, check=check)


def _verify_range(shared: SharedStore, shards: range) -> ShardFindings:
    """What a worker does for a range of shards."""
    return verify_shards(shared.open(), shards)
