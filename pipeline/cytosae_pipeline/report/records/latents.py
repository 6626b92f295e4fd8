"""Records of latents and images: what activates a latent and where, from stored activations alone."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cytosae.sae.base import Sae
from cytosae.statistics.heatmaps import ByteMaps, ImageSummary, LatentEncoder, make_byte_maps, summarize_image
from cytosae.statistics.histograms import BINS_PER_OCTAVE, LOWEST_EXPONENT, LatentProfiles, ProfileResult
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import RowReader
from cytosae_pipeline.report.data.report_data import ReportData, decoder_neighbours
from cytosae_pipeline.report.measures.compartments import measure_compartments
from cytosae_pipeline.report.measures.evidence import EvidenceMaker, LatentEvidence
from cytosae_pipeline.report.measures.extras import Extras, Measured, extras_record
from cytosae_pipeline.report.measures.value_correlations import correlate_values
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.streaming import iter_parts, split_evenly

LATENTS_PER_IMAGE = 10
LATENTS_PER_TOKEN = 4
_NEIGHBOURS = 8
_PATIENTS_SHOWN = 10
_IMAGES_AT_ONCE = 16
_ACTS_BYTES = 1 << 28
"""Most bytes of activations of chosen latents in memory at once."""


class ImageMeasures(NamedTuple):
    """What the page shows of an image's activations."""

    top: ByteMaps
    """Maps of the latents of which it is a top image."""
    record: dict[str, Any]
    """Its strongest latents, and those of its tokens."""


TopMap = tuple[npt.NDArray[np.uint8], float]
"""A map's bytes, shape `(n_patches,)`, and its peak."""


def measure_sample(
    data: ReportData, reader: RowReader, latent: int, n_images: int, extras: Extras
) -> tuple[ProfileResult, Measured]:
    """The profile of a latent, and what else is measured, over readable images spread evenly over the store."""
    encoder = LatentEncoder(data.inputs.sae, np.array([latent]))
    profiles = LatentProfiles(1, len(data.features.labels))
    valid = data.store.valid_rows
    rows = valid[spread_rows(len(valid), n_images)]
    sites, at_once = extras.sites, images_at_once(data, 1)
    site_counts = None if sites is None else np.zeros((len(sites.names), 1), dtype=np.int64)
    parts = [np.zeros(0, dtype=np.float32)]
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once]
        acts = encoder(torch.from_numpy(reader.read(part)))
        profiles.update(acts, torch.from_numpy(data.labels[part]))
        parts.append(acts.mean(dim=1)[:, 0].cpu().numpy())
        if sites is not None and site_counts is not None:
            of_site, above = sites.of_image[part], (acts > data.threshold).sum(dim=1).cpu().numpy()
            np.add.at(site_counts, of_site[of_site >= 0], above[of_site >= 0])
    scores, maker = np.concatenate(parts), EvidenceMaker(data, rows)
    found = None
    if extras.values is not None:
        found = correlate_values(extras.values, rows, maker.halves, 1, lambda place: scores)
    one, masks = np.array([latent]), extras.masks
    compartments = None if masks is None else measure_compartments(data, one, masks)
    return profiles.result(), Measured(rows, [maker.make(scores)], site_counts, found, compartments)


