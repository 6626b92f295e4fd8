"""What a property of subjects, such as site or age, has to do with each latent: the audit for confounders."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, rankdata
from scipy.stats import t as t_distribution

from cytosae.analysis.omnibus import compare_all_groups

LATENT_BLOCK = 2048
"""Latents tested together."""

PERMUTED_BELOW = 10
"""P of a number's correlation comes from permutations if it is known of fewer subjects than this."""

_TOLERANCE = 1e-12
"""Correlations that differ by less than this are equal: sums over the same subjects in another order."""

Floats = npt.NDArray[np.float64]


class Association(NamedTuple):
    """What one property tells about each latent; every array has shape `(S,)`."""

    share: Floats
    """Share of the variance of the ranks that the property explains, less what a random one would: `(H - k + 1) /
    (n - k)` of k levels (eta squared of Kruskal and Wallis' H, Tomczak & Tomczak 2014); of a number with Spearman's
    correlation r `((n - 1) r^2 - 1) / (n - 2)`. At least 0."""
    correlation: Floats | None
    """Spearman's correlation with a number; None for names."""
    p_value: Floats
    """P; 1 where not tested."""
    q_value: Floats
    """Benjamini-Hochberg adjusted p over the tested latents; 1 where not tested."""
    tested: npt.NDArray[np.bool_]
    """Whether the latent varies among these subjects and could be significant."""
    n_subjects: int
    """Subjects of whom the property is known, and who share it with another, if it is a name."""


def associate_levels(
    counts: npt.NDArray[np.floating], levels: npt.NDArray[np.integer], *, seed: int = 0, level: float | None = None
) -> Association | None:
    """Relate every latent to a property that is a name: the test of Kruskal and Wallis.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        levels: Level of each subject, shape `(P,)`; -1 where unknown. Levels of one subject are left out.
        seed: Seed of permutations.
        level: As for `cytosae.analysis.omnibus.compare_all_groups`.

    Returns:
        The association; None if fewer than two levels have two subjects.

    Raises:
        ValueError: If the shapes do not fit, or a count is negative or not finite.
    """
    levels = np.asarray(levels)
    if counts.ndim != 2 or levels.shape != counts.shape[:1]:
        raise ValueError(f"counts must be (P, S) and levels (P,), found {counts.shape} and {levels.shape}")
    names, sizes = np.unique(levels[levels >= 0], return_counts=True)
    names = names[sizes > 1]
    if len(names) < 2:
        return None
    rows = np.flatnonzero(np.isin(levels, names))
    found = compare_all_groups(counts[rows], np.searchsorted(names, levels[rows]), len(names), seed=seed, level=level)
    share = (found.statistic - len(names) + 1) / max(1, len(rows) - len(names))
    share = np.where(found.tested, np.clip(share, 0, 1), 0)
    return Association(share, None, found.p_value, found.q_value, found.tested, len(rows))


def associate_numbers(
    counts: npt.NDArray[np.floating],
    numbers: npt.NDArray[np.floating],
    *,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Association | None:
    """Relate every latent to a property that is a number: Spearman's correlation.

    P is that of Student's t with `n - 2` degrees of freedom; of random permutations of the numbers where fewer than
    `PERMUTED_BELOW` subjects are known.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        numbers: Number of each subject, shape `(P,)`; NaN where unknown.
        n_permutations: Number of permutations.
        seed: Their seed.

    Returns:
        The association; None if the number is known of fewer than four subjects or is the same of all.

    Raises:
        ValueError: If the shapes do not fit, or a count is negative or not finite.
    """
    values = np.asarray(numbers, dtype=np.float64)
    if counts.ndim != 2 or values.shape != counts.shape[:1]:
        raise ValueError(f"counts must be (P, S) and numbers (P,), found {counts.shape} and {values.shape}")
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    rows = np.flatnonzero(np.isfinite(values))
    n, n_latents = len(rows), counts.shape[1]
    if n < 4 or np.ptp(values[rows]) == 0:
        return None
    target = _standardise(values[rows][:, None])[:, 0]
    correlation, p_value, q_value = np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    tested = np.asarray(counts[rows].max(axis=0) > counts[rows].min(axis=0))
    varying = np.flatnonzero(tested)
    for start in range(0, len(varying), LATENT_BLOCK):
        latents = varying[start : start + LATENT_BLOCK]
        ranks = _standardise(np.asarray(counts[np.ix_(rows, latents)], dtype=np.float64))
        found = np.clip(target @ ranks, -1, 1)
        correlation[latents] = found
        if n < PERMUTED_BELOW:
            drawn = np.random.default_rng(seed).permuted(np.tile(target, (n_permutations, 1)), axis=1)
            n_extreme = (np.abs(drawn @ ranks) >= np.abs(found) - _TOLERANCE).sum(axis=0)
            p_value[latents] = (1 + n_extreme) / (1 + n_permutations)
        else:
            with np.errstate(divide="ignore"):
                statistic = np.abs(found) * np.sqrt((n - 2) / (1 - found**2))
            p_value[latents] = 2 * t_distribution.sf(statistic, n - 2)
    if len(varying):
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    share = np.clip(((n - 1) * correlation**2 - 1) / (n - 2), 0, 1)
    return Association(share, correlation, p_value, q_value, tested, n)


def _standardise(values: Floats) -> Floats:
    """Midranks of each column, centred and of length 1."""
    ranks = rankdata(values, axis=0) - (len(values) + 1) / 2
    return np.asarray(ranks / np.linalg.norm(ranks, axis=0))


class NamesTogether(NamedTuple):
    """How much one property that is a name says about another."""

    cramers_v: float
    """Cramer's V, 0 to 1: 1 if each level of the property with more levels has one level of the other only."""
    p_value: float
    """Share of permutations of one of them with a chi squared at least as large."""


def relate_names(
    first: npt.NDArray[np.integer], second: npt.NDArray[np.integer], *, n_permutations: int = 10_000, seed: int = 0
) -> NamesTogether | None:
    """Relate two properties that are names, such as site and group: chi squared by permutations.

    Args:
        first: Level of each subject, shape `(P,)`; -1 where unknown.
        second: Level of the other property, shape `(P,)`; -1 where unknown.
        n_permutations: Number of permutations.
        seed: Their seed.

    Returns:
        The relation; None if either has one level only among the subjects of whom both are known.

    Raises:
        ValueError: If the shapes do not fit.
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape:
        raise ValueError(f"both properties must be (P,), found {first.shape} and {second.shape}")
    known = (first >= 0) & (second >= 0)
    one, two = (np.unique(levels[known], return_inverse=True)[1] for levels in (first, second))
    n, shape = len(one), (int(one.max(initial=0)) + 1, int(two.max(initial=0)) + 1)
    if min(shape) < 2:
        return None
    expected = np.outer(np.bincount(one), np.bincount(two)) / n

    def measure(levels: npt.NDArray[np.integer]) -> float:
        table = np.bincount(levels * shape[1] + two, minlength=expected.size).reshape(shape)
        return float(((table - expected) ** 2 / expected).sum())

    observed, rng = measure(one), np.random.default_rng(seed)
    n_extreme = sum(measure(rng.permutation(one)) >= observed * (1 - _TOLERANCE) for _ in range(n_permutations))
    return NamesTogether((observed / (n * (min(shape) - 1))) ** 0.5, (1 + n_extreme) / (1 + n_permutations))
