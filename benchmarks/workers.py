"""Two workers of one thread against one of one thread, and against one process of two, on this machine.

    python -m benchmarks.workers --images-path ../shared/data/bccd_cells/manifest.csv --images 256 --steps 200

Names: `build` and `features` (the verbs with `--dask`, by workers that run already and have loaded what they need) and
`train` (under torchrun, from typing the command; `--split data`). `ratio` is the time of one worker over that of two.
With `_both` behind the name it is the time of the verb without any, in one process of two threads, over that of two.
`machine` is the most that this machine allows: matrix products per second of two processes at a time over those of one
alone. Rounds alternate after one that warms up. Needs two idle cores.
"""

import argparse
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.build import write_random
from benchmarks.end_to_end import draw_cells
from benchmarks.measure import compare, print_line
from cytosae.backbones.registry import ARCHITECTURES
from cytosae_pipeline.building.build import build_store
from cytosae_pipeline.config import BuildConfig, StatisticsConfig, TrainConfig
from cytosae_pipeline.statistics.verbs import run_features
from cytosae_pipeline.training.loop import train

_PATIENCE_S = 60.0
_MULTIPLIES = """
import sys, time, torch
left, right = torch.randn(1028, 384), torch.randn(384, 1536)
left @ right
start, n = time.perf_counter(), 0
while time.perf_counter() - start < float(sys.argv[1]):
    left @ right
    n += 1
print(n / (time.perf_counter() - start))
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}


@contextlib.contextmanager
def cluster(folder: Path, n_workers: int) -> Iterator[str]:
    """A scheduler and workers of one thread, as their own command lines start them; yields the scheduler's file."""
    file = folder / f"{n_workers}.json"
    scheduler = ["distributed.cli.dask_scheduler", "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    worker = ["distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        for words in [scheduler, *[worker] * n_workers]:
            command = [sys.executable, "-m", *words, "--scheduler-file", str(file)]
            process = stack.enter_context(subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL))
            stack.callback(process.kill)
            end = time.monotonic() + _PATIENCE_S
            while not file.exists() and time.monotonic() < end:
                time.sleep(0.1)
        yield str(file)


def multiply(n_processes: int, seconds: float = 10.0) -> float:
    """Products per second of some processes of one thread together."""
    command = [sys.executable, "-c", _MULTIPLIES, str(seconds)]
    started = [subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) for _ in range(n_processes)]
    return sum(float(process.communicate()[0]) for process in started)


def with_threads(n: int, function: Callable[[], object]) -> None:
    """Call a function while torch may use some threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    function()
    torch.set_num_threads(before)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-path", type=Path, help="a data set with labels and patients; drawn cells by default")
    parser.add_argument("--encoder", choices=list(ARCHITECTURES), default="dinov2_vits14", help="with random weights")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-images", type=int, default=16, help="images of a training step")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--verbs", nargs="+", choices=("build", "features", "train"), default=["build", "features", "train"]
    )
    options = parser.parse_args()
    print_line({"name": "machine", "ratio": round(statistics.median(multiply(2) / multiply(1) for _ in range(3)), 3)})
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        source = options.images_path or draw_cells(folder / "cells", options.images)
        model = write_random(folder, ARCHITECTURES[options.encoder])
        common: dict[str, Any] = {
            "root_dir": folder,
            "dataset_name": "job",
            "model_path": model,
            "model_name": options.encoder,
        }
        build = BuildConfig(**common, images=source, limit=options.images, workers=1, shard_images=16, device="cpu")
        sizes = {"images": options.images, "encoder": options.encoder}
        one, two = (stack.enter_context(cluster(folder, n)) for n in (1, 2))
        number = iter(range(1000))

        def build_with(where: str | None) -> str:
            store = str(folder / f"{next(number)}.zarr")
            return str(build_store(BuildConfig(**{**vars(build), "store": store, "dask": where})).store)

        if "build" in options.verbs:
            compare("build", lambda: build_with(one), lambda: build_with(two), rounds=options.rounds, **sizes)
            both = functools.partial(with_threads, 2, lambda: build_with(None))
            compare("build_both", both, lambda: build_with(two), rounds=options.rounds, **sizes)
        store = build_with(None)
        sizes |= {"expansion": options.expansion}
        if "features" in options.verbs:
            compare_features(options, {**common, "store": store}, one, two, sizes)
        if "train" in options.verbs:
            sizes |= {"steps": options.steps, "batch_images": options.batch_images}
            compare_training(options, {**common, "store": store}, sizes)


def compare_features(
    options: argparse.Namespace, common: dict[str, Any], one: str, two: str, sizes: dict[str, object]
) -> None:
    """Compare `features` of an autoencoder that is trained for it."""
    run = train(
        TrainConfig(
            root_dir=common["root_dir"], dataset_name="job", store=common["store"], run_name="r", batch_size=16,
            expansion_factor=options.expansion, total_training_tokens=64, n_checkpoints=0, arch="topk", k=32,
            device="cpu",
        )
    )  # fmt: skip
    number = iter(range(1000))

    def features_with(where: str | None) -> None:
        choice = {**common, "sae_path": run.sae, "device": "cpu", "dask": where}
        run_features(StatisticsConfig(**choice, vit_type=f"v{next(number)}"))

    both = functools.partial(with_threads, 2, lambda: features_with(None))
    compare("features", lambda: features_with(one), lambda: features_with(two), rounds=options.rounds, **sizes)
    compare("features_both", both, lambda: features_with(two), rounds=options.rounds, **sizes)


def compare_training(options: argparse.Namespace, common: dict[str, Any], sizes: dict[str, object]) -> None:
    """Compare `train`, each time a new run."""
    words = [
        "-m", "cytosae_pipeline", "train", "--root_dir", common["root_dir"], "--dataset_name", "job",
        "--store", common["store"], "--expansion_factor", options.expansion, "--arch", "batchtopk", "--k", 32,
        "--batch_size", options.batch_images,
        "--total_training_tokens", options.batch_images * options.steps, "--n_checkpoints", 0, "--device", "cpu",
        "--precision", "fp32",
    ]  # fmt: skip
    number = iter(range(1000))

    def train_with(n_ranks: int, n_threads: int = 1) -> None:
        """One process of several threads is started without torchrun."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_ranks]
        start = [sys.executable, *(launcher if n_threads == 1 else [])]
        subprocess.run(
            [*map(str, [*start, *words, "--run_name", f"of{n_ranks}_{n_threads}_{next(number)}"])],
            env={**ENVIRONMENT, "OMP_NUM_THREADS": str(n_threads)}, check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    compare("train", lambda: train_with(1), lambda: train_with(2), rounds=options.rounds, **sizes)
    compare("train_both", lambda: train_with(1, 2), lambda: train_with(2), rounds=options.rounds, **sizes)


if __name__ == "__main__":
    main()
