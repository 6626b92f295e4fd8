"""A report of a wide autoencoder over many images: memory, size of the page, and how soon a browser shows it.

    python -m benchmarks.report --latents 49152 --images 1000 10000

Feature data and patient counts are synthetic, in the files that other verbs write; `report` runs in its own process.
Prints one JSON line per number of images: `peak_mb` of resident memory and, as `ratio`, the first line's peak over
this one's; `page_mb` without thumbnails; and, if Chromium and playwright are installed, `first_paint_s`, `heading_s`
(contents ready), `scatter_s` (from following the address of the scatter plot until all latents are drawn) and
`redraw_ms` (one redraw, as while zooming; mean of 20).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.measure import print_line
from cytosae.formats.checkpoint import save_sae
from cytosae.sae.registry import make_sae
from cytosae_cache.creation import create_store
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.shard_data import ShardData
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.statistics.counts import Counts
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.records import make_record
from cytosae_pipeline.statistics.results import Statistics

_PROGRAM = (
    "import json, resource, sys; from cytosae_pipeline.cli.app import cli; cli(standalone_mode=False);"
    "sys.stderr.write(f'\\npeak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')"
)
_N_PATIENTS, _LABELS, _SHARD = 180, ("blast", "lymphocyte", "monocyte", "neutrophil"), 256
_CHROMIUM = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--latents", type=int, default=49_152)
    parser.add_argument("--d-model", type=int, default=32)
    parser.add_argument("--pages", type=int, default=200, help="latents that get a page")
    options = parser.parse_args()
    peaks: list[float] = []
    for n_images in options.images:
        with tempfile.TemporaryDirectory() as name:
            root = Path(name)
            make_workspace(root, n_images, options)
            arguments = [
                "report", "--root_dir", root, "--store", root / "s.zarr", "--sae_path", root / "sae.pt",
                "--groups", root / "groups.csv", "--n_latents", options.pages, "--masking_images", 0,
                "--out", root / "report",
            ]  # fmt: skip
            started = time.perf_counter()
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
            command = [sys.executable, "-c", _PROGRAM, *map(str, arguments)]
            done = subprocess.run(command, check=True, env=environment, capture_output=True, text=True)
            seconds = time.perf_counter() - started
            peaks.append(int(done.stderr.rpartition("peak ")[2]) / 1000)
            sizes = [item.stat().st_size for item in (root / "report").rglob("*") if item.is_file()]
            line = {
                "name": "report", "ratio": round(peaks[0] / peaks[-1], 3), "images": n_images,
                "seconds": round(seconds, 1),
                "peak_mb": round(peaks[-1]), "page_mb": round(sum(sizes) / 1e6, 1), "latents": options.latents,
                "d_model": options.d_model, "pages": options.pages,
                "image_pages": len(list((root / "report" / "data" / "images").iterdir())),
            }  # fmt: skip
            print_line({**line, **look_at(root / "report")})


def make_workspace(root: Path, n_images: int, options: argparse.Namespace) -> None:
    """A store, an autoencoder, and feature data in which every latent has ten top images spread over the store."""
    rng = np.random.default_rng(0)
    spec = StoreSpec("random", "00" * 32, 1, 2, options.d_model, TokenLayout(1, 0, (16, 16)))
    patients = [f"p{row % _N_PATIENTS:03d}" for row in range(n_images)]
    table = ImageTable(
        [f"{row:06d}.png" for row in range(n_images)], [_LABELS[row % 4] for row in range(n_images)], patients
    )
    provenance = Provenance("random", "0" * 64, "0", "2026-01-01T00:00:00+00:00", "cpu")
    store = create_store(root / "s.zarr", spec, table, provenance, shard_images=_SHARD)
    with StoreWriter(store) as writer:
        for shard in writer.missing_shards():
            n = len(store.shard_rows(shard))
            values = rng.normal(size=(n, *spec.image_shape)).astype(np.float16)
            writer.submit(ShardData(shard, values, [b"\0" * 32] * n, [""] * n, [1] * n))
        writer.finish()
    sae = make_sae("relu", options.d_model, options.latents)
    sae.b_enc.data.fill_(-2.0)
    save_sae(root / "sae.pt", sae, {})
    config = StatisticsConfig(root_dir=root, store=str(root / "s.zarr"), sae_path=root / "sae.pt")
    inputs = open_inputs(config)
    values = np.sort(rng.random((options.latents, 10), dtype=np.float32))[:, ::-1].copy()
    indices = rng.integers(0, n_images, (options.latents, 10))
    labels = LabelIndex.of(inputs.store.images.label)
    features = Features(
        indices,
        labels.numbers[indices],
        values,
        rng.lognormal(size=options.latents).astype(np.float32),
        rng.random(options.latents, dtype=np.float32).clip(1e-4),
        labels.names,
        make_record(inputs, config, "features", top_k=10, n_images=n_images),
    )
    names = sorted(set(patients))
    raw = rng.poisson(2.0, (1, len(names), options.latents))
    of_patients = np.bincount([int(name[1:]) for name in patients])
    record = make_record(inputs, config, "patients", thresholds=[0.2], normalize="image", normalised_threshold=0.2)
    counts = Counts(raw, of_patients, np.array([0.2]), tuple(names), raw[0] / of_patients[:, None], record)
    Statistics(features, {"patient": counts}).save(inputs)
    lines = [f"{name},{'abc'[at % 3]}" for at, name in enumerate(names)]
    (root / "groups.csv").write_text("\n".join(["patient,group", *lines]))


def look_at(report: Path) -> dict[str, float]:
    """How soon a browser shows the report; empty if there is no browser."""
    program = os.environ.get("CYTOSAE_TEST_CHROMIUM") or shutil.which("chromium")
    if program is None:
        return {}
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=_CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto((report / "index.html").as_uri())
        page.wait_for_selector("h1")
        paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? NaN")
        heading = page.evaluate("() => performance.now()")
        scatter = page.evaluate(
            """async () => {
              const begun = performance.now();
              location.hash = '#/latents';
              while (!state.scatter || state.scatter.pending) await new Promise(requestAnimationFrame);
              return performance.now() - begun;
            }"""
        )
        redraw = page.evaluate(
            """() => {
              const begun = performance.now();
              for (let i = 0; i < 20; i++) {
                state.scatter.zoom(i % 2 ? 0.9 : 1 / 0.9, 400, 200);
                state.scatter.paint();
              }
              state.scatter.canvas.getContext('2d').getImageData(0, 0, 1, 1);
              return (performance.now() - begun) / 20;
            }"""
        )
        browser.close()
    times = {
        "first_paint_s": paint / 1000,
        "heading_s": heading / 1000,
        "scatter_s": scatter / 1000,
        "redraw_ms": redraw,
    }
    return {key: round(value, 3) for key, value in times.items()}


if __name__ == "__main__":
    main()
