"""Two workers of one thread against one of one thread, on this machine: `python -m benchmarks.workers`.

Names: `build` and `features` (the verbs with `--dask`, by workers that run already and have loaded what they need) and
`train` (under torchrun, from typing the command; `--split data`). `ratio` is the time of one worker over that of two:
2 is the most. Two rounds alternate between them after one that warms up. Needs two idle cores.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.build import write_random
from benchmarks.end_to_end import draw_cells
from benchmarks.measure import compare
from cytosae.backbones.registry import ARCHITECTURES
from cytosae_pipeline.building.build import build_store
from cytosae_pipeline.config import BuildConfig, StatisticsConfig, TrainConfig
from cytosae_pipeline.statistics.verbs import run_features
from cytosae_pipeline.training.loop import train

_PATIENCE_S = 60.0
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


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-path", type=Path, help="a data set with labels and patients; drawn cells by default")
    parser.add_argument("--encoder", choices=list(ARCHITECTURES), default="dinov2_vits14", help="with random weights")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--verbs", nargs="+", choices=("build", "features", "train"), default=["build", "features", "train"]
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        source = options.images_path or draw_cells(folder / "cells", options.images)
        model = write_random(folder, ARCHITECTURES[options.encoder])
        common = {"root_dir": folder, "dataset_name": "job", "model_path": model, "model_name": options.encoder}
        build = BuildConfig(**common, images=source, limit=options.images, workers=1, shard_images=16, device="cpu")
        sizes = {"images": options.images, "encoder": options.encoder}
        one, two = (stack.enter_context(cluster(folder, n)) for n in (1, 2))
        number = iter(range(1000))

        def build_with(where: str | None) -> str:
            store = str(folder / f"{next(number)}.zarr")
            return str(build_store(BuildConfig(**{**vars(build), "store": store, "dask": where})).store)

        if "build" in options.verbs:
            compare("build", lambda: build_with(one), lambda: build_with(two), rounds=options.rounds, **sizes)
        store = build_with(None)
        sizes |= {"expansion": options.expansion}
        if "features" in options.verbs:
            run = train(
                TrainConfig(
                    root_dir=folder, dataset_name="job", store=store, expansion_factor=options.expansion, run_name="r",
                    total_training_tokens=64, batch_size=16, n_checkpoints=0, arch="topk", k=32, device="cpu",
                )
            )  # fmt: skip

            def features_with(where: str) -> None:
                choice = {**common, "store": store, "sae_path": run.sae, "device": "cpu", "dask": where}
                run_features(StatisticsConfig(**choice, vit_type=f"v{next(number)}"))

            compare("features", lambda: features_with(one), lambda: features_with(two), rounds=options.rounds, **sizes)
        if "train" in options.verbs:
            words = [
                "-m", "cytosae_pipeline", "train", "--root_dir", folder, "--dataset_name", "job", "--store", store,
                "--expansion_factor", options.expansion, "--arch", "batchtopk", "--k", 32, "--batch_size", 16,
                "--total_training_tokens", 16 * options.steps, "--n_checkpoints", 0, "--device", "cpu",
                "--precision", "fp32",
            ]  # fmt: skip

            def train_with(n_ranks: int) -> None:
                start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_ranks]
                command = [*map(str, [*start, *words, "--run_name", f"r{next(number)}"])]
                subprocess.run(
                    command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )

            sizes |= {"steps": options.steps}
            compare("train", lambda: train_with(1), lambda: train_with(2), rounds=options.rounds, **sizes)


if __name__ == "__main__":
    main()
