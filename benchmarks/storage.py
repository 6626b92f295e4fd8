"""Storage against bare file I/O of the same bytes: `python -m benchmarks.storage`.

Names: `write` (baseline: write + fsync of the same bytes), `read` (baseline: readinto), `stream` and `random`
(baseline: our sequential read), each with a warm cache.
"""

import argparse
import itertools
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import compare
from cytosae_cache.durable import write_all
from cytosae_cache.metadata import Provenance
from cytosae_cache.reader import StoreReader
from cytosae_cache.shard import as_bytes, shard_name
from cytosae_cache.spec import StoreSpec, TokenLayout
from cytosae_cache.store import ActivationStore, ImageTable
from cytosae_cache.stream import TrainingStream, iter_row_blocks
from cytosae_cache.writer import ShardData, StoreWriter


def make_spec(d_model: int) -> StoreSpec:
    return StoreSpec("bench", "0" * 64, 10, 12, d_model, TokenLayout(1, 0, (16, 16)))


def write_store(path: Path, spec: StoreSpec, shards: list[np.ndarray], compression: str = "none") -> ActivationStore:
    """Our writing, from the first shard to the mark of completeness."""
    shutil.rmtree(path, ignore_errors=True)
    n = sum(len(shard) for shard in shards)
    table = ImageTable([f"{row:08d}.png" for row in range(n)], [""] * n, [""] * n)
    provenance = Provenance("bench", "0" * 64, "0", "now")
    store = ActivationStore.create(path, spec, table, provenance, shard_images=len(shards[0]), compression=compression)
    with StoreWriter(store) as writer:
        for number, shard in enumerate(shards):
            writer.submit(ShardData(number, shard, [b"0" * 32] * len(shard), [""] * len(shard)))
        writer.finish()
    return store


def write_bare(folder: Path, shards: list[np.ndarray]) -> None:
    """The same bytes to as many files, each synced."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for number, shard in enumerate(shards):
        file = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT)
        write_all(file, as_bytes(shard))
        os.fsync(file)
        os.close(file)


def read_bare(store: ActivationStore, buffer: np.ndarray) -> None:
    """`readinto` of the shard files, a buffer at a time."""
    view = as_bytes(buffer)
    for shard in range(store.n_shards):
        with (store.path / shard_name(shard)).open("rb", buffering=0) as file:
            while file.readinto(view):
                pass


def read_sequentially(reader: StoreReader, batch: int) -> None:
    for _ in iter_row_blocks(reader, block_rows=batch):
        pass


def read_into(reader: StoreReader, buffer: np.ndarray) -> None:
    """The whole store in order into the caller's buffer."""
    n = reader.store.n_images
    for start in range(0, n, len(buffer)):
        rows = np.arange(start, min(start + len(buffer), n))
        reader.read_rows(rows, buffer[: len(rows)])


def stream_epoch(reader: StoreReader, batch: int, epoch: int) -> None:
    n = reader.store.n_images
    for _ in TrainingStream([reader], batch_images=batch, seed=0, position=epoch * n, stop=(epoch + 1) * n):
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
    compare(
        "write",
        lambda: write_bare(folder / "bare", shards),
        lambda: write_store(folder / "ours.zarr", spec, shards),
        rounds=rounds,
        **sizes,
    )
    for codec in options.codecs:
        store = write_store(folder / f"{codec}.zarr", spec, shards, codec)
        store = ActivationStore.open(store.path)
        buffer = np.empty((options.batch, *spec.image_shape), dtype=store.dtype)
        for verify in (True, False) if codec == "none" else (True,):
            with StoreReader(store, verify=verify, n_threads=options.threads) as reader:
                more = {**sizes, "codec": codec, "verify": verify, "threads": options.threads}
                measure_reading(store, reader, buffer, options, rng, more)


def measure_reading(
    store: ActivationStore,
    reader: StoreReader,
    buffer: np.ndarray,
    options: argparse.Namespace,
    rng: np.random.Generator,
    sizes: dict[str, object],
) -> None:
    """Sequential, shuffled and random reading of one store."""
    rounds, epochs = options.rounds, itertools.count()
    compare("read", lambda: read_bare(store, buffer), lambda: read_into(reader, buffer), rounds=rounds, **sizes)
    sequential = lambda: read_sequentially(reader, options.batch)  # noqa: E731
    compare("stream", sequential, lambda: stream_epoch(reader, options.batch, next(epochs)), rounds=rounds, **sizes)
    compare("random", sequential, lambda: read_random(reader, buffer, rng), rounds=rounds, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the files go; a temporary folder by default")
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--shard-images", type=int, default=256)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--codecs", nargs="*", default=["none", "lz4", "zstd"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
