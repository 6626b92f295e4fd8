"""Reading back what `features`, `patients` and `classes` wrote, or computing it first where it is missing or stale.

Files are data: tensors are read with `weights_only`, arrays without pickle, and all are checked against each other.
"""

import csv
import json
import logging
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.counts import COUNT_FILES, GroupKind, compute_counts
from cytosae_pipeline.statistics.encode import Inputs, open_inputs
from cytosae_pipeline.statistics.features import compute_features, sorted_names

logger = logging.getLogger(__name__)

_Value = TypeVar("_Value")

_TENSORS = {
    "indices": ("max_activating_image_indices", torch.int64),
    "label_indices": ("max_activating_image_label_indices", torch.int64),
    "values": ("max_activating_image_values", torch.float32),
    "mean_acts": ("sae_mean_acts", torch.float32),
    "sparsity": ("sae_sparsity", torch.float32),
}
"""Field of `Features`, its file's stem, and its type."""

_UNREADABLE = (
    OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError, RecursionError,
    csv.Error, pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip
"""What damaged files raise in json, csv, numpy and torch."""


class Features(NamedTuple):
    """What `features` wrote (docs/definitions.md, section 6)."""

    indices: npt.NDArray[np.int64]
    """Rows of the top-k images, shape `(S, k)`; -1 in empty slots."""
    label_indices: npt.NDArray[np.int64]
    """Their labels' places in `labels`, shape `(S, k)`; -1 in empty slots and for images without a label."""
    values: npt.NDArray[np.float32]
    """Their scores, shape `(S, k)`, falling; 0 in empty slots."""
    mean_acts: npt.NDArray[np.float32]
    """Mean score over the images where the latent is active, shape `(S,)`."""
    sparsity: npt.NDArray[np.float32]
    """Share of images where the latent is active, shape `(S,)`; 0 for dead latents."""
    labels: tuple[str, ...]
    """Names of the labels, sorted."""
    record: dict[str, Any]
    """What features.json says: from which autoencoder and store, by which version."""


class Counts(NamedTuple):
    """What `patients` or `classes` wrote (docs/definitions.md, section 7)."""

    counts: npt.NDArray[np.int64]
    """Tokens above each threshold, shape `(n_thresholds, G, S)`."""
    n_images: npt.NDArray[np.int64]
    """Readable images of each group, shape `(G,)`."""
    thresholds: npt.NDArray[np.float64]
    """Thresholds, shape `(n_thresholds,)`."""
    names: tuple[str, ...]
    """Patients or classes in the order of the rows."""
    normalised: npt.NDArray[np.float64]
    """Counts of the first threshold, normalised as the record's `normalize` says, shape `(G, S)`."""
    record: dict[str, Any]
    """What patients.json or classes.json says: from which autoencoder and store, by which version."""


def read_features(folder: Path) -> Features:
    """What `features` wrote in a folder, with shapes, types and ranges checked.

    Raises:
        UserError: If something is missing, cannot be read or does not fit the rest.
    """
    record = _read_record(folder, "features")
    arrays = {name: _read_tensor(folder / f"{stem}.pt", dtype) for name, (stem, dtype) in _TENSORS.items()}
    n_rows, labels = _read_labels(folder / "images.csv")
    found = Features(**arrays, labels=labels, record=record)
    n_latents = len(found.sparsity)
    shapes = [(len(array), array.ndim) for array in arrays.values()]
    problem = None
    if shapes != [(n_latents, 2)] * 3 + [(n_latents, 1)] * 2 or len({array.shape for array in found[:3]}) != 1:
        problem = f"shapes do not fit together: {', '.join(str(array.shape) for array in arrays.values())}"
    elif not _within(found.indices, -1, n_rows - 1) or not _within(found.label_indices, -1, len(labels) - 1):
        problem = f"indices lie outside the {n_rows:,} images or {len(labels):,} labels of images.csv"
    elif not all(_within(array, 0, np.inf) for array in (found.values, found.mean_acts)):
        problem = "scores must be finite and at least 0"
    elif not _within(found.sparsity, 0, 1):
        problem = "shares of images must lie between 0 and 1"
    if problem:
        raise UserError(f"the files of `features` in '{folder}': {problem}. {_again('features')}")
    return found


def read_counts(folder: Path, kind: GroupKind) -> Counts:
    """What `patients` (kind `patient`) or `classes` (kind `label`) wrote in a folder, with shapes and ranges checked.

    Raises:
        UserError: If something is missing, cannot be read or does not fit the rest.
    """
    verb, normalised_name, raw_name, _ = COUNT_FILES[kind]
    record = _read_record(folder, verb)

    def load_raw(path: Path) -> dict[str, npt.NDArray[Any]]:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("counts", "n_images", "thresholds", verb)}

    raw = _read(folder / raw_name, load_raw, verb)
    normalised = _read(folder / normalised_name, lambda path: np.load(path, allow_pickle=False), verb)
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
    elif not all(_within(array, 0, np.inf) for array in (found.counts, found.n_images, normalised)):
        problem = "counts must be finite and at least 0"
    if problem:
        raise UserError(f"the files of `{verb}` in '{folder}': {problem}. {_again(verb)}")
    return found


