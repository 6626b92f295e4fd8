"""Every kind of training stream against our own sequential pass, for stores of few and of many shards.

    python -m benchmarks.stream --shards 8 300 1000 --caches warm direct

A round is several epochs of one stream, so that allocating its memory counts as little as in a training run. Names:
`stream` (whole images), `tokens` (token-mixed batches). `memory` says whether all activations were kept in memory; the
first read is not timed. `baseline_cpu_us` and `ours_cpu_us` are CPU microseconds per image, of all threads. Stores of
many shards have small ones, so that all stores are about equally large; each is deleted before the next is written.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import compare
from benchmarks.storage import make_spec, read_sequentially, write_store
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore

KINDS = {
    "warm": [("global", False), ("windowed", False), ("global", True)],
    "direct": [("global", False)],
}
"""Shuffle, and whether everything is in memory, by cache; what memory serves does not depend on the cache."""


def read_epochs(reader: StoreReader, batch: int, epochs: int) -> None:
    for _ in range(epochs):
        read_sequentially(reader, batch)


def serve(stream: ShuffledLoader) -> None:
    for _ in stream:
        pass


def run(folder: Path, options: argparse.Namespace) -> None:
    spec = make_spec(options.d_model)
    rng = np.random.default_rng(0)
    for n_shards in options.shards:
        shard_images = min(options.shard_images, max(1, options.images // n_shards))
        shape = (shard_images, *spec.image_shape)
        # The same numbers in every shard: memory does not grow with their number.
        shards = [rng.standard_normal(shape, dtype=np.float32).astype(np.float16)] * n_shards
        for codec in options.codecs:
            store = write_store(folder / f"{codec}.zarr", spec, shards, codec)
            for cache in options.caches:
                if codec == "none" or cache == "warm":
                    measure(store, options, cache, {"shards": n_shards, "shard_images": shard_images, "codec": codec})
            shutil.rmtree(store.path)


def measure(store: ActivationStore, options: argparse.Namespace, cache: str, sizes: dict[str, object]) -> None:
    """Measure the streams of one store."""
    n, epochs = store.n_images, options.epochs
    with StoreReader(store, direct=cache == "direct") as reader:
        for batch_of in ("images", "tokens"):
            for shuffle, memory in KINDS[cache]:
                stream = ShuffledLoader(
                    ConcatReader([reader]), batch_images=options.batch, seed=0, stop=n * epochs,
                    shuffle=shuffle, batch_of=batch_of, in_memory=memory,
                )  # fmt: skip
                compare(
                    "tokens" if batch_of == "tokens" else "stream",
                    lambda: read_epochs(reader, options.batch, epochs),
                    lambda: serve(stream),  # noqa: B023 - called immediately
                    rounds=options.rounds,
                    images_per_round=n * epochs,
                    shuffle=shuffle,
                    memory=memory,
                    cache=cache,
                    epochs=epochs,
                    images=n,
                    megabytes=round(n * store.image_bytes / 1e6),
                    batch=options.batch,
                    **sizes,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument(
        "--shards", type=int, nargs="+", default=[8, 300, 1000], help="a store of each number of shards"
    )
    parser.add_argument("--images", type=int, default=2048, help="most images of a store")
    parser.add_argument("--shard-images", type=int, default=256, help="most images of a shard")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codecs", nargs="+", default=["none"])
    parser.add_argument("--caches", nargs="+", choices=list(KINDS), default=["warm"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
