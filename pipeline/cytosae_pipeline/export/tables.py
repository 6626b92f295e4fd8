"""The results of stage two as tables of latents, patients and images.

Numbers are arrays; texts are lists in which None means unknown.
"""

import itertools
from collections.abc import Container, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.latents import label_mass
from cytosae_cache.store import ActivationStore
from cytosae_pipeline import __version__
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.statistics.counts import Counts, patient_labels
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.notes import LatentNote

Column = npt.NDArray[Any] | list[str | None]
Table = Mapping[str, Column]

RESERVED_COLUMNS = ("row", "path", "label", "patient", "latent", "score")
"""Columns of our own in the table of images, which has one line for every score above 0."""


class ImageTexts(NamedTuple):
    """Names of the images that could be read, one entry per image in order of the row."""

    row: npt.NDArray[np.int64]
    """Row in the store, shape `(n,)`."""
    path: list[str | None]
    """Path below the data set's root."""
    label: list[str | None]
    """Class."""
    patient: list[str | None]
    """Patient."""
    further: Table = MappingProxyType({})
    """What else is known about the images, by name."""


class Tables(NamedTuple):
    """Everything that is written except the scores of images."""

    latents: Table
    """name, sparsity, mean_acts, label_entropy, dead and labels, one entry per latent."""
    patients: Table | None
    """patient, n_images, labels, possibly group, and further columns, by patient; None if no image has one."""
    counts: Counts | None
    """Counts in the order of `patients`."""
    images: ImageTexts
    """The images that could be read."""
    provenance: dict[str, Any]
    """The autoencoder and store that the numbers come from: texts, numbers and arrays."""


def latent_name(latent: int) -> str:
    """A latent's name as the header of a column or row."""
    return f"latent_{latent}"


def collect_tables(
    inputs: Inputs,
    features: Features,
    counts: Counts | None,
    *,
    notes: Mapping[int, LatentNote] = MappingProxyType({}),
    groups: Mapping[str, str] | None = None,
    known: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> Tables:
    """The tables of one autoencoder on one store.

    Args:
        inputs: Autoencoder and store.
        features: Feature data.
        counts: Counts of patients; None if no image has one.
        notes: Names of latents.
        groups: Group of each patient; adds a column to patients and images.
        known: Further columns of patients by name, one entry per patient in the order of the counts.

    Raises:
        UserError: If a name cannot be written in the formats.
    """
    patients = None if counts is None else make_patient_table(inputs.store, counts)
    if patients is not None and counts is not None and groups is not None:
        patients = {**patients, "group": _texts([groups.get(name, "") for name in counts.names])}
    if patients is not None:
        patients = _with_known(patients, known, len(features.sparsity))
    return Tables(
        make_latent_table(features, notes), patients, counts, make_image_texts(inputs.store, groups),
        make_provenance(inputs, features, counts),
    )  # fmt: skip


def _with_known(patients: Table, known: Mapping[str, npt.NDArray[Any]], n_latents: int) -> Table:
    """The table of patients with further columns, under names that nothing else has, columns of latents included."""
    table: dict[str, Column] = dict(patients)
    latents = set(map(latent_name, range(n_latents))) if known else set()
    for name, column in known.items():
        safe = _free_name(name, table.keys() | latents, prefix="patient")
        table[safe] = _texts(column.tolist()) if column.dtype.kind == "T" else column
    return table


def make_patient_table(store: ActivationStore, counts: Counts) -> Table:
    """`patient`, `n_images` and `labels` (joined by `;`), one entry per patient in the order of the counts."""
    labels = patient_labels(store.images)
    joined = [";".join(labels.get(name, [])) for name in counts.names]
    return {"patient": _texts(counts.names), "n_images": counts.n_images, "labels": _texts(joined)}


def make_latent_table(features: Features, notes: Mapping[int, LatentNote] = MappingProxyType({})) -> Table:
    """One entry per latent.

    Args:
        features: Feature data.
        notes: Names of latents.

    Returns:
        `name` (unknown for latents without one), `sparsity`, `mean_acts` (docs/definitions.md, section 6),
        `label_entropy` (section 8; -1 where fewer than k slots are filled), `dead` (active on no image), and of the
        labels among its top-k images, weighted by score: `top_label`, its share `top_label_share` (0 if there is none),
        and `top_labels`, all by falling share, joined by `;`.
    """
    mass = label_mass(features.top_values, features.top_labels, len(features.labels))
    order = np.argsort(-mass, axis=1, kind="stable")
    names = [
        [features.labels[label] for label in row if weights[label] > 0]
        for row, weights in zip(order.tolist(), mass, strict=True)
    ]
    total = features.top_values.sum(axis=1, dtype=np.float64)
    share = mass.max(axis=1, initial=0) / np.where(total > 0, total, 1)
    given = {latent: note["name"] for latent, note in notes.items()}
    return {
        "name": _texts([given.get(latent, "") for latent in range(len(features.sparsity))]),
        "sparsity": features.sparsity,
        "mean_acts": features.mean_acts,
        "label_entropy": features.label_entropy,
        "dead": features.sparsity == 0,
        "top_label": _texts([row[0] if row else "" for row in names]),
        "top_label_share": share,
        "top_labels": _texts([";".join(row) for row in names]),
    }


def make_image_texts(store: ActivationStore, groups: Mapping[str, str] | None = None) -> ImageTexts:
    """Names of the readable images of a store, and whatever else it knows about them.

    Args:
        store: The store.
        groups: Group of each patient; adds a column `group`.
    """
    rows = store.valid_rows
    further: dict[str, Column] = {}
    if groups is not None:
        further["group"] = _texts([groups.get(store.images.patient[row], "") for row in rows.tolist()])
    for name, column in store.image_columns.items():
        some = column[rows]
        further[_free_name(name, further)] = _texts(some.tolist()) if some.dtype.kind == "T" else some
    path, label, patient = map(_texts, store.images.take(rows))
    return ImageTexts(rows, path, label, patient, further)


def _free_name(name: str, taken: Container[str], *, prefix: str = "image") -> str:
    """A name for a further column that no format refuses and no other column has."""
    # HDF5 takes / and single dots for places in the file, and anndata keeps names that begin with _ for itself.
    safe = name.replace("/", "_")
    if safe in RESERVED_COLUMNS or safe.startswith("_") or not safe.strip("."):
        safe = f"{prefix}_{safe}"
    return next(free for n in itertools.count(1) if (free := safe if n == 1 else f"{safe}_{n}") not in taken)


def make_provenance(inputs: Inputs, features: Features | None, counts: Counts | None) -> dict[str, Any]:
    """Origin of the numbers: hashes and names, without any path of this machine."""
    record: dict[str, Any] = {
        "package_version": __version__,
        "dataset": inputs.store.provenance.dataset,
        "sae_sha256": inputs.sae_sha256,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
        "store_contents": inputs.store.contents,
        "model_name": inputs.store.spec.model_name,
    }
    if features is not None:
        record["top_k"] = features.top_values.shape[1]
    if counts is not None:
        record |= {
            "threshold": float(counts.thresholds[0]),
            "thresholds": counts.thresholds,
            "normalize": str(counts.record.get("normalize")),
        }
    return record


def _texts(values: Sequence[str]) -> list[str | None]:
    """Texts with None for ''.

    Raises:
        UserError: If one contains a NUL character, which HDF5 does not support.
    """
    for value in values:
        if "\0" in value:
            raise UserError(
                f"the name {quote(value)} contains a NUL byte, which no exported file supports: the store is damaged"
            )
    return [value or None for value in values]
