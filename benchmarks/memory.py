"""Peak memory for few and for many images: `python -m benchmarks.memory`.

Names: `memory_build` (the verb `build` with the embedded vision transformer) and `memory_epoch` (one shuffled epoch of
the store that it wrote). The others are verbs on stores of random activations, whose images have labels, patients and
sites: `memory_features`, `memory_patients`, `memory_evaluate` (the reconstruction), `memory_evaluate_probe`,
`memory_evaluate_monosemanticity`, `memory_evaluate_stability` (against another autoencoder), `memory_report` (pages of
latents from results that exist, without masking and map), and `memory_joined_features`, `memory_joined_evaluate` and
`memory_joined_report`, which read two stores of half the images as one.

Each runs in a process of its own. `growth_bytes_per_image` is the difference of the peaks per additional image, to
compare with `activation_bytes_per_image`.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

_SMALL_PIXELS = 32
_D_MODEL, _GRID, _LATENTS, _PAGES = 64, (4, 4), 256, 16
_LABELS, _PATIENTS, _SITES = 4, 24, 3
_WRITERS = ("build", "epoch")
_WHOLE = ["--dataset_name", "whole"]
_JOINED = ["--dataset_name", "one", "--with_dataset", "two"]
_REPORT = ["report", "--n_latents", str(_PAGES), "--masking_images", "0", "--map_images", "0"]
READERS: dict[str, list[str]] = {
    "features": ["features", *_WHOLE],
    "patients": ["patients", *_WHOLE],
    "evaluate": ["evaluate", *_WHOLE],
    "evaluate_probe": ["evaluate", *_WHOLE, "--probe", "--probe_images", "{n_probed}"],
    "evaluate_monosemanticity": ["evaluate", *_WHOLE, "--monosemanticity"],
    "evaluate_stability": ["evaluate", *_WHOLE, "--other_sae_path", "{root}/other.pt"],
    "report": [*_REPORT, *_WHOLE],
    "joined_features": ["features", *_JOINED],
    "joined_evaluate": ["evaluate", *_JOINED, "--monosemanticity"],
    "joined_report": [*_REPORT, *_JOINED],
}
"""Words of each verb that reads stores; a report finds what those before it have computed."""


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


def write_workspace(root: Path, n: int, shard_images: int) -> None:
    """A store of `n` images, two of half as many, and two autoencoders, where verbs look for them."""
    from cytosae.formats.checkpoint import save_sae
    from cytosae.sae.registry import make_sae

    for name, n_images in (("whole", n), ("one", n // 2), ("two", n - n // 2)):
        write_store(root, name, n_images, shard_images)
    for name, seed in (("sae", 0), ("other", 1)):
        sae = make_sae("relu", _D_MODEL, _LATENTS, seed=seed)
        sae.b_enc.data.fill_(-1.0)
        save_sae(root / f"{name}.pt", sae, {})


def write_store(root: Path, dataset: str, n: int, shard_images: int) -> None:
    """A store of random activations; its patients have names of their own."""
    from cytosae_cache.creation import create_store
    from cytosae_cache.format.layout import ImageTable
    from cytosae_cache.format.metadata import Provenance
    from cytosae_cache.format.spec import StoreSpec, TokenLayout
    from cytosae_cache.format.texts import to_texts
    from cytosae_cache.shard_data import ShardData
    from cytosae_cache.writer import StoreWriter
    from cytosae_pipeline.workspace.paths import Workspace

    spec = StoreSpec("random", "0" * 64, 10, 12, _D_MODEL, TokenLayout(1, 0, _GRID))
    patients = [row % _PATIENTS for row in range(n)]
    table = ImageTable(
        [f"{row // 1000:06d}/cell_{row:010d}.png" for row in range(n)],
        [f"class {row // _PATIENTS % _LABELS}" for row in range(n)],
        [f"{dataset} {patient:02d}" for patient in patients],
    )
    store = create_store(
        Workspace(root).store_path(dataset, spec.hash), spec, table, Provenance(dataset, "0" * 64, "0", "now", "cpu"),
        shard_images=shard_images, columns={"site": to_texts(f"site {patient % _SITES}" for patient in patients)},
    )  # fmt: skip
    rng = np.random.default_rng(len(dataset))
    with StoreWriter(store) as writer:
        for shard in range(store.n_shards):
            rows = store.shard_rows(shard)
            values = rng.standard_normal((len(rows), *spec.image_shape), dtype=np.float32).astype(store.dtype)
            digests = [hashlib.sha256(f"{dataset} {row}".encode()).digest() for row in rows]
            writer.submit(ShardData(shard, values, digests, [""] * len(rows), [1] * len(rows)))
        writer.finish()


def run_verb(root: Path, job: str, n_probed: int) -> None:
    """Run a verb on the stores of a workspace."""
    from cytosae_pipeline.cli.app import cli

    words = [*READERS[job], "--root_dir", "{root}", "--sae_path", "{root}/sae.pt", "--device", "cpu"]
    cli([word.format(root=root, n_probed=n_probed) for word in words], standalone_mode=False)


def run_child(job: str, *arguments: object) -> int:
    """Run one job in a new process; returns its peak resident memory in bytes."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", job, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    return int(done.stdout.splitlines()[-1])


