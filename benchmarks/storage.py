"""Storage against bare file I/O of the same bytes: `python -m benchmarks.storage`.

Names: `write` (baseline: write + fsync of the same bytes), `read` (baseline: readinto of the raw file), `stream`,
`tokens` (batches of tokens) and `random` (baseline: our sequential pass). `cache` says how files are read: `warm` from
the page cache, `direct` bypassing it (O_DIRECT, both sides), `cold` through it after the files were dropped from it.
With a warm cache, `stream` and `tokens` read several epochs with one loader, as training does, and the sequential pass
as many: a loader's buffers are new memory in its first epoch alone.
"""

import argparse
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import compare
from cytosae_cache.creation import create_store
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.shard import as_bytes, shard_name
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader, iter_row_blocks
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.reading.sampler import BatchOf
from cytosae_cache.shard_data import ShardData
from cytosae_cache.storage.atomic import write_all
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building.activations import widen_with_torch


def make_spec(d_model: int) -> StoreSpec:
    return StoreSpec("bench", "0" * 64, 10, 12, d_model, TokenLayout(1, 0, (16, 16)))


def write_store(path: Path, spec: StoreSpec, shards: list[np.ndarray], compression: str = "none") -> ActivationStore:
    """Our writing, from creating the store to marking it complete."""
    shutil.rmtree(path, ignore_errors=True)
    n = sum(len(shard) for shard in shards)
    table = ImageTable([f"{row:08d}.png" for row in range(n)], [""] * n, [""] * n)
    provenance = Provenance("bench", "0" * 64, "0", "now")
    store = create_store(path, spec, table, provenance, shard_images=len(shards[0]), compression=compression)
    with StoreWriter(store, widen=widen_with_torch) as writer:
        for number, shard in enumerate(shards):
            writer.submit(ShardData(number, shard, [b"0" * 32] * len(shard), [""] * len(shard)))
        return writer.finish()


def write_bare(folder: Path, shards: list[np.ndarray]) -> None:
    """Write the same bytes to the same number of files, each synced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, shard in enumerate(shards):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT)
        write_all(file, as_bytes(shard))
        os.fsync(file)
        os.close(file)


def read_bare(store: ActivationStore, buffer: np.ndarray, *, flags: int = 0) -> None:
    """Read the images of the shard files, one buffer at a time, file by file."""
    view = as_bytes(buffer)
    for shard in range(store.n_shards):
        file = os.open(store.path / shard_name(shard), os.O_RDONLY | flags)
        try:
            left, offset = len(store.shard_rows(shard)) * store.image_bytes, 0
            while left:
                count = os.preadv(file, [view[: min(left, len(view))]], offset)
                left, offset = left - count, offset + count
        finally:
            os.close(file)


def drop_cache(store: ActivationStore) -> None:
    """Drop the store's shards from the page cache, so that the next read comes from the disk."""
    for shard in range(store.n_shards):
        with (store.path / shard_name(shard)).open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_sequentially(reader: StoreReader, batch: int, epochs: int = 1) -> None:
    for _ in range(epochs):
        for _ in iter_row_blocks(reader, block_rows=batch):
            pass


def read_into(reader: StoreReader, buffer: np.ndarray) -> None:
    """Read the whole store in order into the caller's buffer."""
    n = reader.store.n_images
    for start in range(0, n, len(buffer)):
        rows = np.arange(start, min(start + len(buffer), n))
        reader.read_rows(rows, buffer[: len(rows)])


def stream_epochs(reader: StoreReader, batch: int, first: int, epochs: int, batch_of: BatchOf = "images") -> None:
    n = reader.store.n_images
    samples_seen, stop = first * n, (first + epochs) * n
    for _ in ShuffledLoader(
        ConcatReader([reader]), batch_images=batch, seed=0, samples_seen=samples_seen, stop=stop, batch_of=batch_of
    ):
        pass


def read_random(reader: StoreReader, buffer: np.ndarray, rng: np.random.Generator) -> None:
    n = reader.store.n_images
    for _ in range(0, n, len(buffer)):
        reader.read_rows(rng.integers(0, n, size=len(buffer)), buffer)


def run(folder: Path, options: argparse.Namespace) -> None:
    spec = make_spec(options.d_model)
    rng = np.random.default_rng(0)
    shape = (options.shard_images, *spec.image_shape)
    shards = [rng.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(options.shards)]
    sizes = {"images": options.shards * options.shard_images, "megabytes": round(sum(s.nbytes for s in shards) / 1e6)}
    rounds = options.rounds
    bare = lambda: write_bare(folder / "bare", shards)  # noqa: E731
    for codec in options.codecs:
        ours = lambda codec=codec: write_store(folder / "ours.zarr", spec, shards, codec)  # noqa: E731
        compare("write", bare, ours, rounds=rounds, **sizes, codec=codec)
    shutil.rmtree(folder / "bare")
    shutil.rmtree(folder / "ours.zarr")
    raw = write_store(folder / "raw.zarr", spec, shards)
    for codec in options.codecs:
        store = raw if codec == "none" else write_store(folder / f"{codec}.zarr", spec, shards, codec)
        more = {**sizes, "codec": codec}
        for verify in (True, False) if codec == "none" else (True,):
            with StoreReader(store, verify=verify, n_threads=options.threads) as reader:
                measure(reader, raw, options, {**more, "verify": verify, "cache": "warm", "threads": options.threads})
        for cache in ("direct", "cold") if codec == "none" else ("cold",):
            with StoreReader(store, n_threads=options.cold_threads, direct=cache == "direct") as reader:
                measure(reader, raw, options, {**more, "verify": True, "cache": cache, "threads": options.cold_threads})


def measure(reader: StoreReader, raw: ActivationStore, options: argparse.Namespace, sizes: dict[str, object]) -> None:
    """Measure sequential, shuffled and random reading of one store."""
    store, rounds = reader.store, options.rounds
    epochs = max(1, options.epochs) if sizes["cache"] == "warm" else 1
    first = itertools.count(step=epochs)
    buffer, rng = aligned_buffer((options.batch, *store.spec.image_shape), store.dtype), np.random.default_rng(0)
    flags = os.O_DIRECT if sizes["cache"] == "direct" and store.image_bytes % 512 == 0 else 0

    def prepared(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            if sizes["cache"] == "cold":
                drop_cache(store)
                drop_cache(raw)
            function()

        return run

    bare = prepared(lambda: read_bare(raw, buffer, flags=flags))
    sequential = prepared(lambda: read_sequentially(reader, options.batch))
    several = prepared(lambda: read_sequentially(reader, options.batch, epochs))
    stream = prepared(lambda: stream_epochs(reader, options.batch, next(first), epochs))
    tokens = prepared(lambda: stream_epochs(reader, options.batch, next(first), epochs, "tokens"))
    compare("read", bare, prepared(lambda: read_into(reader, buffer)), rounds=rounds, **sizes)
    compare("stream", several, stream, rounds=rounds, repeats=epochs, epochs=epochs, **sizes)
    compare("tokens", several, tokens, rounds=rounds, repeats=epochs, epochs=epochs, **sizes)
    compare("random", sequential, prepared(lambda: read_random(reader, buffer, rng)), rounds=rounds, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--shard-images", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4, help="reading threads with a warm cache")
    parser.add_argument("--cold-threads", type=int, default=8, help="reading threads without a warm cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=5, help="epochs of a loader with a warm cache")
    parser.add_argument("--codecs", nargs="*", default=["none", "lz4", "zstd"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
