"""`patients` and `classes`: thresholded counts of every latent, summed over the images of a patient or a class."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from cytosae.statistics.accumulators import GroupCounts, PooledActs, normalise_counts
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.storage.atomic import write_file
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.statistics.encode import Inputs, open_inputs, run_pass, withdraw_record, write_record
from cytosae_pipeline.statistics.features import label_index, sorted_names, to_csv

logger = logging.getLogger(__name__)

GroupKind = Literal["patient", "label"]

COUNT_FILES: dict[GroupKind, tuple[str, str, str, str]] = {
    "patient": ("patients", "cls_sae_cnt.npy", "patient_counts.npz", "patients.csv"),
    "label": ("classes", "class_sae_cnt.npy", "class_counts.npz", "classes.csv"),
}
"""Verb, normalised counts, raw counts, and order of the groups. Two sets of names: neither overwrites the other."""


@dataclass(frozen=True)
class CountsResult:
    """What `patients` or `classes` did."""

    folder: Path
    """Where the files lie."""
    files: list[Path]
    """The files."""
    groups: list[str]
    """Patients or classes, in the order of the rows."""
    n_images: int
    """Images counted."""
    n_without_group: int
    """Valid images of no patient or class, which count nowhere."""
    n_latents: int
    """Latents S."""


def compute_counts(config: StatisticsConfig, kind: GroupKind) -> CountsResult:
    """Compute and write the counts of docs/definitions.md, section 7.

    Args:
        config: The verb's options.
        kind: Whether images are grouped by patient or by label.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or no image has a group.
    """
    inputs = open_inputs(config)
    column = list(getattr(inputs.store.images, kind))
    names = sorted_names(column)
    if not names:
        raise UserError(
            f"no image of store '{inputs.store.path}' has a {kind}. Build it from a CSV with a '{kind}' column, or "
            f"from folders with --layout {'class' if kind == 'label' else 'patient or class/patient'}"
        )
    groups = label_index(names, column)
    device = accumulator_device(inputs.sae.W_enc.device)
    counts = GroupCounts(len(names), inputs.sae.W_enc.shape[1], len(config.threshold), device=device)
    verb = COUNT_FILES[kind][0]

    def consume(rows: torch.Tensor, images: PooledActs) -> None:
        counts.update(groups[rows], images.counts)

    run_pass(inputs, config, config.threshold, consume, what=verb)
    files = write_counts(inputs, config, kind, names, counts)
    n_images = int(counts.n_images.sum())
    n_without = int(inputs.store.valid.sum()) - n_images
    empty = [name for name, n in zip(names, counts.n_images.tolist(), strict=True) if not n]
    if empty:
        logger.info(f"{len(empty)} {verb} have no readable image, their rows are 0: {', '.join(empty[:5])}")
    if n_without:
        logger.info(f"{n_without:,} images have no {kind} and count nowhere")
    return CountsResult(inputs.folder, files, names, n_images, n_without, counts.counts.shape[2])


def write_counts(
    inputs: Inputs, config: StatisticsConfig, kind: GroupKind, names: list[str], counts: GroupCounts
) -> list[Path]:
    """Write normalised counts of the first threshold, raw counts of all, and the groups in order.

    Returns:
        The files' paths.
    """
    verb, *file_names = COUNT_FILES[kind]
    normalised_path, raw_path, groups_path = (inputs.folder / name for name in file_names)
    raw, n_images = counts.counts.cpu(), counts.n_images.cpu()
    withdraw_record(inputs, verb)
    normalised = normalise_counts(raw[0], n_images, inputs.store.n_tokens, config.normalize)
    write_file(normalised_path, _to_npy(normalised.numpy()))
    arrays: dict[str, Any] = {
        "counts": raw.numpy(),
        "n_images": n_images.numpy(),
        "thresholds": np.array(config.threshold, dtype=np.float64),
        "n_tokens": np.int64(inputs.store.n_tokens),
        verb: np.array(names, dtype=np.str_),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_file(raw_path, buffer.getvalue())
    write_file(groups_path, _groups_csv(inputs, kind, names, n_images))
    record = write_record(
        inputs, config, verb, thresholds=list(config.threshold), normalize=config.normalize,
        normalised_threshold=config.threshold[0],
    )  # fmt: skip
    return [normalised_path, raw_path, groups_path, record]


def _to_npy(array: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> bytes:
    """An array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _groups_csv(inputs: Inputs, kind: GroupKind, names: list[str], n_images: torch.Tensor) -> bytes:
    """Row by row: the group, its readable images and, for patients, the labels among them."""
    groups = zip(names, n_images.tolist(), strict=True)
    if kind == "label":
        return to_csv(["row", kind, "n_images"], [[row, name, n] for row, (name, n) in enumerate(groups)])
    labels = patient_labels(inputs.store.images)
    lines = [[row, name, n, ";".join(labels[name])] for row, (name, n) in enumerate(groups)]
    return to_csv(["row", kind, "n_images", "labels"], lines)


def patient_labels(images: ImageTable) -> dict[str, list[str]]:
    """The different labels among each patient's images, sorted."""
    labels: dict[str, set[str]] = {name: set() for name in images.patient if name}
    for patient, label in zip(images.patient, images.label, strict=True):
        if patient and label:
            labels[patient].add(label)
    return {patient: sorted(found) for patient, found in labels.items()}
