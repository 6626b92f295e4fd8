"""Every kind of training stream against our own sequential pass, with a warm cache: `python -m benchmarks.stream`.

A round is several epochs of one stream, so that allocating its memory counts as little as in a training run. Names:
`stream` (whole images), `tokens` (token-mixed batches). `memory` says whether all activations were kept in memory; the
first read is not timed.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.measure import compare
from benchmarks.storage import make_spec, read_sequentially, write_store
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader


def read_epochs(reader: StoreReader, batch: int, epochs: int) -> None:
    for _ in range(epochs):
        read_sequentially(reader, batch)


def serve(stream: ShuffledLoader) -> None:
    for _ in stream:
        pass


def run(folder: Path, options: argparse.Namespace) -> None:
    spec = make_spec(options.d_model)
    rng = np.random.default_rng(0)
    shape = (options.shard_images, *spec.image_shape)
    shards = [rng.standard_normal(shape, dtype=np.float32).astype(np.float16) for _ in range(options.shards)]
    n = options.shards * options.shard_images
    sizes = {"images": n, "megabytes": round(sum(shard.nbytes for shard in shards) / 1e6), "batch": options.batch}
    for codec in options.codecs:
        store = write_store(folder / f"{codec}.zarr", spec, shards, codec)
        with StoreReader(store) as reader:
            for batch_of in ("images", "tokens"):
                for shuffle, memory in (("global", False), ("windowed", False), ("global", True)):
                    stream = ShuffledLoader(
                        ConcatReader([reader]), batch_images=options.batch, seed=0, stop=n * options.epochs,
                        shuffle=shuffle, batch_of=batch_of, in_memory=memory,
                    )  # fmt: skip
                    compare(
                        "tokens" if batch_of == "tokens" else "stream",
                        lambda: read_epochs(reader, options.batch, options.epochs),
                        lambda: serve(stream),  # noqa: B023 - called immediately
                        rounds=options.rounds,
                        shuffle=shuffle,
                        memory=memory,
                        codec=codec,
                        epochs=options.epochs,
                        **sizes,
                    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument("--shards", type=int, default=24)
    parser.add_argument("--shard-images", type=int, default=64)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--codecs", nargs="*", default=["none", "zstd"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options)


if __name__ == "__main__":
    main()
