"""Our cache of activations: what `build` writes after the encoder, and the batches of training."""

from pathlib import Path

from benchmarks.rivals.cache_job import CacheJob, Given, run
from cytosae_cache.creation import create_store
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.shard_data import ShardData
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline import __version__

SHARD_IMAGES = 256
"""The default of `build`."""


def write(job: CacheJob, given: Given, path: Path) -> None:
    names, empty = [f"{row:08d}.png" for row in range(job.n_images)], [""] * job.n_images
    spec = StoreSpec(
        "given", "00" * 32, 1, 2, job.d_model, TokenLayout(1, 0, (1, job.n_tokens - 1)), store_dtype=job.dtype
    )
    provenance = Provenance("given", "0" * 64, "0", "2026-01-01T00:00:00+00:00", "cpu")
    store = create_store(path, spec, ImageTable(names, empty, empty), provenance, shard_images=SHARD_IMAGES)
    with StoreWriter(store) as writer:
        for shard in writer.missing_shards():
            rows = store.shard_rows(shard)
            n, digests = len(rows), [row.to_bytes(32, "big") for row in rows]
            writer.submit(ShardData(shard, given[rows.start : rows.stop], digests, [""] * n, [1] * n))
        writer.finish()


def read(job: CacheJob, path: Path) -> int:
    n_read = 0
    with StoreReader(ActivationStore.open(path)) as reader:
        images = ConcatReader([reader])
        stop = job.n_images // job.batch_images * job.batch_images
        for batch in ShuffledLoader(images, batch_images=job.batch_images, seed=0, stop=stop, batch_of="tokens"):
            n_read += batch.rows.size
    return n_read


if __name__ == "__main__":
    run(__version__, write, read)