def work(job: str, *arguments: str) -> None:
    """Do one job in this process."""
    place = Path(arguments[0])
    if job == "build":
        build(place, Path(arguments[1]), int(arguments[2]), int(arguments[3]))
    elif job == "epoch":
        epoch(place, int(arguments[1]))
    elif job == "workspace":
        write_workspace(place, int(arguments[1]), int(arguments[2]))
    else:
        run_verb(place, job, int(arguments[1]))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def measure_writers(jobs: Iterable[str], folder: Path, options: argparse.Namespace) -> None:
    """`build`, and an epoch of what it wrote."""
    sizes = (options.images, 10 * options.images)
    peaks: dict[str, list[int]] = {job: [] for job in _WRITERS}
    for n in sizes:
        images, store = folder / f"{n}", folder / f"{n}.zarr"
        write_images(images, n)
        peaks["build"].append(run_child("build", images, store, options.shard_images, options.batch))
        if "epoch" in jobs:
            peaks["epoch"].append(run_child("epoch", store, options.batch))
    for job in jobs:
        print_growth(job, sizes, peaks[job], store)


def measure_readers(jobs: Iterable[str], folder: Path, options: argparse.Namespace) -> None:
    """Verbs, on stores that are written first."""
    sizes = (options.read_images, 10 * options.read_images)
    peaks: dict[str, list[int]] = {job: [] for job in jobs}
    for n in sizes:
        root = folder / f"workspace-{n}"
        run_child("workspace", root, n, options.shard_images)
        for job, found in peaks.items():
            # As many images of a few stores as of many: the limit of --probe is not what is measured.
            found.append(run_child(job, root, options.read_images))
    (store,) = (root / "out" / "activations" / "whole").iterdir()
    for job, found in peaks.items():
        print_growth(job, sizes, found, store)


def print_growth(job: str, sizes: tuple[int, int], peaks: list[int], store: Path) -> None:
    """Print a line of the peaks of a small and a large number of images."""
    from cytosae_cache.store import ActivationStore

    small, large = peaks
    line = {
        "name": f"memory_{job}",
        "ratio": round(small / large, 3),
        "images": sizes,
        "peak_mb": [round(small / 1e6, 1), round(large / 1e6, 1)],
        "growth_bytes_per_image": round((large - small) / (sizes[1] - sizes[0])),
        "activation_bytes_per_image": ActivationStore.open(store).image_bytes,
    }
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="the small number; the large one is ten times as large")
    parser.add_argument("--read-images", type=int, default=2000, help="the same of the jobs that only read")
    parser.add_argument("--shard-images", type=int, default=64, help="small, so that never all shards are in memory")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--jobs", nargs="+", choices=[*_WRITERS, *READERS], default=[*_WRITERS, *READERS])
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        work(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for names, measure in ((_WRITERS, measure_writers), (READERS, measure_readers)):
            jobs = [name for name in names if name in options.jobs]
            if jobs:
                measure(jobs, Path(folder), options)


if __name__ == "__main__":
    main()