def ensure_features(config: StatisticsConfig, inputs: Inputs | None = None) -> Features:
    """The feature data of the autoencoder on the store, computed first where missing or made from others.

    Args:
        config: The verb's options; what is there is taken as it is, whatever `top_k` it was made with.
        inputs: Autoencoder and store, if they are open already.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, or files are damaged.
    """
    inputs = inputs or open_inputs(config)
    names = [f"{stem}.pt" for stem, _ in _TENSORS.values()] + ["images.csv"]
    n_valid = int(inputs.store.valid.sum())
    if _is_current(inputs, "features", names) and (_read_record(inputs.folder, "features").get("n_images") == n_valid):
        found = read_features(inputs.folder)
        _say_unused(config, "features", {"top_k": found.values.shape[1]}, inputs)
        return found
    compute_features(config)
    return read_features(inputs.folder)


def ensure_counts(config: StatisticsConfig, kind: GroupKind, inputs: Inputs | None = None) -> Counts:
    """The counts of the autoencoder on the store, computed first where missing or made from others.

    Args:
        config: The verb's options; what is there is taken as it is, whatever its thresholds and normalisation.
        kind: Whether images are grouped by patient or by label.
        inputs: Autoencoder and store, if they are open already.

    Raises:
        ValueError: If the autoencoder or store is missing, they do not fit, no image has a group, or files are damaged.
    """
    inputs = inputs or open_inputs(config)
    verb, *names = COUNT_FILES[kind]
    if _is_current(inputs, verb, names):
        found = read_counts(inputs.folder, kind)
        column = np.array(getattr(inputs.store.images, kind), dtype=np.dtypes.StringDType())
        here, n_images = np.unique(column[inputs.store.valid & (column != "")], return_counts=True)
        counted = {name: n for name, n in zip(found.names, found.n_images.tolist(), strict=True) if n}
        if counted == dict(zip(map(str, here), n_images.tolist(), strict=True)):
            made = {"threshold": tuple(found.thresholds.tolist()), "normalize": found.record.get("normalize")}
            _say_unused(config, verb, made, inputs)
            return found
        logger.info(f"the counts in '{inputs.folder}' are of other images: computing them anew")
    compute_counts(config, kind)
    return read_counts(inputs.folder, kind)


def _say_unused(config: StatisticsConfig, verb: str, made: dict[str, object], inputs: Inputs) -> None:
    """Name the options that were asked for, but with which the results at hand were not made."""
    defaults = {field.name: field.default for field in fields(config)}
    for name, value in made.items():
        wanted = getattr(config, name)
        if wanted not in (value, defaults[name]):
            text, there = (" ".join(map(str, item)) if isinstance(item, tuple) else item for item in (wanted, value))
            logger.info(
                f"--{name} {text} has no effect: the results of `{verb}` in '{inputs.folder}' are there, made with "
                f"{there}. To make them anew, give it to: cytosae-cache {verb}"
            )


def _is_current(inputs: Inputs, verb: str, names: list[str]) -> bool:
    """Whether a verb's files are there and of this autoencoder and store; if not, that is said."""
    if not all((inputs.folder / name).is_file() for name in (*names, f"{verb}.json")):
        logger.info(f"no results of `{verb}` in '{inputs.folder}' yet: computing them first")
        return False
    record = _read_record(inputs.folder, verb)
    wanted = {
        "sae_sha256": inputs.sae_sha256,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
    }
    if any(record.get(name) != value for name, value in wanted.items()):
        logger.info(f"the results of `{verb}` in '{inputs.folder}' are of another autoencoder or store: computing anew")
        return False
    return True


def _read_record(folder: Path, verb: str) -> dict[str, Any]:
    """What a verb's JSON says."""
    path = folder / f"{verb}.json"
    value = _read(path, lambda path: json.loads(path.read_bytes()), verb)
    if not isinstance(value, dict):
        raise UserError(f"'{path}' must hold a JSON object, found {type(value).__name__}. {_again(verb)}")
    return value


def _read_tensor(path: Path, dtype: torch.dtype) -> npt.NDArray[Any]:
    """A tensor's file as an array."""
    value = _read(path, lambda path: torch.load(path, map_location="cpu", weights_only=True), "features")
    if not isinstance(value, torch.Tensor) or value.dtype != dtype or value.layout != torch.strided:
        found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise UserError(f"'{path}' must hold a tensor of {dtype}, found {found}. {_again('features')}")
    return value.detach().numpy()


def _read_labels(path: Path) -> tuple[int, tuple[str, ...]]:
    """Rows of images.csv, and the labels' names; unlike labels.txt it holds names of several lines too."""

    def load(path: Path) -> tuple[int, tuple[str, ...]]:
        with path.open(newline="", encoding="utf-8") as file:
            column = [row["label"] for row in csv.DictReader(file, strict=True)]
        return len(column), tuple(sorted_names(column))

    return _read(path, load, "features")


def _read(path: Path, load: Callable[[Path], _Value], verb: str) -> _Value:
    """A file's contents, with every kind of damage as one error."""
    if not path.is_file():
        raise UserError(f"'{path}' is missing. {_again(verb)}")
    try:
        return load(path)
    except _UNREADABLE as error:
        raise UserError(f"'{path}' cannot be read ({type(error).__name__}: {error}). {_again(verb)}") from error


def _again(verb: str) -> str:
    """What to type."""
    return f"Make them again with: cytosae-cache {verb} --dataset_name NAME --sae_path SAE"


def _within(array: npt.NDArray[Any], low: float, high: float) -> bool:
    """Whether all numbers are finite and lie in a closed range."""
    return bool(np.isfinite(array).all() and (array >= low).all() and (array <= high).all())
