"""Writes the files of an atlas."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cytosae.formats.tensor_file import write_safetensors
from cytosae_cache.format.spec import canonical_json
from cytosae_pipeline import __version__
from cytosae_pipeline.atlas.contents import FORMAT, LEVELS, MANIFEST, REFERENCE, SAE, VERSION, Atlas
from cytosae_pipeline.statistics.notes import FILE_NAME as NOTES
from cytosae_pipeline.statistics.notes import write_notes

_KEPT_OF_CFG = ("spec", "spec_hash", "block_layer", "tokens", "class_token", "d_in", "n_latents")
"""What of the autoencoder's config goes into an atlas: nothing that names a file, a data set or a machine."""


def write_atlas(folder: Path, atlas: Atlas) -> None:
    """Write the files of an atlas into a new folder, the manifest last. Plain writes: not atomic.

    Args:
        folder: The folder, which is made.
        atlas: What to write.
    """
    folder.mkdir()
    cfg = {} if atlas.sae.source is None else atlas.sae.source.cfg
    write_safetensors(folder / SAE, atlas.sae, {name: cfg[name] for name in _KEPT_OF_CFG if name in cfg})
    # No timestamps, and nothing but arrays.
    (folder / REFERENCE).write_bytes(save(arrays_of(atlas)))
    write_notes(folder / NOTES, atlas.notes)
    files = {name: describe_file(folder / name) for name in (SAE, REFERENCE, NOTES)}
    (folder / MANIFEST).write_bytes(json.dumps(sign(manifest_of(atlas, files)), indent=1, ensure_ascii=False).encode())


def arrays_of(atlas: Atlas) -> dict[str, Any]:
    """The arrays of an atlas by name, beside the autoencoder's."""
    reference, barcodes = atlas.reference, atlas.barcodes
    found = {
        "quantiles": reference.quantiles,
        "mean_acts": reference.mean_acts,
        "sparsity": reference.sparsity,
        "label_images": reference.label_images,
        "label_active": reference.label_active,
        "label_means": reference.label_means,
        "unexplained": reference.unexplained,
        "unusual": reference.unusual,
        "patient_counts": barcodes.counts,
        "patient_images": barcodes.n_images,
        "patient_groups": barcodes.groups,
    }
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def manifest_of(atlas: Atlas, files: Mapping[str, Mapping[str, object]]) -> dict[str, Any]:
    """The manifest, without its own digest.

    Args:
        atlas: The atlas.
        files: Size and digest of each file.
    """
    reference, barcodes, quality = atlas.reference, atlas.barcodes, atlas.quality
    return {
        "format": FORMAT,
        "version": VERSION,
        "package_version": __version__,
        "spec": atlas.spec.to_json(),
        "spec_hash": atlas.spec.hash,
        "d_model": atlas.spec.d_model,
        "n_latents": atlas.n_latents,
        "tokens": atlas.tokens,
        "threshold": atlas.threshold,
        "n_images": reference.n_images,
        "levels": list(LEVELS),
        "n_scored": reference.n_scored,
        "n_compared": len(reference.unexplained),
        "seen": reference.seen,
        "variance": reference.variance,
        "labels": list(reference.labels),
        "unit": barcodes.unit,
        "patients": list(barcodes.names),
        "groups": list(barcodes.group_names),
        "predicted_groups": [] if quality is None else list(quality.names),
        "balanced_accuracy": None if quality is None else quality.balanced_accuracy,
        "files": {name: dict(facts) for name, facts in files.items()},
    }


def sign(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of everything else in it, so that damage is noticed."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(canonical_json(rest)).hexdigest()}


def describe_file(path: Path) -> dict[str, object]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
