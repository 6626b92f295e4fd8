"""The whole job against the vision transformer at every step, as the reference works. Prints a JSON line.

    python -m benchmarks.end_to_end --images-path ../shared/data/bccd_cells --images 256 --epochs 24

Baseline: every step of training decodes its images and runs the network on them, then a plain float32 autograd step;
the feature data and the patients' counts run it once more each. Ours: `build`, `train`, `features` and `patients`, from
nothing, with the default precision, on the same device. Both decode in the same number of processes, and batches hold
the same images.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.build import write_random
from benchmarks.measure import print_line
from cytosae.backbones.backbone import describe_backbone, load_backbone
from cytosae.backbones.registry import ARCHITECTURES
from cytosae.sae.base import Sae
from cytosae.sae.loss import LossWeights
from cytosae.sae.registry import make_sae
from cytosae.training.step import TrainStep
from cytosae_cache.reading.permutation import epoch_order
from cytosae_pipeline.building.activations import compute_activations
from cytosae_pipeline.building.build import build_store
from cytosae_pipeline.building.plan import make_spec
from cytosae_pipeline.config import BuildConfig, StatisticsConfig, TrainConfig
from cytosae_pipeline.demo.cohort import plan_cohort, write_cohort
from cytosae_pipeline.images.decoding import ImageDecoder
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import open_dataset
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.statistics.verbs import run_counts, run_features
from cytosae_pipeline.training.loop import train
from cytosae_pipeline.workspace.paths import resolve_model_path

_BATCH = 16
_N_WORKERS = 2


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images-path", type=Path, help="a data set with labels and patients; drawn cells by default")
    parser.add_argument("--model-path", type=Path, default=Path("embedded"))
    parser.add_argument("--encoder", choices=list(ARCHITECTURES), help="a known encoder with random weights instead")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--expansion", type=int, default=16)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.encoder:
            options.model_path = write_random(root, ARCHITECTURES[options.encoder])
        source = options.images_path or draw_cells(root / "cells", options.images)
        images = open_dataset(source).spread(options.images)
        started = time.perf_counter()
        ours = run_ours(root, source, options)
        ours_s = time.perf_counter() - started
        started = time.perf_counter()
        run_reference(images, options)
        baseline_s = time.perf_counter() - started
        name = describe_backbone(_model(options), name=options.encoder, block=-2).name
    print_line(
        {
            "name": "end_to_end", "ratio": round(baseline_s / ours_s, 2), "baseline_s": round(baseline_s, 1),
            "ours_s": round(ours_s, 1), "images": len(images), "epochs": options.epochs, "batch": _BATCH,
            "expansion": options.expansion, "model": name, "stages_s": ours,
            "threads": torch.get_num_threads(), "device": choose_device(options.device).type,
        }
    )  # fmt: skip


def run_ours(root: Path, source: Path, options: argparse.Namespace) -> dict[str, float]:
    """The four verbs; how long each took."""
    seconds = {}
    common = {
        "root_dir": root, "dataset_name": "job", "model_path": options.model_path, "model_name": options.encoder,
        "device": options.device,
    }  # fmt: skip
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    build_store(BuildConfig(**common, images=source, limit=options.images, workers=_N_WORKERS))
    lap("build")
    trained = train(
        TrainConfig(
            **common, expansion_factor=options.expansion, batch_size=_BATCH, n_checkpoints=0, use_ghost_grads=True,
            total_training_tokens=options.epochs * options.images,
        ),
    )  # fmt: skip
    lap("train")
    statistics = StatisticsConfig(**common, sae_path=trained.sae)
    run_features(statistics)
    lap("features")
    run_counts(statistics, "patient")
    lap("patients")
    return seconds


def run_reference(images: ImageList, options: argparse.Namespace) -> None:
    """The same work with the network at every step, everything in float32."""
    info = describe_backbone(_model(options), name=options.encoder, block=-2)
    device = choose_device(options.device)
    backbone = load_backbone(_model(options), info, device=device)
    spec = make_spec(info, store_dtype="float32", precision="fp32")
    sae = make_sae("relu", info.d_model, options.expansion * info.d_model, device=device)
    step = TrainStep(
        sae, lr=4e-4, weights=LossWeights(l1_coefficient=8e-5), use_ghost_grads=True, dead_feature_window=64
    )
    with ImageDecoder(images, n_workers=_N_WORKERS, image_size=info.image_size) as decoder:

        def activations(rows: list[int]):  # noqa: ANN202 - a generator of float32 tensors
            decoded = decoder.iter_rows(rows)
            for start in range(0, len(rows), _BATCH):
                batch = [next(decoded) for _ in rows[start : start + _BATCH]]
                yield torch.from_numpy(compute_activations(backbone, batch, spec, device)[0]).to(device)

        for epoch in range(options.epochs):
            for x in activations(epoch_order(len(images), seed=0, epoch=epoch).tolist()):
                step.step(x)
        rows = list(range(len(images)))
        read_features(sae, activations(rows))
        count_patients(sae, activations(rows), images)


@torch.no_grad()
def read_features(sae: Sae, batches) -> None:  # noqa: ANN001 - of tensors
    """Top images, means and sparsity from full forward passes with everything kept."""
    scores = torch.cat([sae(x).acts.mean(dim=1) for x in batches])
    scores.topk(min(10, len(scores)), dim=0)
    scores.sum(dim=0) / (scores > 0).sum(dim=0).clamp(min=1)


@torch.no_grad()
def count_patients(sae: Sae, batches, images: ImageList) -> None:  # noqa: ANN001 - of tensors
    """Tokens above a threshold of every patient."""
    names, groups = np.unique(list(images.patients), return_inverse=True)
    groups = torch.from_numpy(groups).to(sae.b_enc.device)
    counts = torch.zeros(len(names), sae.b_enc.shape[0], dtype=torch.int64, device=groups.device)
    at = 0
    for x in batches:
        above = (sae(x).acts > 0.2).sum(dim=1)
        counts.index_add_(0, groups[at : at + len(x)], above)
        at += len(x)
    counts.cpu()


def draw_cells(folder: Path, n_images: int) -> Path:
    """Drawn cells of patients."""
    per_patient = 8
    n_groups = -(-n_images // (3 * per_patient))
    cells = plan_cohort(seed=0, n_patients_per_group=max(1, n_groups), cells_per_patient=per_patient)
    return write_cohort(folder, cells, on_progress=lambda done, total: None)


def _model(options: argparse.Namespace) -> Path:
    path = resolve_model_path(options.model_path)
    assert path is not None
    return path


if __name__ == "__main__":
    main()
