"""Records of patients: barcodes, comparisons of groups, correlation, and classification of groups."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.classification import classify_groups
from cytosae.analysis.differential import GroupComparison, Method, compare_groups, largest_differences
from cytosae.analysis.latents import correlate, group_means
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import MAX_CORRELATED
from cytosae_pipeline.report.records.encoding import pack

_PAIRS_UP_TO = 4
_LARGEST = 15
LEAST_P = 1e-300
"""Replaces a p of 0, which has no logarithm."""


@dataclass(frozen=True)
class GroupPair:
    """Two groups to compare."""

    first: int
    """Group by its index."""
    second: int | None
    """The other; None for all other groups together."""


def plan_comparisons(cohort: Cohort) -> list[GroupPair]:
    """Each group against the rest and, for up to four groups, each pair; groups of one subject are left out."""
    of = cohort.units.groups.of
    sizes = np.bincount(of[of >= 0], minlength=len(cohort.groups.names))
    groups = [group for group, size in enumerate(sizes.tolist()) if size >= 2]
    if len(groups) < 2:
        return []
    pairs = [GroupPair(*pair) for pair in itertools.combinations(groups, 2)] if len(groups) <= _PAIRS_UP_TO else []
    rest = [GroupPair(group, None) for group in groups] if len(groups) > 2 else []
    return rest + pairs


def no_groups(cohort: Cohort) -> str:
    """Why groups cannot be compared."""
    return cohort.groups.why_none or f"A comparison needs two groups of at least two {cohort.unit}s each."


def compare_pair(cohort: Cohort, pair: GroupPair, *, test: Method, seed: int) -> GroupComparison:
    """Compare every latent between two groups of subjects.

    Args:
        cohort: The patients.
        pair: The groups.
        test: The test.
        seed: Seed of the permutations.
    """
    units = cohort.units
    rows = _rows(units, pair)
    in_first = units.groups.of[rows] == pair.first
    return compare_groups(units.counts[rows], in_first, method=test, seed=seed)


def comparison_record(found: GroupComparison, test: Method) -> dict[str, Any]:
    """Record of a comparison: every latent that varies, with effect, p and q, and the largest differences per side.

    Args:
        found: The comparison.
        test: The test that was used.
    """
    tested = np.flatnonzero(found.tested)
    place = {latent: at for at, latent in enumerate(tested.tolist())}
    more = [[place[latent] for latent in side.tolist()] for side in largest_differences(found, _LARGEST)]
    columns = {
        "log2_fold_change": found.log2_fold_change,
        "effect": found.effect,
        "minus_log10_p": -np.log10(np.maximum(found.p_value, LEAST_P)),
        "minus_log10_q": -np.log10(np.maximum(found.q_value, LEAST_P)),
    }
    names: dict[Method, str] = {
        "mann-whitney": "Mann-Whitney",
        "permutation": "permutation test of the difference of means",
    }
    return {
        "method": names[test],
        "latents": pack(tested.astype(np.int32)),
        "direction": pack(found.direction[tested]),
        **{name: pack(np.asarray(values)[tested].astype(np.float32)) for name, values in columns.items()},
        "more_in_first": more[0],
        "more_in_second": more[1],
    }


def patients_record(
    cohort: Cohort, latents: npt.NDArray[np.int64], comparisons: list[GroupPair], *, seed: int
) -> dict[str, Any]:
    """Record of everything else that the page shows about patients.

    Args:
        cohort: The patients.
        latents: Latents of the barcodes, shape `(M,)`.
        comparisons: The comparisons, in the order of their files.
        seed: Seed of the folds.
    """
    names, groups = cohort.groups.names, cohort.groups.of
    return {
        "names": cohort.names,
        "group_names": list(names),
        "groups": groups.tolist(),
        "n_images": cohort.n_images.tolist(),
        "threshold": cohort.threshold,
        "no_groups": no_groups(cohort),
        "subjects": _subjects(cohort),
        "barcodes": _barcodes(cohort, latents),
        "correlation": _correlation(cohort),
        "comparisons": [_describe(cohort, pair) for pair in comparisons],
        "classification": classification_record(cohort, seed=seed),
    }


def classification_record(cohort: Cohort, *, seed: int) -> dict[str, Any] | None:
    """Cross-validated classification of the groups that have enough patients; None if fewer than two have."""
    units = cohort.units
    of = units.groups.of
    sizes = np.bincount(of[of >= 0], minlength=len(units.groups.names))
    kept = np.flatnonzero(sizes >= 2)
    if len(kept) < 2:
        return None
    rows = np.flatnonzero(np.isin(of, kept))
    names = [units.groups.names[group] for group in kept]
    found = classify_groups(units.counts[rows], np.searchsorted(kept, of[rows]), names, seed=seed)
    return {
        "names": names,
        "accuracy": float(found.accuracy),
        "balanced_accuracy": float(found.balanced_accuracy),
        "chance": float(found.chance),
        "n_folds": len(set(found.fold.tolist())),
        "confusion": found.confusion.tolist(),
        "latents": [
            {"latent": int(latent), "share": float(share), "weights": [float(value) for value in weights]}
            for latent, share, weights in zip(
                found.latents[:_LARGEST], found.latent_share, found.latent_weight, strict=False
            )
        ],
    }


def _subjects(cohort: Cohort) -> dict[str, Any] | None:
    """The person behind each patient; None if every patient is one."""
    if cohort.subjects is None:
        return None
    return {"names": list(cohort.subjects.names), "of": cohort.subjects.of.tolist()}


def _rows(units: Cohort, pair: GroupPair) -> npt.NDArray[np.int64]:
    """Those of both sides."""
    groups = units.groups.of
    if pair.second is None:
        return np.flatnonzero(groups >= 0)
    return np.flatnonzero((groups == pair.first) | (groups == pair.second))


def _describe(cohort: Cohort, pair: GroupPair) -> dict[str, Any]:
    """Names of the two sides, and how many subjects they have."""
    units = cohort.units
    groups, names = units.groups.of, units.groups.names
    n_first = int((groups == pair.first).sum())
    return {
        "first": names[pair.first],
        "second": "all others" if pair.second is None else names[pair.second],
        "groups": [pair.first, pair.second],
        "n_first": n_first,
        "n_second": len(_rows(units, pair)) - n_first,
    }


def _barcodes(cohort: Cohort, latents: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Counts of each patient, and each group's mean, as shares of the latent's largest count in 255 steps."""
    counts = cohort.counts[:, latents]
    peaks = counts.max(axis=0, initial=0)
    scale = np.where(peaks > 0, peaks, 1)
    means = None
    if len(cohort.groups.names) > 1:
        of = cohort.units.groups.of
        means = group_means(cohort.units.counts[of >= 0][:, latents], of[of >= 0], len(cohort.groups.names))
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
