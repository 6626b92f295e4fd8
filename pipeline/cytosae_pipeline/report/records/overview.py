"""The overview's record: store, autoencoder, training, and the columns of all latents."""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.specificity import POSITION_LIMIT
from cytosae_pipeline import __version__
from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.report.data.limits import MAX_UPLOAD, SIGNIFICANT_Q
from cytosae_pipeline.report.data.report_data import LatentData, ReportData, label_counts, main_labels, read_training
from cytosae_pipeline.report.measures.extras import Extras
from cytosae_pipeline.report.measures.other_seeds import OtherSeed
from cytosae_pipeline.report.measures.sources import Sources
from cytosae_pipeline.report.records.encoding import finite, pack
from cytosae_pipeline.report.records.images import ImageBook, book_record
from cytosae_pipeline.runtime.palette import palette_record
from cytosae_pipeline.statistics.features import Features
from cytosae_pipeline.statistics.notes import MAX_NAME, MAX_NOTE

_CURVE_POINTS = 400
_CARD_IMAGES = 4
_CURVES = (
    ("explained variance", "metrics/explained_variance", 0.0, 1.0),
    ("loss", "losses/overall_loss", None, None),
    ("L0", "metrics/l0", 0.0, None),
    ("dead share", "sparsity/dead_features", 0.0, 1.0),
)
"""Name on the page, name in metrics.jsonl, and the ends of the axis where they are known."""

_LIMITS = {
    "significant_q": SIGNIFICANT_Q,
    "position": POSITION_LIMIT,
    "name_length": MAX_NAME,
    "note_length": MAX_NOTE,
    "upload_bytes": MAX_UPLOAD,
}
"""Limits that the page applies, too."""

_SAE_FACTS = ("expansion_factor", "l1_coefficient", "lr", "batch_size", "total_training_tokens", "seed")


def overview_record(
    data: ReportData,
    latents: npt.NDArray[np.int64],
    reason: str,
    rows: npt.NDArray[np.int64],
    *,
    thumbnails: bool,
    masking: dict[str, Any] | None,
    messages: list[str],
    book: ImageBook,
    has_map: bool,
    extras: Extras,
    explore: bool = False,
    can_upload: bool = False,
    effects: bool = False,
) -> dict[str, Any]:
    """What every view of the page needs.

    Args:
        data: Store, autoencoder and statistics.
        latents: Latents with a page.
        reason: Which these are, in a sentence.
        rows: Images with a page.
        thumbnails: Whether there are pictures.
        masking: The masking experiment, if it was done.
        messages: What readers should know first.
        book: All images.
        has_map: Whether there is a map of cells.
        extras: What is known of latents beside the statistics.
        explore: Whether the explore server serves the page, so that every latent and image can be opened.
        can_upload: Whether it can read new images.
        effects: Whether it can compute what a latent changes in an image.
    """
    return {
        **common_record(
            data,
            latents,
            reason,
            title=data.store.provenance.dataset,
            messages=[*messages, *_missing_maps(data)],
            sources=extras.sources,
            seeds=extras.seeds,
        ),
        "explore": explore,
        "can_upload": can_upload,
        "effects": effects,
        "pseudonymous": data.pseudonymous,
        "store": _store_record(data),
        "sae": {"latents": data.n_latents, "facts": _sae_facts(data)},
        "training": training_record(data.config),
        "cards": [data.numbers[top[top >= 0]].tolist() for top in data.top_rows[latents, :_CARD_IMAGES]],
        "labels": _label_records(data),
        "images": {
            "rows": data.numbers[rows].tolist(),
            "labels": data.labels[rows].tolist(),
            "patients": data.patients[rows].tolist(),
        },
        "image_pages": True,
        "book": book_record(book),
        "has_map": has_map,
        "has_patients": data.cohort is not None,
        "patients": data.cohort.names if data.cohort else [],
        "thumbnails": thumbnails,
        "masking": masking,
    }


def common_record(
    data: LatentData,
    latents: npt.NDArray[np.int64],
    reason: str,
    *,
    title: str,
    messages: list[str],
    sources: Sources | None = None,
    seeds: Sequence[OtherSeed] = (),
) -> dict[str, Any]:
    """What every page has, whatever it is made from.

    Args:
        data: Feature data.
        latents: Latents with a page.
        reason: Which these are, in a sentence.
        title: Title of the page.
        messages: What readers should know first.
        sources: Active tokens by person; None if they are not known.
        seeds: Nearest latents of other autoencoders.
    """
    n_active = data.features.n_active
    return {
        "format": 1,
        "title": title,
        "made": datetime.now(UTC).date().isoformat(),
        "version": __version__,
        "messages": [*messages, *([] if data.passed is None else [data.passed.describe()])],
        "palette": palette_record(),
        "limits": _LIMITS,
        "counts": {"active": n_active, "dead": data.n_latents - n_active},
        "latents": {**_latent_columns(data), **_source_columns(sources, data.n_latents)},
        "sources": None if sources is None else {"unit": sources.unit, "names": sources.names},
        "partners": [
            {
                "name": seed.name,
                "latent": pack(seed.partners.latent.astype(np.int32)),
                "cosine": pack(seed.partners.cosine),
            }
            for seed in seeds
        ],
        "featured": latents.tolist(),
        "featured_reason": reason,
        "main_label": main_labels(data, latents),
        "notes": {str(latent): dict(note) for latent, note in data.notes.items()},
    }


