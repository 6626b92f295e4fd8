"""A sweep against separate runs. Prints one JSON line per kind of store.

    python -m benchmarks.sweep --runs 6 --codecs none zstd

Both sides are the installed program in separate processes, from start to finished files.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import print_line
from cytosae_cache.creation import create_store
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.shard_data import ShardData
from cytosae_cache.writer import StoreWriter

_PROGRAM = "from cytosae_pipeline.cli.app import main; main()"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--d-model", type=int, default=384)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--expansion", type=int, default=2)
    parser.add_argument("--codecs", nargs="+", choices=("none", "lz4", "zstd"), default=["none", "zstd"])
    options = parser.parse_args()
    for codec in options.codecs:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            make_store(root / "s.zarr", options, codec)
            common = [
                "train", "--store", root / "s.zarr", "--expansion_factor", options.expansion, "--n_checkpoints", 0,
                "--total_training_tokens", options.epochs * options.images, "--resident", "none",
            ]  # fmt: skip
            grid = root / "grid.toml"
            grid.write_text(f"seed = {list(range(options.runs))}\n")
            started = time.perf_counter()
            for seed in range(options.runs):
                run([*common, "--root_dir", root / "own", "--seed", seed])
            baseline_s = time.perf_counter() - started
            started = time.perf_counter()
            run([*common, "--root_dir", root / "together", "--sweep", grid])
            ours_s = time.perf_counter() - started
        print_line(
            {
                "name": "sweep", "ratio": round(baseline_s / ours_s, 2), "baseline_s": round(baseline_s, 1),
                "ours_s": round(ours_s, 1), "runs": options.runs, "codec": codec, "images": options.images,
                "d_model": options.d_model, "latents": options.expansion * options.d_model, "epochs": options.epochs,
            }
        )  # fmt: skip


def run(arguments: list[object]) -> None:
    """The program, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment, capture_output=True)


def make_store(path: Path, options: argparse.Namespace, codec: str) -> None:
    """A store of random activations, rounded so that a codec has something to do."""
    n, width = options.images, options.d_model
    spec = StoreSpec("random", "00" * 32, 1, 2, width, TokenLayout(1, 0, (16, 16)))
    names = [f"{row:06d}.png" for row in range(n)]
    table = ImageTable(names, ["a"] * n, ["p"] * n)
    provenance = Provenance("random", "0" * 64, "0", "2026-01-01T00:00:00+00:00", "cpu")
    store = create_store(path, spec, table, provenance, shard_images=64, compression=codec)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    with StoreWriter(store) as writer:
        for shard in writer.missing_shards():
            size = len(store.shard_rows(shard))
            values = (np.round(rng.normal(size=(size, 257, width)) * 8) / 8).astype("<f2")
            digests = [int(row).to_bytes(32, "big") for row in store.shard_rows(shard)]
            writer.submit(ShardData(shard, values, list(digests), [""] * size, [1] * size))
        writer.finish()


if __name__ == "__main__":
    main()
