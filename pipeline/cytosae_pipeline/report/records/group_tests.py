"""How groups of subjects are compared: with all of the other group, within strata, or in a linear model."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.adjusted import (
    ConfoundedError,
    TooFewSubjectsError,
    compare_all_groups_adjusted,
    compare_groups_adjusted,
)
from cytosae.analysis.design import least_p_of_design
from cytosae.analysis.differential import GroupComparison, Method, compare_groups, least_p_of
from cytosae.analysis.omnibus import OmnibusComparison, compare_all_groups
from cytosae.analysis.omnibus_within import compare_all_groups_within
from cytosae.analysis.strata import NoOverlapError, Strata
from cytosae.analysis.within_strata import compare_groups_within
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q

_METHODS: dict[Method, str] = {
    "mann-whitney": "Mann-Whitney",
    "permutation": "permutation test of the difference of means",
}
_N_PERMUTATIONS = 10_000


class IncomparableError(UserError):
    """Strata or covariates leave nothing to compare."""


class Sides(NamedTuple):
    """Subjects of some groups."""

    rows: npt.NDArray[np.int64]
    """Which of the units, shape `(n,)`."""
    groups: npt.NDArray[np.int64]
    """Group of each, 0 to G - 1, shape `(n,)`."""
    names: tuple[str, ...]
    """Names of the G groups, for messages."""

    def take(self, kept: npt.NDArray[np.int64]) -> "Sides":
        """Some of them."""
        return self._replace(rows=self.rows[kept], groups=self.groups[kept])


def known_of(cohort: Cohort, sides: Sides) -> Sides:
    """Those that are compared: with known covariates, in strata where there is somebody to compare them with.

    Args:
        cohort: The patients.
        sides: Subjects of some groups.

    Raises:
        IncomparableError: If nobody is left.
    """
    if cohort.strata is not None:
        levels = cohort.units.columns[cohort.strata].levels[sides.rows]
        try:
            return sides.take(np.sort(Strata.of(sides.groups, levels).used))
        except NoOverlapError as error:
            raise IncomparableError(
                f"{_say(sides.names)} cannot be compared within {quote(cohort.strata)}: no level of it has "
                f"{cohort.unit}s of two groups, so that nothing tells a difference of the groups from one of the "
                "levels. Leave out --strata to compare them regardless"
            ) from error
    if cohort.adjust:
        known = np.isfinite([cohort.units.columns[name].numbers[sides.rows] for name in cohort.adjust]).all(axis=0)
        return sides.take(np.flatnonzero(known))
    return sides


def compare_two(cohort: Cohort, sides: Sides, *, test: Method, seed: int) -> GroupComparison:
    """Compare every latent between two groups; the first group has number 0.

    Args:
        cohort: The patients.
        sides: Subjects of two groups.
        test: The test.
        seed: Seed of the permutations.

    Raises:
        IncomparableError: If strata or covariates leave nothing to compare.
    """
    sides = known_of(cohort, sides)
    counts, first = cohort.units.counts[sides.rows], sides.groups == 0
    if cohort.strata is not None:
        levels = cohort.units.columns[cohort.strata].levels[sides.rows]
        return compare_groups_within(counts, first, levels, method=test, seed=seed, level=SIGNIFICANT_Q)
    if cohort.adjust:
        try:
            return compare_groups_adjusted(counts, first, _design(cohort, sides.rows), level=SIGNIFICANT_Q)
        except (ConfoundedError, TooFewSubjectsError) as error:
            raise _explain(cohort, sides, error) from error
    return compare_groups(counts, first, method=test, seed=seed, level=SIGNIFICANT_Q)


def compare_several(cohort: Cohort, sides: Sides, *, seed: int) -> OmnibusComparison:
    """Test every latent for a difference between any of several groups.

    Args:
        cohort: The patients.
        sides: Their subjects.
        seed: Seed of the permutations.

    Raises:
        IncomparableError: If strata or covariates leave nothing to compare.
    """
    sides = known_of(cohort, sides)
    counts, n_groups = cohort.units.counts[sides.rows], len(sides.names)
    if cohort.strata is not None:
        levels = cohort.units.columns[cohort.strata].levels[sides.rows]
        return compare_all_groups_within(counts, sides.groups, n_groups, levels, seed=seed, level=SIGNIFICANT_Q)
    if cohort.adjust:
        design = _design(cohort, sides.rows)
        try:
            return compare_all_groups_adjusted(counts, sides.groups, n_groups, design, level=SIGNIFICANT_Q)
        except (ConfoundedError, TooFewSubjectsError) as error:
            raise _explain(cohort, sides, error) from error
    return compare_all_groups(counts, sides.groups, n_groups, seed=seed, level=SIGNIFICANT_Q)


def least_p_of_sides(cohort: Cohort, sides: Sides, test: Method) -> float:
    """The smallest p that any latent can have in a comparison of two groups; 0 for a linear model.

    Args:
        cohort: The patients.
        sides: Subjects of two groups, those that are compared.
        test: The test.
    """
    if cohort.adjust:
        return 0.0
    first = sides.groups == 0
    if cohort.strata is None:
        return least_p_of(int(first.sum()), int((~first).sum()), test)
    levels = cohort.units.columns[cohort.strata].levels[sides.rows]
    n_first, n_second = np.bincount(levels[first]), np.bincount(levels[~first])
    n = max(len(n_first), len(n_second))
    n_first, n_second = (np.pad(sizes, (0, n - len(sizes))) for sizes in (n_first, n_second))
    both = (n_first > 0) & (n_second > 0)
    least = least_p_of_design(n_first[both].tolist(), n_second[both].tolist())
    return least if test == "mann-whitney" or 2 / least <= _N_PERMUTATIONS else 1 / (1 + _N_PERMUTATIONS)


def describe_test(cohort: Cohort, test: Method) -> str:
    """Name of the test of two groups."""
    if cohort.adjust:
        return f"linear model of log2 counts with {', '.join(cohort.adjust)}"
    if cohort.strata is None:
        return _METHODS[test]
    return f"{'van Elteren' if test == 'mann-whitney' else _METHODS[test]}, within {cohort.strata}"


def describe_effect(cohort: Cohort) -> str:
    """What the effect of a comparison of two groups is."""
    if cohort.adjust:
        return f"the partial correlation with the group, at equal {', '.join(cohort.adjust)}"
    return f"the rank-biserial correlation{'' if cohort.strata is None else f' within {cohort.strata}, on average'}"


def describe_several(cohort: Cohort) -> tuple[str, str, str]:
    """Name of the test of several groups, of its statistic, and what its effect is."""
    if cohort.adjust:
        return f"linear model of log2 counts with {', '.join(cohort.adjust)}", "F", "partial R squared"
    if cohort.strata is None:
        return "Kruskal-Wallis", "H", "epsilon squared, the share of the ranks' variance that is between groups"
    return (
        f"row mean scores within {cohort.strata}",
        "Q",
        f"the share of the ranks' variance within {cohort.strata} that is between groups",
    )


def describe_left_out(cohort: Cohort, n_used: int, n_all: int) -> str:
    """How many subjects do not count, in a sentence; empty if all do."""
    limited = "" if cohort.n_passed is None else describe_limit(cohort.n_passed)
    if n_used == n_all:
        return limited
    if cohort.strata is not None:
        why = f"whose {cohort.strata} is unknown or has one group only"
    else:
        why = f"of whom {' or '.join(cohort.adjust)} is unknown"
    text = f"{n_all - n_used:,} of {n_all:,} {cohort.unit}s, {why}, do not count."
    return f"{text} {limited}" if limited else text


def describe_limit(n_passed: int) -> str:
    """Which latents are compared, in a sentence."""
    return f"Only latents that passed their rating are compared ({n_passed:,}), and q is adjusted over them."


def _design(cohort: Cohort, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Columns of the covariates: numbers as they are, of names one for each but the first; shape `(n, K)`."""
    columns = []
    for name in cohort.adjust:
        column = cohort.units.columns[name].take(rows)
        if column.names is None:
            columns.append(column.numbers[:, None])
        else:
            columns.append((column.numbers[:, None] == np.unique(column.numbers)[1:]).astype(np.float64))
    return np.concatenate(columns, axis=1)


def _explain(cohort: Cohort, sides: Sides, error: ValueError) -> IncomparableError:
    """What to do where the linear model cannot be fitted."""
    columns = ", ".join(map(quote, cohort.adjust))
    if isinstance(error, ConfoundedError):
        return IncomparableError(
            f"{_say(sides.names)} cannot be compared at equal {columns}: these tell which group a {cohort.unit} is in, "
            "so that nothing tells a difference of the groups from theirs. Leave one of them out of --adjust"
        )
    return IncomparableError(
        f"{_say(sides.names)} cannot be compared at equal {columns}: {len(sides.rows):,} {cohort.unit}s of whom these "
        "are known are too few for so many columns and names. Leave some out of --adjust"
    )


def _say(names: tuple[str, ...]) -> str:
    """Groups, for messages."""
    return " and ".join(map(quote, names)) if len(names) < 3 else "groups"