def _missing_maps(data: ReportData) -> list[str]:
    """Why there are no heat maps; nothing if there are."""
    if math.prod(data.store.spec.tokens.grid):
        return []
    return ["Each image of this store is a single token, without patches: there are no heat maps."]


def _latent_columns(data: LatentData) -> dict[str, Any]:
    """What the scatter plot shows of every latent."""
    return {
        "sparsity": pack(data.features.sparsity),
        "mean_acts": pack(data.features.mean_acts),
        "entropy": pack(data.entropy.astype(np.float32)),
        "cluster": pack(data.clusters.astype(np.int8)),
        **_specificity_columns(data.features),
    }


def _specificity_columns(features: Features) -> dict[str, Any]:
    """Position share of every latent, its largest lift, and the label of that; -1 and 0 where they are not known."""
    found, n = features.specificity, len(features.sparsity)
    if found is None or not features.labels:
        shares = np.full(n, -1, np.float32) if found is None else found.position_share
        return {"position": pack(shares), "lift": pack(np.zeros(n, np.float32)), "best": pack(np.full(n, -1, np.int32))}
    lift = found.lift
    best = np.where(lift.max(axis=1) > 0, lift.argmax(axis=1), -1)
    return {
        "position": pack(found.position_share),
        "lift": pack(lift.max(axis=1).astype(np.float32)),
        "best": pack(best.astype(np.int32)),
    }


def _source_columns(sources: Sources | None, n_latents: int) -> dict[str, Any]:
    """The person with the largest share of every latent, the share, and whether the latent is of one person."""
    if sources is None:
        return {
            "source": pack(np.full(n_latents, -1, np.int32)),
            "source_share": pack(np.zeros(n_latents, np.float32)),
            "one_source": pack(np.zeros(n_latents, np.uint8)),
        }
    found = sources.largest
    return {
        "source": pack(found.source.astype(np.int32)),
        "source_share": pack(found.share.astype(np.float32)),
        "one_source": pack(found.is_one.astype(np.uint8)),
    }


def _label_records(data: ReportData) -> list[dict[str, Any]]:
    """Name and readable images of each label."""
    counts = label_counts(data).tolist()
    return [{"name": name, "images": count} for name, count in zip(data.features.labels, counts, strict=True)]


def training_record(config: PageConfig) -> dict[str, Any] | None:
    """Training curves of the autoencoder, thinned evenly; None if nothing was recorded."""
    assert config.sae_path is not None
    lines = read_training(config.sae_path)
    lines = [line for line in lines if isinstance(line.get("details/n_training_tokens", line.get("step")), int | float)]
    if not lines:
        return None
    keep = np.unique(np.linspace(0, len(lines) - 1, min(len(lines), _CURVE_POINTS)).astype(int))
    lines = [lines[at] for at in keep]
    x = [line.get("details/n_training_tokens", line.get("step")) for line in lines]
    curves = []
    for name, key, low, high in _CURVES:
        values = [_number(line.get(key)) for line in lines]
        if any(value is not None for value in values):
            curves.append({"name": name, "values": values, "low": low, "high": high})
    return {"x": x, "curves": curves}


def _number(value: object) -> float | None:
    """A finite number, or None."""
    return finite(value) if isinstance(value, int | float) else None


def _store_record(data: ReportData) -> dict[str, Any]:
    """What the page needs from the store."""
    store = data.store
    return {
        "dataset": store.provenance.dataset,
        "images": store.n_images,
        "valid": int(store.valid.sum()),
        "tokens": store.n_tokens,
        "grid": list(store.spec.tokens.grid),
        "prefix": data.n_prefix,
        "facts": _store_facts(data),
    }


def _store_facts(data: ReportData) -> list[list[str]]:
    """Provenance of the store, without any path of this machine."""
    store, spec = data.store, data.store.spec
    if spec.imported:
        return [
            ["data set", store.provenance.dataset],
            ["embeddings", f"{spec.model_name}, imported"],
            ["tokens", f"{store.n_tokens} x {store.d_model}"],
            ["stored as", spec.store_dtype],
            ["spec", spec.hash],
            ["origin (SHA-256)", spec.weights_sha256[:16] + "…"],
        ]
    return [
        ["data set", store.provenance.dataset],
        ["backbone", spec.model_name],
        ["block", f"{spec.block} of {spec.n_blocks} (counted from 0)"],
        ["tokens", f"{store.n_tokens} x {store.d_model}"],
        ["patches", f"{spec.tokens.grid[0]} x {spec.tokens.grid[1]}"],
        ["computed in", spec.precision],
        ["stored as", spec.store_dtype],
        ["spec", spec.hash],
        ["weights (SHA-256)", spec.weights_sha256[:16] + "…"],
    ]


def _sae_facts(data: ReportData) -> list[list[str]]:
    """Configuration of the autoencoder."""
    sae, cfg = data.inputs.sae, data.inputs.sae_cfg
    d_in, n_latents = sae.W_enc.shape
    facts = [["architecture", sae.architecture], ["size", f"{d_in} → {n_latents:,}"]]
    if isinstance(cfg.get("run_name"), str):
        facts.append(["run", cfg["run_name"]])
    facts += [[name, str(value)] for name, value in sae.settings.items()]
    names = [name for name in _SAE_FACTS if name != "l1_coefficient" or name in sae.training_options]
    facts += [[name, str(cfg[name])] for name in names if isinstance(cfg.get(name), int | float)]
    return [
        *facts,
        ["tensors (SHA-256)", data.inputs.sae_sha256[:16] + "…"],
        ["page made with", f"cytosae-cache {__version__}"],
    ]
