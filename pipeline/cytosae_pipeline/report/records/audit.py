"""The audit for confounders: what each known property of the subjects tells about the latents, beside the group."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae.analysis.association import Association, associate_levels, associate_numbers, relate_names
from cytosae.analysis.omnibus import compare_all_groups
from cytosae_pipeline.errors import join_few, quote
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.records.encoding import pack
from cytosae_pipeline.statistics.patient_columns import Column

logger = logging.getLogger(__name__)

N_IMAGES = "readable images"
"""Name of the property that every cohort has."""

_LARGEST = 15
_NAMED = 5


@dataclass(frozen=True)
class AuditedColumn:
    """A property of the subjects."""

    name: str
    """Its name."""
    n_levels: int
    """Names of at least two subjects; 0 for numbers."""
    found: Association
    """What it tells about the latents."""
    with_groups: tuple[float, float] | None
    """How much groups differ in it, 0 to 1, and p of that: Cramer's V of names, epsilon squared of numbers. None
    without groups."""


@dataclass(frozen=True)
class Audit:
    """What is known about the subjects, and what it tells."""

    columns: list[AuditedColumn]
    """Properties that could be tested."""
    groups: Association | None
    """What the group tells; None without groups."""

    def told_by(self, latent: int) -> list[str]:
        """The properties that tell a latent significantly, and more of it than the group does."""
        group = 0.0 if self.groups is None else float(self.groups.share[latent])
        return [
            column.name
            for column in self.columns
            if column.found.q_value[latent] < SIGNIFICANT_Q and column.found.share[latent] > group
        ]


def audit_cohort(cohort: Cohort, *, seed: int) -> Audit:
    """Relate every property of the subjects to every latent, and to their groups.

    Properties that no two subjects share are left out, as there is nothing to test.

    Args:
        cohort: The patients.
        seed: Seed of permutations.
    """
    units = cohort.units
    of = units.groups.of
    columns, untested = [], []
    for name, column in [*units.columns.items(), (N_IMAGES, Column(units.n_images.astype(np.float64), None))]:
        found = _associate(units.counts, column, seed)
        if found is None:
            # Names that all differ are those of the subjects.
            alone = column.names is not None and len(column.names) == int(np.isfinite(column.numbers).sum())
            if name in units.columns and not alone:
                untested.append(name)
            continue
        sizes = np.bincount(column.levels[column.levels >= 0]) if column.names is not None else np.zeros(0)
        columns.append(AuditedColumn(name, int((sizes > 1).sum()), found, _relate(column, of, seed)))
    if untested:
        logger.info(f"not audited, as too few {cohort.unit}s share a value: {join_few(map(quote, untested), _NAMED)}")
    groups = associate_levels(units.counts, of, seed=seed, level=SIGNIFICANT_Q) if len(units.groups.names) > 1 else None
    return Audit(columns, groups)


def audit_record(audit: Audit, cohort: Cohort) -> dict[str, Any]:
    """Record of the audit: for each property, the latents of which it tells most.

    Args:
        audit: The audit.
        cohort: The patients.
    """
    return {
        "columns": [_column_record(column, audit) for column in audit.columns],
        "has_groups": audit.groups is not None,
        "strata": cohort.strata,
        "adjust": list(cohort.adjust),
        "n_known": len(cohort.units.columns),
    }


def _column_record(column: AuditedColumn, audit: Audit) -> dict[str, Any]:
    """Record of a property."""
    found = column.found
    significant = np.flatnonzero(found.q_value < SIGNIFICANT_Q)
    tested = np.flatnonzero(found.tested)
    order = tested[np.lexsort((-found.share[tested], found.q_value[tested]))][:_LARGEST]
    group = np.zeros(len(found.share)) if audit.groups is None else audit.groups.share
    return {
        "name": column.name,
        "n_levels": column.n_levels,
        "n_subjects": found.n_subjects,
        "n_tested": len(tested),
        "n_significant": len(significant),
        "more_than_group": pack(significant[(found.share > group)[significant]].astype(np.int32)),
        "with_groups": column.with_groups,
        "latents": [
            {
                "latent": latent,
                "share": float(found.share[latent]),
                "correlation": None if found.correlation is None else float(found.correlation[latent]),
                "p": float(found.p_value[latent]),
                "q": float(found.q_value[latent]),
                "group_share": None if audit.groups is None else float(group[latent]),
            }
            for latent in order.tolist()
        ],
    }


def _associate(counts: npt.NDArray[np.float64], column: Column, seed: int) -> Association | None:
    """What a property tells about each latent."""
    if column.names is None:
        return associate_numbers(counts, column.numbers, seed=seed)
    return associate_levels(counts, column.levels, seed=seed, level=SIGNIFICANT_Q)


def _relate(column: Column, groups: npt.NDArray[np.int64], seed: int) -> tuple[float, float] | None:
    """How much groups differ in a property, and p of that; None if fewer than two groups are known of two subjects."""
    if column.names is not None:
        found = relate_names(column.levels, groups, seed=seed)
        return None if found is None else (found.cramers_v, found.p_value)
    known = np.isfinite(column.numbers) & (groups >= 0)
    names, sizes = np.unique(groups[known], return_counts=True)
    names = names[sizes > 1]
    rows = np.flatnonzero(known & np.isin(groups, names))
    if len(names) < 2:
        return None
    values = column.numbers[rows, None] - column.numbers[rows].min()
    tested = compare_all_groups(values, np.searchsorted(names, groups[rows]), len(names), seed=seed)
    return float(tested.effect[0]), float(tested.p_value[0])
