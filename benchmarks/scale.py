"""What every stage costs as a data set grows: `python -m benchmarks.scale --images 10000 100000 1000000 10000000`.

Stores of real metadata, tables and shards, but of tiny images (2 tokens x 4 numbers): what is left is the cost of an
image or a shard that does not depend on the network. Every stage runs in a process of its own, and one line says its
CPU seconds (all threads, starting Python and importing included, as `start` measures them alone) and peak memory.

`--requests` counts the requests to a bucket instead (moto's server on this machine, which speaks S3): `resume` (open an
unfinished store and look for missing shards), `write` (all shards and tables), `open`, `table` (the names of all
images), and `read` and `read_again` (256 random images; the second time, the indices of their shards are known).

Names: `start` (import everything, do nothing), `list` (read a manifest of as many images as `--most-files` allows, hard
links to one file), `create` (write a store of so many images, its table first), `fill` (all shards, then the tables),
`open`, `batch` (open, order an epoch, and serve its first batch), `order` (all of an epoch's order), `epoch` (serve all
images), `verify`, and the verbs `train` (one step), `features`, `patients`, `export` (csv) and `report`.
"""

import argparse
import contextlib
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import print_line

_PATIENT_IMAGES, _LABELS = 500, 8
_VERBS = ("train", "features", "patients", "export", "report")


def write_manifest(folder: Path, n: int) -> None:
    """A manifest of `n` images; the files are links to a few."""
    (folder / "files").mkdir(parents=True)
    lines = ["path,label,patient\n"]
    for row, line in enumerate(itertools.islice(_name_images(), n)):
        path = folder / line[0]
        if row % 10_000 == 0:
            first = path
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"x")
        else:
            path.parent.mkdir(exist_ok=True)
            os.link(first, path)
        lines.append(",".join(line) + "\n")
    (folder / "manifest.csv").write_text("".join(lines))


def _name_images() -> "itertools.chain[tuple[str, str, str]]":
    """Path, label and patient of images without end, sorted by path."""
    return (  # type: ignore[return-value]
        (f"files/{row // 1000:06d}/cell_{row:010d}.png", f"class {row % _LABELS}", f"p{row // _PATIENT_IMAGES:07d}")
        for row in itertools.count()
    )


def list_images(folder: Path, n: int) -> None:
    from cytosae_pipeline.images.listing import open_dataset

    if len(open_dataset(folder / f"{n}-files" / "manifest.csv")) != n:
        raise SystemExit("the manifest lists other images")


def create(folder: Path | str, n: int, shard_images: int) -> None:
    from cytosae_cache.format.layout import ImageTable
    from cytosae_cache.format.metadata import Provenance
    from cytosae_cache.format.spec import StoreSpec, TokenLayout
    from cytosae_cache.writer import create_store

    names = (list(column) for column in zip(*itertools.islice(_name_images(), n), strict=True))
    spec = StoreSpec("bench", "0" * 64, 10, 12, 4, TokenLayout(1, 0, (1, 1)))
    provenance = Provenance("scale", "0" * 64, "0", "now")
    create_store(f"{folder}/{n}.zarr", spec, ImageTable(*names), provenance, shard_images=shard_images)


def fill(folder: Path | str, n: int) -> None:
    from cytosae_cache.store import ActivationStore
    from cytosae_cache.writer import ShardData, StoreWriter

    rng = np.random.default_rng(0)
    store = ActivationStore(f"{folder}/{n}.zarr")
    with StoreWriter(store) as writer:
        for shard in range(store.n_shards):
            rows = store.shard_rows(shard)
            values = rng.standard_normal((len(rows), *store.spec.image_shape), dtype=np.float32).astype(store.dtype)
            digests = [row.to_bytes(32) for row in rows]
            writer.submit(ShardData(shard, values, digests, [""] * len(rows)))
        writer.finish()


def open_store(folder: Path, n: int) -> None:
    from cytosae_cache.store import ActivationStore

    ActivationStore.open(folder / f"{n}.zarr")


def serve(folder: Path, n: int, n_served: int) -> None:
    from cytosae_cache.reading.concat import ConcatReader
    from cytosae_cache.reading.loader import ShuffledLoader
    from cytosae_cache.reading.reader import StoreReader
    from cytosae_cache.store import ActivationStore

    with StoreReader(ActivationStore.open(folder / f"{n}.zarr")) as reader:
        for _ in ShuffledLoader(ConcatReader([reader]), batch_images=64, seed=0, stop=n_served):
            pass


def order(n: int) -> None:
    from cytosae_cache.reading.permutation import EpochOrder

    for _ in EpochOrder(n, seed=0, epoch=0).iter_parts(0, n):
        pass


