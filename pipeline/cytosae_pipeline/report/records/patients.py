"""Records of patients: barcodes, which groups are compared, correlation, and classification of groups."""

from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.latents import correlate, group_means
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import MAX_CORRELATED
from cytosae_pipeline.report.records.classification import classification_record
from cytosae_pipeline.report.records.comparisons import (
    GroupPair,
    comparable_groups,
    no_groups,
    sizes_of,
)
from cytosae_pipeline.report.records.encoding import pack


def patients_record(
    cohort: Cohort, latents: npt.NDArray[np.int64], comparisons: list[GroupPair], *, seed: int, shuffles: int
) -> dict[str, Any]:
    """Record of everything else that the page shows about patients.

    Args:
        cohort: The patients.
        latents: Latents of the barcodes, shape `(M,)`.
        comparisons: The comparisons, in the order of their files.
        seed: Seed of the folds.
        shuffles: Shuffles that say what classification reaches by chance.
    """
    names = cohort.groups.names
    return {
        "names": cohort.names,
        "group_names": list(names),
        "groups": cohort.groups.of.tolist(),
        "n_images": cohort.n_images.tolist(),
        "threshold": cohort.threshold,
        "no_groups": no_groups(cohort),
        "subjects": _subjects(cohort),
        "n_each": cohort.units.n_each,
        "barcodes": _barcodes(cohort, latents),
        "correlation": _correlation(cohort),
        "comparisons": [_describe(cohort, pair) for pair in comparisons],
        "all_groups": groups.tolist() if len(groups := comparable_groups(cohort)) > 2 else None,
        "classification": classification_record(cohort, seed=seed, shuffles=shuffles),
    }


def _subjects(cohort: Cohort) -> dict[str, Any] | None:
    """The person behind each patient; None if every patient is one."""
    if cohort.subjects is None:
        return None
    return {"names": list(cohort.subjects.names), "of": cohort.subjects.of.tolist()}


def _describe(cohort: Cohort, pair: GroupPair) -> dict[str, Any]:
    """Names of the two sides, and how many subjects they have."""
    names = cohort.groups.names
    n_first, n_second = sizes_of(cohort, pair)
    return {
        "first": names[pair.first],
        "second": "all others" if pair.second is None else names[pair.second],
        "groups": [pair.first, pair.second],
        "n_first": n_first,
        "n_second": n_second,
    }


def _barcodes(cohort: Cohort, latents: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Counts of each patient, and each group's mean, as shares of the latent's largest count in 255 steps."""
    counts = cohort.counts[:, latents]
    peaks = counts.max(axis=0, initial=0)
    scale = np.where(peaks > 0, peaks, 1)
    means = None
    if len(cohort.groups.names) > 1:
        of = cohort.pooled.groups.of
        means = group_means(cohort.pooled.counts[of >= 0][:, latents], of[of >= 0], len(cohort.groups.names))
    return {
        "latents": latents.tolist(),
        "values": pack(np.rint(255 * counts / scale).astype(np.uint8)),
        "peaks": pack(peaks.astype(np.float32)),
        "means": None if means is None else pack(np.rint(255 * means / scale).astype(np.uint8)),
    }


def _correlation(cohort: Cohort) -> dict[str, Any] | None:
    """Correlations as bytes: 0 stands for -1, 254 for 1. None for too many patients."""
    if len(cohort.names) > MAX_CORRELATED:
        return None
    return pack(np.rint(127 * (correlate(cohort.counts) + 1)).astype(np.uint8))