def latent_records(
    data: ReportData,
    latents: npt.NDArray[np.int64],
    profiles: ProfileResult,
    maps: dict[tuple[int, int], TopMap],
    extras: Extras,
    measured: Measured,
) -> Iterator[dict[str, Any]]:
    """Records of latents.

    Args:
        data: Store, autoencoder and statistics.
        latents: The latents, shape `(M,)`.
        profiles: Their profiles.
        maps: Maps of their images, by latent and row.
        extras: What else is known of all latents.
        measured: What else was measured of these.
    """
    neighbours = decoder_neighbours(data, latents, _NEIGHBOURS)
    # Every token of every image is either in the histogram or zero.
    n_images = int(profiles.histogram[:1].sum() + profiles.n_zero[:1].sum()) // data.store.n_tokens
    for at, latent in enumerate(latents.tolist()):
        yield {
            "latent": latent,
            "n_images": n_images,
            "top": _images(data, latent, data.top_rows[latent], data.features.top_values[latent], maps),
            "labels": [
                {"label": label, "n_images": n, "n_active": active, "mean": mean}
                for label, (n, active, mean) in enumerate(
                    zip(
                        profiles.n_images.tolist(),
                        profiles.n_active[at].tolist(),
                        profiles.mean_scores[at].tolist(),
                        strict=True,
                    )
                )
            ],
            "histogram": {
                "lowest": LOWEST_EXPONENT,
                "per_octave": BINS_PER_OCTAVE,
                "counts": profiles.histogram[at].tolist(),
                "n_zero": int(profiles.n_zero[at]),
            },
            "patients": _top_patients(data, latent),
            "threshold": data.cohort.threshold if data.cohort else None,
            "neighbours": [[other, round(cosine, 4)] for other, cosine in neighbours[at]],
            "quantiles": [
                {
                    "quantile": found.quantile,
                    "value": found.value,
                    "images": _images(data, latent, found.places, found.scores, maps),
                }
                for found in measured.evidence[at].quantiles
            ],
            **extras_record(extras, measured, latent, at, data.threshold),
        }


def measure_images(
    data: ReportData, rows: npt.NDArray[np.int64], wanted: Mapping[int, Sequence[int]]
) -> Iterator[tuple[int, ImageMeasures]]:
    """Encode images, here or on the cluster that the options name.

    Args:
        data: Store, autoencoder and statistics.
        rows: The images, shape `(n,)`.
        wanted: By row, the latents whose maps are wanted.

    Yields:
        Each row with what was measured.
    """
    parts = split_evenly(len(rows), _IMAGES_AT_ONCE)
    function = functools.partial(_measure_parts, rows, wanted, data.n_prefix, not data.config.no_verify)
    for part, found in zip(parts, iter_parts(data.inputs, data.config, function, parts), strict=True):
        yield from zip(rows[part.start : part.stop].tolist(), found, strict=True)


def _measure_parts(
    rows: npt.NDArray[np.int64],
    wanted: Mapping[int, Sequence[int]],
    n_prefix: int,
    verify: bool,
    inputs: Inputs,
    parts: Sequence[range],
) -> Iterator[list[ImageMeasures]]:
    """What the page shows of the images of each part."""
    with inputs.store.open_reader(verify=verify) as reader:
        for part in parts:
            measured = []
            for row in rows[part.start : part.stop].tolist():
                acts = encode_image(inputs.sae, torch.from_numpy(reader.read(np.array([row]))[0]))
                chosen = torch.tensor(wanted[row], device=acts.device)
                top = make_byte_maps(acts[n_prefix:, chosen])
                measured.append(ImageMeasures(top, acts_record(acts, n_prefix)))
            yield measured


def encode_image(sae: Sae, x: torch.Tensor) -> torch.Tensor:
    """Activations of all latents on one image, float32, shape `(T, S)`, from stored ones of shape `(T, D)`."""
    with torch.no_grad():
        return sae.encode(x.to(device=sae.W_enc.device, dtype=torch.float32))


def acts_record(acts: torch.Tensor, n_prefix: int) -> dict[str, Any]:
    """What the page shows of an image's activations.

    Args:
        acts: The activations, shape `(T, S)`.
        n_prefix: Tokens before the patches.
    """
    reading = summarize_image(acts, n_latents=LATENTS_PER_IMAGE, n_per_token=LATENTS_PER_TOKEN)
    chosen = torch.from_numpy(reading.latents).to(acts.device)
    maps = make_byte_maps(acts[n_prefix:, chosen])
    return {
        "latents": [
            {"latent": latent, "score": score, "peak": float(maps.peaks[at]), "map": pack(maps.levels[at])}
            for at, (latent, score) in enumerate(zip(reading.latents.tolist(), reading.scores.tolist(), strict=True))
        ],
        **_pack_tokens(reading, acts.shape[1]),
    }


