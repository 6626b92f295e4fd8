"""Peak memory for few and for many images: `python -m benchmarks.memory`.

Names: `memory_build` (the verb `build` with the embedded vision transformer) and `memory_epoch` (one shuffled epoch of
the store that it wrote). Each runs in a process of its own. `growth_bytes_per_image` is the difference of the peaks per
additional image, to compare with `activation_bytes_per_image`.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

_SMALL_PIXELS = 32


def write_images(folder: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(n):
        pixels = rng.integers(0, 256, size=(_SMALL_PIXELS, _SMALL_PIXELS, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.png")


def build(images: Path, store: Path, shard_images: int, batch: int) -> None:
    from cytosae_pipeline.building.build import build_store
    from cytosae_pipeline.config import BuildConfig

    config = BuildConfig(
        dataset_name="cells", images=images, store=str(store), root_dir=store.parent, model_path=Path("embedded"),
        workers=0, shard_images=shard_images, batch_size=batch,
    )  # fmt: skip
    build_store(config)


def epoch(store: Path, batch: int) -> None:
    from cytosae_cache.reading.concat import ConcatReader
    from cytosae_cache.reading.loader import ShuffledLoader
    from cytosae_cache.reading.reader import StoreReader
    from cytosae_cache.store import ActivationStore

    with StoreReader(ActivationStore.open(store)) as reader:
        n = reader.store.n_images
        for _ in ShuffledLoader(ConcatReader([reader]), batch_images=batch, seed=0, stop=n):
            pass


def run_child(job: str, *arguments: object) -> int:
    """Run one job in a new process; returns its peak resident memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", job, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    return int(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="the small number; the large one is ten times as large")
    parser.add_argument("--shard-images", type=int, default=64, help="small, so that never all shards are in memory")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        job, *paths = options.child
        if job == "build":
            build(Path(paths[0]), Path(paths[1]), int(paths[2]), int(paths[3]))
        else:
            epoch(Path(paths[0]), int(paths[1]))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        return
    peaks: dict[str, list[int]] = {"build": [], "epoch": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = [options.images, 10 * options.images]
        for n in sizes:
            images, store = Path(folder) / f"{n}", Path(folder) / f"{n}.zarr"
            write_images(images, n)
            peaks["build"].append(run_child("build", images, store, options.shard_images, options.batch))
            peaks["epoch"].append(run_child("epoch", store, options.batch))
        from cytosae_cache.store import ActivationStore

        image_bytes = ActivationStore.open(Path(folder) / f"{sizes[1]}.zarr").image_bytes
    for job, (small, large) in peaks.items():
        line = {
            "name": f"memory_{job}",
            "ratio": round(small / large, 3),
            "images": sizes,
            "peak_mb": [round(small / 1e6, 1), round(large / 1e6, 1)],
            "growth_bytes_per_image": round((large - small) / (sizes[1] - sizes[0])),
            "activation_bytes_per_image": image_bytes,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
