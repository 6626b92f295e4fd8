"""Reads an atlas that somebody else may have written: sizes first, then digests, then contents; nothing is executed."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays

from cytosae.backbones.errors import shown
from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.spec import StoreSpec
from cytosae_pipeline.atlas.contents import (
    FILES,
    FORMAT,
    LEVELS,
    MANIFEST,
    REFERENCE,
    SAE,
    VERSION,
    Atlas,
    AtlasError,
    Barcodes,
    GroupQuality,
    Reference,
)
from cytosae_pipeline.atlas.writing import sign
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.statistics.inputs import read_sae
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES
from cytosae_pipeline.statistics.notes import LatentNote, check_note

_MOST_MANIFEST, _MOST_NOTES = 1 << 26, 1 << 28
_MOST_NAME = 1000
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_AGAIN = "Get the folder again from whoever made it"


def read_atlas(folder: Path, *, device: torch.device | str = "cpu") -> Atlas:
    """Read an atlas and check all of it.

    Args:
        folder: The folder.
        device: Device of the autoencoder.

    Raises:
        AtlasError: If it is not an atlas, or one that was damaged, changed or made up.
        SaeCheckpointError: If its autoencoder cannot be used.
        NotEnoughMemoryError: If it does not fit into memory.
    """
    manifest = _read_manifest(folder)
    sizes = {name: _require_file(folder, name, manifest) for name in FILES}
    require_memory(
        sum(sizes.values()), available_ram(), f"reading the atlas '{folder}'", "Use a machine with more memory"
    )
    try:
        spec = StoreSpec.from_json(manifest["spec"])
        arrays = _read_arrays(folder, manifest)
        notes = _read_notes(folder, manifest)
        _hash_file(folder, SAE, manifest)
        sae = read_sae(folder / SAE, device=device)
        if tuple(sae.W_dec.shape) != (manifest["n_latents"], spec.d_model):
            raise AtlasError(
                f"its autoencoder has {sae.W_dec.shape[0]:,} latents of width {sae.W_dec.shape[1]:,}, expected "
                f"{manifest['n_latents']:,} of width {spec.d_model:,}"
            )
        return _assemble(manifest, spec, sae, arrays, notes)
    except (AtlasError, StoreCorruptError, KeyError, TypeError) as error:
        raise AtlasError(f"atlas '{folder}' cannot be used: {shown(str(error), 300)}. {_AGAIN}") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, with every field of the right type.

    Raises:
        AtlasError: If it is missing, damaged or of another version.
    """
    if not folder.is_dir() or not os.path.lexists(folder / MANIFEST):
        raise AtlasError(
            f"'{folder}' is not an atlas: expected a folder with {MANIFEST}, as written by: cytosae-cache export "
            "--format atlas"
        )
    with _open(folder, MANIFEST) as file:
        data = file.read(_MOST_MANIFEST + 1)
    where = f"'{folder / MANIFEST}'"
    if len(data) > _MOST_MANIFEST:
        raise AtlasError(f"{where} has more than {_MOST_MANIFEST:,} bytes: it is not a manifest of an atlas")
    try:
        manifest = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AtlasError(f"{where} is not JSON ({error}). {_AGAIN}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise AtlasError(f"{where} is not the manifest of an atlas: its format is not '{FORMAT}'")
    if manifest.get("version") != VERSION:
        raise AtlasError(
            f"atlas '{folder}' has version {shown(repr(manifest.get('version')))} of the format, this program reads "
            f"version {VERSION}: install a version of cytosae-cache that fits"
        )
    try:
        signed = sign(manifest)
    except (ValueError, RecursionError) as error:
        raise AtlasError(f"{where} cannot be read ({error}). {_AGAIN}") from error
    if signed["sha256"] != manifest.get("sha256"):
        raise AtlasError(f"{where} was changed or damaged after it was written: its digest is another. {_AGAIN}")
    try:
        _check_types(manifest)
    except AtlasError as error:
        raise AtlasError(f"{where}: {error}. {_AGAIN}") from error
    return manifest


def _refuse_constant(name: str) -> float:
    raise ValueError(f"found {name}")


def _check_types(manifest: Mapping[str, Any]) -> None:
    """Refuse fields that are missing, or of another type or range.

    Raises:
        AtlasError: If there is one.
    """
    for name in ("d_model", "n_latents", "n_images", "n_scored", "n_compared"):
        if type(manifest.get(name)) is not int or not 0 < manifest[name] < 1 << 40:
            raise AtlasError(f"{name} must be a whole number above 0, found {shown(repr(manifest.get(name)))}")
    if type(manifest.get("threshold")) not in (int, float) or manifest["threshold"] < 0:
        raise AtlasError(f"threshold must be a number of at least 0, found {shown(repr(manifest.get('threshold')))}")
    if type(manifest.get("variance")) not in (int, float) or not 0 < manifest["variance"] < 1e300:
        raise AtlasError(f"variance must be a number above 0, found {shown(repr(manifest.get('variance')))}")
    for name in ("labels", "patients", "groups", "predicted_groups"):
        value = manifest.get(name)
        if not isinstance(value, list) or not all(_is_name(item) for item in value) or len(set(value)) != len(value):
            raise AtlasError(f"{name} must be different names of at most {_MOST_NAME:,} characters")
    if manifest.get("levels") != list(LEVELS):
        raise AtlasError("its quantiles are of other levels")
    for name, allowed in (
        ("tokens", ("all", "patches", "cls")),
        ("unit", ("patient", "subject")),
        ("seen", ("held out", "trained on", "not recorded")),
    ):
        if manifest.get(name) not in allowed:
            raise AtlasError(f"{name} must be one of {', '.join(allowed)}, found {shown(repr(manifest.get(name)))}")
    accuracy: Any
    accuracy, predicted = manifest.get("balanced_accuracy"), manifest["predicted_groups"]
    if predicted and (type(accuracy) not in (int, float) or not 0 <= accuracy <= 1 or len(predicted) < 2):
        raise AtlasError(f"balanced_accuracy must lie between 0 and 1, found {shown(repr(accuracy))}")
    if not set(predicted) <= set(manifest["groups"]):
        raise AtlasError("predicted_groups names groups that are not in groups")
    if not isinstance(manifest.get("files"), dict) or set(manifest["files"]) != set(FILES):
        raise AtlasError(f"files must be {', '.join(FILES)}")


def _is_name(value: object) -> bool:
    """Whether a value is a name of one line that can be shown anywhere."""
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_NAME:
        return False
    return not any("\ud800" <= c <= "\udfff" for c in value)


def _open(folder: Path, name: str) -> BufferedReader:
    """Open a file of the folder itself, never what a link or a pipe leads to.

    Raises:
        AtlasError: If it is anything else than a file.
    """
    path = folder / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise AtlasError(f"'{path}' must be a file, found a link or something else. {_AGAIN}")
        return os.fdopen(os.open(path, _FLAGS), "rb")
    except OSError as error:
        raise AtlasError(f"'{path}' cannot be read: {error.strerror or error}. {_AGAIN}") from error


def _require_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> int:
    """Size of a file, which is that of the manifest; nothing is read.

    Raises:
        AtlasError: If it is not.
    """
    facts = manifest["files"][name]
    wanted = facts.get("bytes") if isinstance(facts, dict) else None
    with _open(folder, name) as file:
        found = os.fstat(file.fileno()).st_size
    if type(wanted) is not int or wanted != found:
        raise AtlasError(
            f"'{folder / name}' has {found:,} bytes, expected {shown(repr(wanted))}: it is damaged. {_AGAIN}"
        )
    return found


def _hash_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Check the digest of a file, which is read in pieces."""
    with _open(folder, name) as file:
        _require_digest(name, hashlib.file_digest(file, "sha256").hexdigest(), manifest)


def _read_bytes(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """The bytes of a file that has the size and the digest of the manifest."""
    with _open(folder, name) as file:
        data = file.read(manifest["files"][name]["bytes"] + 1)
    _require_digest(name, hashlib.sha256(data).hexdigest(), manifest)
    return data


def _require_digest(name: str, digest: str, manifest: Mapping[str, Any]) -> None:
    if digest != manifest["files"][name].get("sha256"):
        raise AtlasError(f"{name} was changed or damaged after it was written: its digest is another")


def _read_notes(folder: Path, manifest: Mapping[str, Any]) -> dict[int, LatentNote]:
    """Names and notes of latents."""
    if manifest["files"][NOTES]["bytes"] > _MOST_NOTES:
        raise AtlasError(f"{NOTES} has more than {_MOST_NOTES:,} bytes")
    try:
        value = json.loads(_read_bytes(folder, NOTES, manifest))
        notes = {int(latent): check_note(note) for latent, note in value["notes"].items()}
    except AtlasError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AtlasError(f"{NOTES} is not a file of latent notes ({error})") from error
    if not all(0 <= latent < manifest["n_latents"] for latent in notes):
        raise AtlasError(f"{NOTES} names latents outside 0..{manifest['n_latents'] - 1}")
    return notes


def _read_arrays(folder: Path, manifest: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """The arrays, of the shapes, types and ranges that the manifest asks for."""
    n_latents, n_labels, n_patients = manifest["n_latents"], len(manifest["labels"]), len(manifest["patients"])
    wanted: dict[str, tuple[Any, tuple[int, ...], float, float]] = {
        "quantiles": (np.float32, (n_latents, len(LEVELS)), 0, np.inf),
        "mean_acts": (np.float32, (n_latents,), 0, np.inf),
        "sparsity": (np.float32, (n_latents,), 0, 1),
        "label_images": (np.int64, (n_labels,), 0, np.inf),
        "label_active": (np.int64, (n_latents, n_labels), 0, np.inf),
        "label_means": (np.float32, (n_latents, n_labels), 0, np.inf),
        "unexplained": (np.float64, (manifest["n_compared"],), 0, np.inf),
        "unusual": (np.float64, (manifest["n_compared"],), 0, 1),
        "patient_counts": (np.int64, (n_patients, n_latents), 0, 1 << 53),
        "patient_images": (np.int64, (n_patients,), 1, 1 << 53),
        "patient_groups": (np.int64, (n_patients,), -1, len(manifest["groups"]) - 1),
    }
    try:
        arrays: dict[str, npt.NDArray[Any]] = load_arrays(_read_bytes(folder, REFERENCE, manifest))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise AtlasError(f"{REFERENCE} cannot be read: {error}") from error
    if set(arrays) != set(wanted):
        raise AtlasError(f"{REFERENCE} contains other arrays than an atlas has")
    for name, (dtype, shape, low, high) in wanted.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape:
            raise AtlasError(
                f"{name} of {REFERENCE} must be {np.dtype(dtype)} of shape {shape}, found {array.dtype} {array.shape}"
            )
        if array.size and not (np.isfinite(array).all() and array.min() >= low and array.max() <= high):
            raise AtlasError(f"{name} of {REFERENCE} must be finite and lie in {low:g} to {high:g}")
    for name, axis in (("quantiles", 1), ("unexplained", 0)):
        if (np.diff(arrays[name], axis=axis) < 0).any():
            raise AtlasError(f"{name} of {REFERENCE} must rise")
    return arrays


def _assemble(
    manifest: Mapping[str, Any],
    spec: StoreSpec,
    sae: Any,  # noqa: ANN401 - an autoencoder
    arrays: Mapping[str, npt.NDArray[Any]],
    notes: dict[int, LatentNote],
) -> Atlas:
    """The atlas from checked parts."""
    reference = Reference(
        manifest["n_images"], manifest["n_scored"], arrays["quantiles"], arrays["mean_acts"], arrays["sparsity"],
        tuple(manifest["labels"]), arrays["label_images"], arrays["label_active"], arrays["label_means"],
        float(manifest["variance"]), arrays["unexplained"], arrays["unusual"], manifest["seen"],
    )  # fmt: skip
    unit: Literal["patient", "subject"] = manifest["unit"]
    barcodes = Barcodes(
        unit, tuple(manifest["patients"]), arrays["patient_counts"], arrays["patient_images"],
        tuple(manifest["groups"]), arrays["patient_groups"],
    )  # fmt: skip
    predicted = tuple(manifest["predicted_groups"])
    sizes = np.bincount(barcodes.groups[barcodes.groups >= 0], minlength=len(barcodes.group_names))
    few = [name for name in predicted if sizes[barcodes.group_names.index(name)] < 2]
    if few:
        raise AtlasError(f"group {quote(few[0])} is predicted, but has fewer than two {unit}s")
    quality = GroupQuality(predicted, float(manifest["balanced_accuracy"])) if predicted else None
    return Atlas(spec, sae, manifest["tokens"], float(manifest["threshold"]), reference, barcodes, quality, notes)