def image_record(data: ReportData, measured: dict[str, Any], row: int | None) -> dict[str, Any]:
    """Record of an image.

    Args:
        data: Store, autoencoder and statistics.
        measured: As from `acts_record`.
        row: Its row; None for an uploaded image.
    """
    images = data.store.images
    return {
        "row": None if row is None else int(data.numbers[row]),
        "label": -1 if row is None else int(data.labels[row]),
        "patient": -1 if row is None else int(data.patients[row]),
        "path": None if row is None or data.pseudonymous else images.path[row],
        **measured,
    }


def rows_of_latent(data: ReportData, latent: int, evidence: LatentEvidence) -> npt.NDArray[np.int64]:
    """Rows of all images on the page of a latent, each once: its top images, and those at quantiles."""
    top = data.top_rows[latent]
    return np.union1d(top[top >= 0], evidence.rows)


def maps_of_latent(
    data: ReportData, reader: RowReader, latent: int, rows: npt.NDArray[np.int64]
) -> dict[tuple[int, int], TopMap]:
    """The maps of one latent on some images."""
    encoder = LatentEncoder(data.inputs.sae, np.array([latent]))
    found: dict[tuple[int, int], TopMap] = {}
    for row in rows.tolist():
        acts = encoder(torch.from_numpy(reader.read(np.array([row]))[0]))
        maps = make_byte_maps(acts[data.n_prefix :])
        found[latent, row] = maps.levels[0], float(maps.peaks[0])
    return found


def images_at_once(data: ReportData, n_latents: int) -> int:
    """Images whose activations of the latents fit into the memory budget."""
    width = data.n_latents if data.inputs.sae.needs_whole_rows else n_latents
    return max(1, min(_IMAGES_AT_ONCE, _ACTS_BYTES // (4 * data.store.n_tokens * max(width, 1))))


def _images(
    data: ReportData,
    latent: int,
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.floating],
    maps: dict[tuple[int, int], TopMap],
) -> list[dict[str, Any]]:
    """Images with their scores and maps of a latent; slots without an image, whose row is -1, are left out."""
    return [
        {
            "row": int(data.numbers[row]),
            "value": value,
            "peak": maps[latent, row][1],
            "label": int(data.labels[row]),
            "patient": int(data.patients[row]),
            "map": pack(maps[latent, row][0]),
        }
        for row, value in zip(rows.tolist(), values.tolist(), strict=True)
        if row >= 0
    ]


def _top_patients(data: ReportData, latent: int) -> list[dict[str, Any]]:
    """The patients with the highest counts per image."""
    cohort = data.cohort
    if cohort is None:
        return []
    column = cohort.counts[:, latent]
    order = np.argsort(-column, kind="stable")[:_PATIENTS_SHOWN]
    return [
        {
            "patient": int(at),
            "per_image": float(column[at]),
            "count": int(cohort.raw[at, latent]),
            "n_images": int(cohort.n_images[at]),
        }
        for at in order
        if column[at] > 0
    ]


def _pack_tokens(reading: ImageSummary, n_latents: int) -> dict[str, Any]:
    """The strongest latents of each token, packed: values in steps of the largest divided by 65,535."""
    wide = n_latents >= 65_535
    latents = reading.token_latents.astype(np.int32 if wide else np.uint16)
    step = max(float(reading.token_values.max(initial=0)) / 65_535, float(np.finfo(np.float32).tiny))
    return {
        "token_latents": pack(latents),
        "no_latent": -1 if wide else 65_535,
        "token_values": pack(np.rint(reading.token_values / step).astype(np.uint16)),
        "value_step": step,
    }
