"""What a report is computed from: store, autoencoder, statistics, and the names that the page uses."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cytosae.analysis.latents import cluster_latents, label_mass
from cytosae.analysis.specificity import mostly_label
from cytosae.statistics.histograms import ProfileResult
from cytosae_cache.storage.disk import reading
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.rating.passed import Passed, require_passed
from cytosae_pipeline.report.data.cohort import Cohort, limit_cohort, open_cohort
from cytosae_pipeline.report.data.pseudonyms import ensure_key, shuffled_numbers
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import PlacedInputs, open_inputs
from cytosae_pipeline.statistics.label_index import number_names
from cytosae_pipeline.statistics.notes import FILE_NAME, LatentNote, Subject, read_notes
from cytosae_pipeline.statistics.results import Statistics, ensure_statistics

logger = logging.getLogger(__name__)

KEY_NAME = "pseudonym.key"


@dataclass(frozen=True)
class LatentData:
    """What the page knows of latents from the feature data alone."""

    config: PageConfig
    """Options."""
    features: Features
    """Feature data of docs/definitions.md, section 6."""
    entropy: npt.NDArray[np.float64]
    """Label entropy of docs/definitions.md, section 8, shape `(S,)`; 0 for a single label, -1 where not defined."""
    clusters: npt.NDArray[np.int64]
    """Cluster of each latent, shape `(S,)`; -1 for those never active."""
    notes: dict[int, LatentNote]
    """Names and notes of latents."""
    passed: Passed | None = field(default=None, kw_only=True)
    """Latents that passed their rating, if the page is limited to them."""

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return len(self.features.sparsity)

    @property
    def top_rows(self) -> npt.NDArray[np.int64]:
        """Rows of each latent's top images, shape `(S, k)`; -1 in empty slots."""
        return self.features.top_rows


def make_latent_data(
    config: PageConfig, features: Features, notes_path: Path, *, subject: Subject | None = None
) -> LatentData:
    """The feature data with what follows from them, and the notes in a file.

    Args:
        config: Options.
        features: The feature data.
        notes_path: The file.
        subject: What the notes must be about, as for `read_notes`.

    Raises:
        UserError: If the file contains something else than notes, or notes about something else, or the page is limited
            to latents that passed their rating and none did.
    """
    n_latents, keep = len(features.sparsity), config.keep_notes
    passed = None
    if config.passed:
        passed = require_passed(notes_path.parent, n_latents, config, subject=subject, keep=keep)
    return LatentData(
        config=config,
        features=features,
        entropy=features.label_entropy,
        clusters=cluster_latents(features.mean_acts, features.sparsity, config.clusters, seed=config.seed),
        notes=read_notes(notes_path, n_latents, subject=subject, keep=keep),
        passed=passed,
    )


@dataclass(frozen=True)
class ReportData(LatentData):
    """Everything that the page's records are computed from."""

    inputs: PlacedInputs
    """Store and autoencoder, decoder included."""
    labels: npt.NDArray[np.int64]
    """Label of each image, shape `(n_images,)`; -1 for none."""
    patients: npt.NDArray[np.int64]
    """Place of each image's patient in the cohort, shape `(n_images,)`; -1 for none."""
    numbers: npt.NDArray[np.int64]
    """Number of each image on the page, shape `(n_images,)`: its row, or a shuffled number under pseudonyms."""
    profiles: ProfileResult | None
    """Profiles of all latents, if a pass over the store was made; None if saved results were reused."""
    cohort: Cohort | None
    """The patients, if the images have any."""
    pseudonymous: bool
    """Whether patients' names are replaced and paths left out."""

    @property
    def store(self) -> ActivationStore:
        """The store."""
        return self.inputs.store

    @property
    def subjects(self) -> npt.NDArray[np.int64] | None:
        """Subject of each image, shape `(n_images,)`, -1 for none; None if every patient is a person."""
        if self.cohort is None or self.cohort.subjects is None:
            return None
        return np.where(self.patients >= 0, self.cohort.subjects.of[self.patients], -1)

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return self.store.spec.tokens.n_cls + self.store.spec.tokens.n_registers

    @property
    def threshold(self) -> float:
        """Activation above which a token counts."""
        return self.config.threshold[0] if self.cohort is None else self.cohort.threshold

    @property
    def notes_path(self) -> Path:
        """File of the notes on latents."""
        return self.inputs.folder / FILE_NAME

    def read_notes(self) -> dict[int, LatentNote]:
        """The notes as they are now."""
        subject, keep = Subject.of(self.inputs), self.config.keep_notes
        return read_notes(self.notes_path, self.n_latents, subject=subject, keep=keep)