def start() -> None:
    from cytosae_cache.reading.loader import ShuffledLoader  # noqa: F401
    from cytosae_cache.writer import StoreWriter  # noqa: F401
    from cytosae_pipeline.images.listing import open_dataset  # noqa: F401


STAGES: dict[str, Callable[[Path, int, int], None]] = {
    "start": lambda folder, n, shard: start(),
    "list": lambda folder, n, shard: list_images(folder, n),
    "create": create,
    "fill": lambda folder, n, shard: fill(folder, n),
    "open": lambda folder, n, shard: open_store(folder, n),
    "batch": lambda folder, n, shard: serve(folder, n, min(n, 64)),
    "order": lambda folder, n, shard: order(n),
    "epoch": lambda folder, n, shard: serve(folder, n, n),
}


def verb_words(verb: str, store: Path) -> list[str]:
    """The command line of a verb that reads a store."""
    root = store.with_suffix("")
    words = [verb, "--root_dir", str(root), "--dataset_name", "scale", "--store", str(store), "--device", "cpu"]
    if verb == "verify":
        return ["verify", str(store)]
    if verb == "train":
        options = "--arch topk --k 4 --expansion_factor 8 --total_training_tokens 64 --batch_size 64 --n_checkpoints 0"
        return [*words, *options.split(), "--run_name", "r", "--held_out", "0", "--precision", "fp32"]
    words += ["--sae_path", "r"]
    if verb == "export":
        return [*words, "--format", "csv", "--out", str(root / "tables")]
    if verb == "report":
        return [*words, "--out", str(root / "report")]
    return words


def measure(name: str, n: int, command: list[str], **sizes: object) -> None:
    """Run a command and print its cost."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"stage {name} with {n:,} images failed: {' '.join(command)}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    cpu_s = usage.ru_utime + usage.ru_stime
    print_line({"name": name, "images": n, **sizes, "cpu_s": round(cpu_s, 2), "peak_mb": round(peak / 1e6, 1)})


def count_requests(n: int, shard_images: int) -> None:
    """Print the requests of each kind that work on a store in a bucket makes."""
    import pytest

    from cytosae_cache.reading.reader import StoreReader
    from cytosae_cache.store import ActivationStore
    from cytosae_cache.writer import StoreWriter
    from tests.support.s3 import serve_s3

    with pytest.MonkeyPatch.context() as patch, serve_s3(patch) as server, contextlib.ExitStack() as stack:
        rows = np.random.default_rng(0).permutation(n)[:256]

        def report(name: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the work returns
            before = server.seen.copy()
            result = work()
            print_line({"name": name, "images": n, "shards": -(-n // shard_images), **(server.seen - before)})
            return result

        create("s3://cells", n, shard_images)
        report("resume", lambda: StoreWriter(ActivationStore(f"s3://cells/{n}.zarr")).missing_shards())
        report("write", lambda: fill("s3://cells", n))
        store = report("open", lambda: ActivationStore.open(f"s3://cells/{n}.zarr"))
        report("table", lambda: store.images)
        reader = stack.enter_context(StoreReader(store))
        report("read", lambda: reader.read(rows))
        report("read_again", lambda: reader.read(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--shard-images", type=int, default=256)
    parser.add_argument(
        "--most-files", type=int, default=1_000_000, help="most images of `list`, which need a file each"
    )
    parser.add_argument("--stages", nargs="+", default=[*STAGES, "verify", *_VERBS], help="only these, in this order")
    parser.add_argument("--folder", type=Path, help="where to write files; default a temporary folder")
    parser.add_argument("--requests", action="store_true", help="count the requests to a bucket instead")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        stage, folder, n = options.child
        if stage == "files":
            write_manifest(Path(folder) / f"{n}-files", int(n))
        else:
            STAGES[stage](Path(folder), int(n), options.shard_images)
        return
    if options.requests:
        for n in options.images:
            count_requests(n, options.shard_images)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for n in options.images:
            sizes = {"shards": -(-n // options.shard_images)}
            for stage in options.stages:
                if stage == "list" and n > options.most_files:
                    continue
                ours = ["-m", "benchmarks.scale", "--shard-images", str(options.shard_images), "--child"]
                if stage == "list":  # in a process of its own, too: what this one takes, its children begin with
                    subprocess.run([sys.executable, *ours, "files", folder, str(n)], check=True)
                if stage in STAGES:
                    command = [*ours, stage, folder, str(n)]
                else:
                    command = ["-m", "cytosae_pipeline", *verb_words(stage, Path(folder) / f"{n}.zarr")]
                measure(stage, n, command, **sizes)


if __name__ == "__main__":
    main()
