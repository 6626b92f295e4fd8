"""Records of groups compared: which pairs, every pair's latents, all groups at once, and what the design can find."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.design import n_needed
from cytosae.analysis.differential import GroupComparison, Method, adjust_together, largest_differences
from cytosae.analysis.equal_cells import UNEQUAL_RATIO, median_images
from cytosae.analysis.omnibus import OmnibusComparison
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.records.audit import Audit
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.report.records.group_tests import (
    IncomparableError,
    Sides,
    compare_several,
    compare_two,
    describe_effect,
    describe_left_out,
    describe_several,
    describe_test,
    known_of,
    least_p_of_sides,
)

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


@dataclass(frozen=True)
class Comparisons:
    """All comparisons of a report."""

    pairs: list[GroupPair]
    """Which groups, in the order of the page."""
    found: list[GroupComparison]
    """What was found, one entry per pair."""
    q_over_all: list[npt.NDArray[np.float64]]
    """Adjusted p over the tested latents of all pairs together, each of shape `(S,)`; 1 where not tested."""
    all_groups: OmnibusComparison | None
    """All groups at once; None for fewer than three."""
    why_not: list[str] = field(default_factory=list)
    """Why a pair could not be compared, one entry per pair; empty where it was."""
    why_not_all: str = ""
    """The same of all groups at once."""


def plan_comparisons(cohort: Cohort) -> list[GroupPair]:
    """Each group against the rest and, for up to four groups, each pair; groups of one subject are left out."""
    groups = comparable_groups(cohort).tolist()
    if len(groups) < 2:
        return []
    pairs = [GroupPair(*pair) for pair in combinations(groups, 2)] if len(groups) <= _PAIRS_UP_TO else []
    rest = [GroupPair(group, None) for group in groups] if len(groups) > 2 else []
    return rest + pairs


def comparable_groups(cohort: Cohort) -> npt.NDArray[np.int64]:
    """Groups of at least two subjects, shape `(n,)`."""
    of = cohort.units.groups.of
    return np.flatnonzero(np.bincount(of[of >= 0], minlength=len(cohort.groups.names)) >= 2)


def no_groups(cohort: Cohort) -> str:
    """Why groups cannot be compared."""
    return cohort.groups.why_none or f"A comparison needs two groups of at least two {cohort.unit}s each."


def compare_all(
    cohort: Cohort, *, test: Method, seed: int, advance: Callable[[], object] = lambda: None
) -> Comparisons:
    """Make every comparison of a report: all groups at once, then each pair.

    Args:
        cohort: The patients.
        test: The test of two groups.
        seed: Seed of the permutations.
        advance: Called after each pair.
    """
    pairs, found, why_not = plan_comparisons(cohort), [], []
    groups, why_not_all, all_groups = comparable_groups(cohort), "", None
    if len(groups) > 2:
        try:
            all_groups = compare_several(cohort, all_sides(cohort), seed=seed)
        except IncomparableError as error:
            all_groups, why_not_all = _nothing_at_once(cohort), str(error)
    for pair in pairs:
        try:
            found.append(compare_pair(cohort, pair, test=test, seed=seed))
            why_not.append("")
        except IncomparableError as error:
            found.append(_nothing(cohort))
            why_not.append(str(error))
        advance()
    return Comparisons(pairs, found, adjust_together(found), all_groups, why_not, why_not_all)


def compare_pair(cohort: Cohort, pair: GroupPair, *, test: Method, seed: int) -> GroupComparison:
    """Compare every latent between two groups of subjects.

    Args:
        cohort: The patients.
        pair: The groups.
        test: The test.
        seed: Seed of the permutations.

    Raises:
        IncomparableError: If strata or covariates leave nothing to compare.
    """
    return compare_two(cohort, sides_of_pair(cohort, pair), test=test, seed=seed)


def sides_of_pair(cohort: Cohort, pair: GroupPair) -> Sides:
    """The subjects of both sides; the first has number 0."""
    names = cohort.groups.names
    rows = rows_of(cohort.units, pair)
    second = "all others" if pair.second is None else names[pair.second]
    numbers = (cohort.units.groups.of[rows] != pair.first).astype(np.int64)
    return Sides(rows, numbers, (names[pair.first], second))


def all_sides(cohort: Cohort) -> Sides:
    """The subjects of all groups that can be compared."""
    groups, of = comparable_groups(cohort), cohort.units.groups.of
    rows = np.flatnonzero(np.isin(of, groups))
    return Sides(rows, np.searchsorted(groups, of[rows]), tuple(cohort.groups.names[at] for at in groups.tolist()))


def _nothing(cohort: Cohort) -> GroupComparison:
    """A comparison of which no latent was tested."""
    zeros, ones = np.zeros(cohort.counts.shape[1]), np.ones(cohort.counts.shape[1])
    return GroupComparison(zeros, zeros, zeros, zeros.astype(np.int8), zeros, ones, ones, zeros.astype(np.bool_))


def _nothing_at_once(cohort: Cohort) -> OmnibusComparison:
    """The same of all groups at once."""
    zeros, ones = np.zeros(cohort.counts.shape[1]), np.ones(cohort.counts.shape[1])
    return OmnibusComparison(zeros, zeros, ones, ones, zeros.astype(np.bool_), 0)


def comparison_record(made: Comparisons, number: int, cohort: Cohort, test: Method, audit: Audit) -> dict[str, Any]:
    """Record of a comparison: every tested latent, with effect, p and both q, and the largest differences per side.

    Args:
        made: All comparisons.
        number: Which of them.
        cohort: The patients.
        test: The test that was used.
        audit: What else is known about the subjects.
    """
    found, pair = made.found[number], made.pairs[number]
    sides = sides_of_pair(cohort, pair)
    why_not = made.why_not[number]
    used = sides if why_not else known_of(cohort, sides)
    tested = np.flatnonzero(found.tested)
    place = {latent: at for at, latent in enumerate(tested.tolist())}
    largest = [side.tolist() for side in largest_differences(found, _LARGEST)]
    more = [[place[latent] for latent in side] for side in largest]
    columns = {
        "log2_fold_change": found.log2_fold_change,
        "effect": found.effect,
        "minus_log10_p": -np.log10(np.maximum(found.p_value, LEAST_P)),
        "minus_log10_q": -np.log10(np.maximum(found.q_value, LEAST_P)),
        "minus_log10_q_over_all": -np.log10(np.maximum(made.q_over_all[number], LEAST_P)),
    }
    return {
        "method": describe_test(cohort, test),
        "about_effect": describe_effect(cohort),
        "why_not": why_not,
        "left_out": "" if why_not else describe_left_out(cohort, len(used.rows), len(sides.rows)),
        "n_varying": found.n_varying,
        "cells": describe_cells(cohort, pair),
        "design": "" if why_not else describe_design(cohort, used, len(tested), test),
        "latents": pack(tested.astype(np.int32)),
        "direction": pack(found.direction[tested]),
        **{name: pack(np.asarray(values)[tested].astype(np.float32)) for name, values in columns.items()},
        "more_in_first": more[0],
        "more_in_second": more[1],
        "told_by": [[audit.told_by(latent) for latent in side] for side in largest],
    }


def all_groups_record(made: Comparisons, cohort: Cohort) -> dict[str, Any]:
    """Record of all groups at once: how many latents differ, and those that differ most.

    Args:
        made: All comparisons, of three groups or more.
        cohort: The patients.
    """
    found, sides = made.all_groups, all_sides(cohort)
    assert found is not None
    method, statistic, about_effect = describe_several(cohort)
    n_used = len(sides.rows) if made.why_not_all else len(known_of(cohort, sides).rows)
    tested = np.flatnonzero(found.tested)
    order = tested[np.lexsort((-found.statistic[tested], found.q_value[tested]))]
    return {
        "groups": comparable_groups(cohort).tolist(),
        "method": method,
        "statistic": statistic,
        "about_effect": about_effect,
        "why_not": made.why_not_all,
        "left_out": describe_left_out(cohort, n_used, len(sides.rows)),
        "n_varying": found.n_varying,
        "n_tested": len(tested),
        "n_significant": int((found.q_value < SIGNIFICANT_Q).sum()),
        "latents": [
            {
                "latent": latent,
                "statistic": float(found.statistic[latent]),
                "effect": float(found.effect[latent]),
                "p": float(found.p_value[latent]),
                "q": float(found.q_value[latent]),
            }
            for latent in order[:_LARGEST].tolist()
        ],
    }


def describe_design(cohort: Cohort, sides: Sides, n_tested: int, test: Method) -> str:
    """What a comparison can find at all, in a sentence; empty if a single latent can be significant.

    Args:
        cohort: The patients.
        sides: Those that are compared.
        n_tested: Latents tested.
        test: The test.
    """
    n_first = int((sides.groups == 0).sum())
    least = least_p_of_sides(cohort, sides, test)
    text = (
        f"With {n_first} against {len(sides.groups) - n_first} {cohort.unit}s"
        f"{'' if cohort.strata is None else f' within {cohort.strata}'} the smallest possible p is {least:.2g}"
    )
    needed = n_needed(least, n_tested, SIGNIFICANT_Q)
    if least >= SIGNIFICANT_Q:
        return f"{text}: no latent can reach q < {SIGNIFICANT_Q}."
    if needed > 1:
        return f"{text}: at least {needed:,} of {n_tested:,} latents must reach it before any has q < {SIGNIFICANT_Q}."
    return ""


def describe_cells(cohort: Cohort, pair: GroupPair) -> str:
    """A warning if the two sides differ in their numbers of images; empty if they do not, or equal numbers are used."""
    units = cohort.units
    rows = rows_of(units, pair)
    first, second = median_images(units.n_images[rows], units.groups.of[rows] == pair.first)
    if max(first, second) < UNEQUAL_RATIO * min(first, second):
        return ""
    return (
        f"A {cohort.unit} of the first side has {first:,.0f} images (median), one of the second {second:,.0f}: counts "
        "of rare latents then differ in spread where nothing else does, and more of what is found is noise than q "
        "says. Compare equal numbers of images with --cells equal."
    )


def sizes_of(cohort: Cohort, pair: GroupPair) -> tuple[int, int]:
    """Subjects of the two sides."""
    units = cohort.units
    n_first = int((units.groups.of == pair.first).sum())
    return n_first, len(rows_of(units, pair)) - n_first


def rows_of(units: Cohort, pair: GroupPair) -> npt.NDArray[np.int64]:
    """Those of both sides."""
    groups = units.groups.of
    if pair.second is None:
        return np.flatnonzero(groups >= 0)
    return np.flatnonzero((groups == pair.first) | (groups == pair.second))