def open_report_data(
    config: PageConfig,
    *,
    pseudonymous: bool = False,
    profiles: bool = True,
    inputs: PlacedInputs | None = None,
    statistics: Statistics | None = None,
) -> ReportData:
    """Open autoencoder and store once; compute in one pass what stage two has not computed yet.

    Args:
        config: Options.
        pseudonymous: Whether patients' names are replaced and paths left out.
        profiles: Whether profiles are collected if a pass over the store is made anyway.
        inputs: Autoencoder with its decoder, and store, if they are open already.
        statistics: Feature data, and counts of patients if there are any, if they have been computed already.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or an option does not fit them.
    """
    inputs = inputs or open_inputs(config, encoder_only=False)
    store = inputs.store
    found = statistics or ensure_statistics(
        inputs, config, counts=["patient"] if any(store.images.patient) else [], profiles=profiles
    )
    features, counts = found.features, found.counts.get("patient")
    assert features is not None
    if features.specificity is None and features.labels:
        logger.info(
            "the feature data do not say how specific latents are to a label, so those with the lowest label entropy "
            f"come first. Results of older versions lack it: {command('features', config)}"
        )
    key = ensure_key(inputs.folder / KEY_NAME) if pseudonymous and counts is not None else None
    cohort, patients = open_cohort(counts, inputs, config, key)
    latent_data = make_latent_data(config, features, inputs.folder / FILE_NAME, subject=Subject.of(inputs))
    if cohort is not None and latent_data.passed is not None:
        cohort = limit_cohort(cohort, latent_data.passed.latents)
    return ReportData(
        **vars(latent_data),
        inputs=inputs,
        labels=number_names(store.images.label, features.labels),
        profiles=found.profiles,
        patients=patients,
        numbers=np.arange(store.n_images) if key is None else shuffled_numbers(store.n_images, key),
        cohort=cohort,
        pseudonymous=pseudonymous,
    )


def label_counts(data: ReportData) -> npt.NDArray[np.int64]:
    """Readable images of each label, shape `(L,)`."""
    here = data.labels[data.store.valid]
    return np.bincount(here[here >= 0], minlength=len(data.features.labels))


def main_labels(data: LatentData, latents: npt.NDArray[np.int64]) -> list[int]:
    """The label that each latent's images mostly have, by top images and means alike; -1 where they do not agree."""
    features = data.features
    if features.specificity is None:
        return [-1] * len(latents)
    mass = label_mass(features.top_values[latents], features.top_labels[latents], len(features.labels))
    return [int(label) for label in mostly_label(mass, features.specificity.label_means[latents])]


def read_training(sae_path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl beside an autoencoder; none if there is no such file. Truncated lines are skipped."""
    folder = sae_path if sae_path.is_dir() else sae_path.parent
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    with reading(path), path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                lines.append(value)
    return lines


def decoder_neighbours(data: ReportData, latents: npt.NDArray[np.int64], n: int) -> list[list[tuple[int, float]]]:
    """For each given latent, the active latents with the largest cosine similarity of decoder rows.

    Args:
        data: Store and autoencoder.
        latents: Latents, shape `(M,)`.
        n: Number of neighbours.
    """
    rows = torch.nn.functional.normalize(data.inputs.sae.W_dec.detach().float(), dim=1)
    dead = torch.from_numpy(data.features.sparsity == 0).to(rows.device)
    found = []
    for part in torch.split(torch.from_numpy(latents), 64):
        here = part.to(rows.device)
        cosine = rows[here] @ rows.T
        cosine[:, dead] = -2
        cosine[torch.arange(len(here)), here] = -2
        values, others = cosine.topk(min(n, data.n_latents), dim=1)
        for near, far in zip(values.tolist(), others.tolist(), strict=True):
            found.append([(other, value) for value, other in zip(near, far, strict=True) if value > -2])
    return found
