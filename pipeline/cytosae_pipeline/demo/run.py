"""`demo`: the whole program on a synthetic cohort with planted groups."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.analysis.latents import is_defined
from cytosae_pipeline.building.build import build_store
from cytosae_pipeline.config import BuildConfig, DemoConfig, ReportConfig, StatisticsConfig, TrainConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.demo.cohort import plan_cohort, write_cohort
from cytosae_pipeline.report.static import write_report
from cytosae_pipeline.runtime.progress import Progress, format_seconds
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import open_inputs
from cytosae_pipeline.statistics.results import compute_statistics
from cytosae_pipeline.training.loop import train

DATASET = "demo"
_N_PATIENTS_PER_GROUP = 12
_N_CELLS_PER_PATIENT = 20
_N_LATENTS = 60
_MARGIN = 0.25
"""Accuracy above chance from which groups count as recovered: far outside the spread of chance with 36 patients."""


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and found."""

    files: list[Path | str]
    """Everything that was written; folders for stores and images."""
    n_images: int
    """Cells drawn."""
    explained_variance: float
    """Share of the activations' variance that the autoencoder explains at the last step."""
    l0: float
    """Active latents per token at the last step."""
    n_specific: int
    """Active latents whose top images are nearly all of one class (label entropy below 0.1 nats)."""
    n_active: int
    """Latents that are active at all."""
    accuracy: float
    """Balanced accuracy of telling a patient's group from its latent counts, cross-validated as on the page."""
    chance: float
    """Balanced accuracy of guessing."""
    report: Path
    """The page to open in a browser."""
    seconds: float
    """Duration in seconds."""
    root: Path
    """The demo's folder."""

    @property
    def recovered(self) -> bool:
        """Whether the planted groups were recovered."""
        return self.accuracy >= self.chance + _MARGIN

    def describe(self) -> str:
        """The result as text, and what to type next."""
        verdict = "the planted groups are recovered" if self.recovered else "the planted groups were NOT recovered"
        files = "\n".join(f"  {path}" for path in self.files)
        return (
            f"\n{self.n_images:,} cells, explained variance {self.explained_variance:.3f}, "
            f"{self.l0:.1f} active latents per token (L0)\n"
            f"{self.n_specific} of {self.n_active} active latents fire for one cell class only\n"
            f"patients' groups predicted from their latent counts, cross-validated: balanced accuracy "
            f"{self.accuracy:.1%} (guessing: {self.chance:.1%}): {verdict}\n"
            f"done in {format_seconds(self.seconds)}; everything written:\n{files}\n\n"
            "With your own images (a folder class/patient/image, or a CSV with columns path,label,patient):\n"
            "  cytosae-cache build    --dataset_name mine --images PATH --model_path ./DinoBloom-B.pth\n"
            "  cytosae-cache train    --dataset_name mine --batch_size 64 --use_ghost_grads\n"
            "  cytosae-cache features --dataset_name mine --sae_path latest\n"
            "  cytosae-cache patients --dataset_name mine --sae_path latest\n"
            "  cytosae-cache report   --dataset_name mine --sae_path latest\n"
            f"List what the demo wrote:  {command('list', root_dir=self.root)}\n\n"
            f"Open the report of cells, latents and patients in any browser: {self.report}"
        )


def run_demo(root: Path | str, *, seed: int = 0, scanners: bool = False) -> DemoResult:
    """Draw the cohort, run every stage on it, and check that the planted groups are recovered.

    Args:
        root: Folder for images and outputs; a second demo in the same folder reuses its images, store and run.
        seed: Seed of the cohort.
        scanners: Whether two scanners are a confounder of the groups.

    Raises:
        UserError: If the seed is out of range.
    """
    config = DemoConfig(root_dir=Path(root), seed=seed, scanners=scanners)
    root, seed = config.root_dir, config.seed
    started = time.monotonic()
    cells = plan_cohort(
        seed=seed,
        n_patients_per_group=_N_PATIENTS_PER_GROUP,
        cells_per_patient=_N_CELLS_PER_PATIENT,
        scanners=scanners,
    )
    images = root / "dataset" / f"{DATASET}-{seed}{'-scanners' if scanners else ''}"
    with Progress("draw", len(cells), "cells") as bar:
        manifest = write_cohort(images, cells, on_progress=lambda done, total: bar.advance())
    source: dict[str, Any] = {
        "root_dir": root,
        "dataset_name": images.name,
        "images": manifest,
        "model_path": Path("embedded"),
    }
    built = build_store(BuildConfig(**source))
    trained = train(
        TrainConfig(
            **source, expansion_factor=8, total_training_tokens=8 * len(cells), batch_size=16, l1_coefficient=0.0005,
            lr=0.001, lr_warm_up_steps=50, use_ghost_grads=True, n_checkpoints=1, precision="fp32",
        ),
    )  # fmt: skip
    statistics = StatisticsConfig(**source, sae_path=trained.sae)
    inputs = open_inputs(statistics, encoder_only=False)
    found = compute_statistics(
        inputs, statistics, features=True, counts=["label", "patient"], profiles=True, what="statistics"
    )
    assert found.features is not None
    files = found.save(inputs)
    known: dict[str, Any] = {"covariates": images / "covariates.csv", "strata": "scanner"} if scanners else {}
    page = write_report(
        ReportConfig(**source, sae_path=trained.sae, groups=images / "patients.csv", n_latents=_N_LATENTS, **known),
        inputs=inputs,
        statistics=found,
    )
    groups = page.classification
    assert groups is not None
    return DemoResult(
        files=[images, built.store, trained.folder, *files, page.index.parent],
        report=page.index,
        n_images=int(found.features.record["n_images"]),
        explained_variance=trained.metrics["metrics/explained_variance"],
        l0=trained.metrics["metrics/l0"],
        n_specific=count_specific(found.features),
        n_active=found.features.n_active,
        accuracy=groups["balanced_accuracy"],
        chance=1 / len(groups["names"]),
        seconds=time.monotonic() - started,
        root=root,
    )


def count_specific(features: Features) -> int:
    """Latents whose top images are nearly all of one class."""
    entropy = features.label_entropy
    return int((is_defined(entropy) & (entropy < 0.1)).sum())
