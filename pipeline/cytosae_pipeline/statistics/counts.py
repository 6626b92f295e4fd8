"""Counts of tokens above thresholds, summed over the images of each patient or class."""

import io
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.statistics.accumulators import Accumulator, GroupCounts, normalise_counts
from cytosae.statistics.block_encoder import PooledActs
from cytosae_cache.format.layout import ImageTable
from cytosae_pipeline.config import StatisticsOptions
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.runtime.devices import accumulator_device
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.records import (
    UnusableResultsError,
    all_within,
    make_record,
    read_record,
    read_result,
    replacing_results,
    require_ours,
    require_unchanged,
)
from cytosae_pipeline.workspace.csv_files import to_csv

logger = logging.getLogger(__name__)

GroupKind = Literal["patient", "label"]


class CountFiles(NamedTuple):
    """Names that one kind of counts is known by; the two kinds never overwrite each other."""

    verb: str
    """The verb, and the plural of the groups."""
    normalised: str
    """File of the normalised counts of the first threshold."""
    raw: str
    """File of the raw counts of all thresholds."""
    groups: str
    """File of the groups in the order of the rows."""


COUNT_FILES: dict[GroupKind, CountFiles] = {
    "patient": CountFiles("patients", "cls_sae_cnt.npy", "patient_counts.npz", "patients.csv"),
    "label": CountFiles("classes", "class_sae_cnt.npy", "class_counts.npz", "classes.csv"),
}


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts per patient or per class (docs/definitions.md, section 7)."""

    counts: npt.NDArray[np.int64]
    """Tokens above each threshold, shape `(n_thresholds, G, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images of each group, shape `(G,)`."""
    thresholds: npt.NDArray[np.float64]
    """Thresholds, shape `(n_thresholds,)`."""
    names: tuple[str, ...]
    """Patients or classes in the order of the rows."""
    normalised: npt.NDArray[np.float64]
    """Counts of the first threshold, normalised as `normalize` in the record says, shape `(G, S)`."""
    record: dict[str, Any]
    """What they were made from: the contents of patients.json or classes.json."""


class CountsAccumulator:
    """Collects counts during a pass of the encoder.

    Args:
        inputs: Autoencoder and store.
        config: Options of `patients` and `classes`.
        kind: Whether images are grouped by patient or by label.
        rows: The rows that may come; only their groups take memory. Default all.

    Raises:
        UserError: If no image has a group.
    """

    def __init__(self, inputs: Inputs, config: StatisticsOptions, kind: GroupKind, rows: slice = slice(None)) -> None:
        self._inputs, self._config, self._kind = inputs, config, kind
        self._groups = inputs.patients if kind == "patient" else inputs.labels
        if not self._groups.names:
            raise UserError(
                f"no image of store '{inputs.store.path}' has a {kind}. Build it from a CSV with a '{kind}' column, or "
                f"from folders with --layout {'class' if kind == 'label' else 'patient or class/patient'}"
            )
        self._numbers = torch.from_numpy(self._groups.numbers)
        device = accumulator_device(inputs.sae.W_enc.device)
        n_groups, n_thresholds = len(self._groups.names), len(config.threshold)
        occurring = self._numbers[rows][torch.from_numpy(inputs.store.valid[rows])]
        self._counts = GroupCounts(n_groups, inputs.n_latents, n_thresholds, occurring=occurring, device=device)

    def update(self, rows: torch.Tensor, pooled: PooledActs) -> None:
        """Count images; the thresholds of the counts are those of the options."""
        self._counts.update(self._numbers[rows], pooled.counts)

    @property
    def state(self) -> list[Accumulator]:
        """What was collected so far."""
        return [self._counts]

    def result(self) -> Counts:
        """The counts of all images counted."""
        config, names = self._config, self._groups.names
        raw, n_images = self._counts.counts.cpu(), self._counts.n_images.cpu()
        verb = COUNT_FILES[self._kind].verb
        empty = [name for name, n in zip(names, n_images.tolist(), strict=True) if not n]
        if empty:
            noun = "patient" if self._kind == "patient" else "class"
            groups = say_count(len(empty), f"{noun} has", f"{verb} have")
            logger.info(f"{groups} no readable image, and so 0 in all columns: {', '.join(empty[:5])}")
        n_without = int(self._inputs.store.valid.sum()) - int(n_images.sum())
        if n_without:
            verb = "is" if n_without == 1 else "are"
            images = say_count(n_without, "image has", "images have")
            logger.info(f"{images} no {self._kind} and {verb} not counted")
        record = counts_record(self._inputs, config, self._kind)
        normalised = normalise_counts(raw[0], n_images, self._inputs.store.n_tokens, config.normalize)
        thresholds = np.array(config.threshold, dtype=np.float64)
        return Counts(raw.numpy(), n_images.numpy(), thresholds, names, normalised.numpy(), record)


def counts_record(inputs: Inputs, config: StatisticsOptions, kind: GroupKind) -> dict[str, Any]:
    """What counts are made from, and with which options: the contents of patients.json or classes.json."""
    thresholds = list(config.threshold)
    about = {"thresholds": thresholds, "normalize": config.normalize, "normalised_threshold": thresholds[0]}
    return make_record(inputs, config, COUNT_FILES[kind].verb, **about)


def require_own_counts(folder: Path, kind: GroupKind, record: Mapping[str, Any], *, replace_foreign: bool) -> None:
    """Refuse to replace counts of another program or activation function, see `require_ours`.

    Raises:
        UserError: If there are such files.
    """
    _, *names = COUNT_FILES[kind]
    require_ours(folder, names, record, replace_foreign=replace_foreign)


def save_counts(
    folder: Path, counts: Counts, kind: GroupKind, images: ImageTable, n_tokens: int, *, replace_foreign: bool = False
) -> list[Path]:
    """Write normalised counts of the first threshold, raw counts of all, and the groups in order, all together.

    Args:
        folder: Where the files go.
        counts: The counts.
        kind: Whether they are per patient or per label.
        images: Table of the store's images.
        n_tokens: Tokens T per image.
        replace_foreign: Replace files of another program, too.

    Returns:
        The files' paths.

    Raises:
        UserError: If a file exists that another program wrote.
    """
    require_own_counts(folder, kind, counts.record, replace_foreign=replace_foreign)
    verb, normalised, raw, groups = COUNT_FILES[kind]
    arrays: dict[str, Any] = {
        "counts": counts.counts,
        "n_images": counts.n_images,
        "thresholds": counts.thresholds,
        "n_tokens": np.int64(n_tokens),
        verb: np.array(counts.names, dtype=np.str_),
    }
    with replacing_results(folder, (normalised, raw, groups), counts.record) as places:
        # In memory first: numpy would add its ending to the temporary names, and its errors of the disk say nothing.
        buffer = io.BytesIO()
        np.save(buffer, counts.normalised, allow_pickle=False)
        places[normalised].write_bytes(buffer.getvalue())
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        places[raw].write_bytes(buffer.getvalue())
        places[groups].write_bytes(_groups_csv(counts, kind, images))
    return [folder / name for name in (normalised, raw, groups, f"{verb}.json")]


def read_counts(folder: Path, kind: GroupKind) -> Counts:
    """Counts that were saved in a folder; shapes, types and ranges are checked.

    Raises:
        UnusableResultsError: If something is missing, cannot be read or does not fit the rest.
    """
    verb, normalised_name, raw_name, groups_name = COUNT_FILES[kind]
    record = read_record(folder, verb)

    def load_raw(path: Path) -> dict[str, npt.NDArray[Any]]:
        _require_uncompressed(path)
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("counts", "n_images", "thresholds", verb)}

    raw = read_result(folder / raw_name, load_raw, verb)
    normalised = read_result(folder / normalised_name, lambda path: np.load(path, allow_pickle=False), verb)
    found = Counts(
        raw["counts"], raw["n_images"], raw["thresholds"], tuple(map(str, raw[verb].ravel())), normalised, record
    )
    types = [array.dtype for array in (found.counts, found.n_images, found.thresholds, normalised)]
    problem = None
    if types != [np.int64, np.int64, np.float64, np.float64] or raw[verb].dtype.kind != "U":
        problem = f"types must be int64, int64, float64, float64, found {', '.join(map(str, types))}"
    elif (
        found.counts.ndim != 3
        or found.thresholds.shape != found.counts.shape[:1]
        or not len(found.thresholds)
        or not found.n_images.shape == raw[verb].shape == found.counts.shape[1:2]
        or normalised.shape != found.counts.shape[1:]
    ):
        named = {"counts": found.counts, "n_images": found.n_images, "thresholds": found.thresholds, verb: raw[verb]}
        shapes = ", ".join(f"{name} {array.shape}" for name, array in {**named, normalised_name: normalised}.items())
        problem = f"shapes do not fit together: {shapes}"
    elif not all(all_within(array, 0, np.inf) for array in (found.counts, found.n_images, normalised)):
        problem = "counts must be finite and at least 0"
    if problem:
        raise UnusableResultsError(f"the files of `{verb}` in '{folder}': {problem}", verb)
    require_unchanged(folder, verb, (normalised_name, raw_name, groups_name))
    return found


def _require_uncompressed(path: Path) -> None:
    """Refuse an archive that could unpack to more than its size.

    Raises:
        ValueError: If a member is compressed, which our own files never are.
        zipfile.BadZipFile: If it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError("it is compressed; expected the arrays as they are")


def patient_labels(images: ImageTable) -> dict[str, list[str]]:
    """The different labels among each patient's images, sorted."""
    labels: dict[str, set[str]] = {name: set() for name in images.patient if name}
    for patient, label in zip(images.patient, images.label, strict=True):
        if patient and label:
            labels[patient].add(label)
    return {patient: sorted(found) for patient, found in labels.items()}


def _groups_csv(counts: Counts, kind: GroupKind, images: ImageTable) -> bytes:
    """Row by row: the group, its readable images and, for patients, the labels among them."""
    groups = zip(counts.names, counts.n_images.tolist(), strict=True)
    if kind == "label":
        return to_csv(["row", kind, "n_images"], [[row, name, n] for row, (name, n) in enumerate(groups)])
    labels = patient_labels(images)
    lines = [[row, name, n, ";".join(labels[name])] for row, (name, n) in enumerate(groups)]
    return to_csv(["row", kind, "n_images", "labels"], lines)
