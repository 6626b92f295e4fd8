"""Groups of subjects compared in a linear model with covariates, such as age: differences at equal covariates."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import f as f_distribution
from scipy.stats import false_discovery_control
from scipy.stats import t as t_distribution

from cytosae.analysis.design import least_p, least_p_by_others
from cytosae.analysis.differential import LATENT_BLOCK, GroupComparison, fold_change_pseudocount
from cytosae.analysis.omnibus import OmnibusComparison, rank_and_count_others

_TOLERANCE = 1e-9
"""A share of a column's length that is of rounding."""

_LEAST = 1e-200

Floats = npt.NDArray[np.float64]


class ConfoundedError(ValueError):
    """The covariates say which group a subject is in, so that no difference can be told from theirs."""


class TooFewSubjectsError(ValueError):
    """No degree of freedom is left."""


class _Residuals(NamedTuple):
    """What is left once covariates have explained what they can."""

    basis: Floats
    """Orthonormal columns of the group that no covariate explains, shape `(P, k)`."""
    covariates: Floats
    """Orthonormal columns of the constant and the covariates, shape `(P, c)`."""
    freedom: int
    """Degrees of freedom left, `P - c - k`."""


def compare_groups_adjusted(
    counts: npt.NDArray[np.floating],
    in_first: npt.NDArray[np.bool_],
    covariates: npt.NDArray[np.floating],
    *,
    level: float | None = None,
) -> GroupComparison:
    """Test every latent for a difference between two groups of subjects at equal covariates.

    The model is least squares of `log2(count + c)`, with c of `fold_change_pseudocount`, on a constant, the covariates
    and the group; p is that of Student's t of the group's coefficient, two-sided. It assumes that what the model does
    not explain scatters alike everywhere and is not far from normal, which counts of a few subjects do not promise:
    the tests within strata (`cytosae.analysis.within_strata`) need no such assumption.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        in_first: True for the first group's subjects, False for the second's, shape `(P,)`.
        covariates: Finite columns without the constant, shape `(P, K)`; of a name with levels, one column for each
            level but one.
        level: Leave out latents that no grouping of these subjects could give this p in a test of ranks
            (`cytosae.analysis.design.least_p`): almost all of their counts are tied.

    Returns:
        The comparison. The fold change is the group's coefficient, `effect` the partial correlation of the group, and
        the means are those of the counts as they are, not adjusted.

    Raises:
        ConfoundedError: If the covariates say which group a subject is in.
        TooFewSubjectsError: If they are not more than the columns of the model.
        ValueError: If the shapes do not fit, or a value is not finite.
    """
    first = np.asarray(in_first)
    if first.dtype != np.bool_:
        raise ValueError(f"in_first must be bool, found {first.dtype}")
    left = _remove(counts, first[:, None].astype(np.float64), covariates)
    tested = np.asarray(counts.max(axis=0) > counts.min(axis=0))
    n_varying = int(tested.sum())
    if level is not None:
        tested = _able(counts, tested, lambda ranks, _: least_p(ranks, int(first.sum())), level)
    n_latents, extra = counts.shape[1], fold_change_pseudocount(counts)
    fold, effect, p_value, q_value = np.zeros(n_latents), np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    # The group's own part of its column, to which the fold change refers.
    length = float(left.basis[:, 0] @ first)
    for start in range(0, n_latents, LATENT_BLOCK):
        block = slice(start, start + LATENT_BLOCK)
        along, rest = _project(counts[:, block], extra, left)
        fold[block] = along[0] / length
        effect[block] = along[0] / np.sqrt(along[0] ** 2 + rest)
        statistic = along[0] * np.sqrt(left.freedom / rest)
        p_value[block] = 2 * t_distribution.sf(np.abs(statistic), left.freedom)
    fold, effect, p_value = (np.where(tested, *pair) for pair in ((fold, 0.0), (effect, 0.0), (p_value, 1.0)))
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    means = [counts[side].mean(axis=0, dtype=np.float64) for side in (first, ~first)]
    direction = np.sign(fold).astype(np.int8)
    return GroupComparison(means[0], means[1], fold, direction, effect, p_value, q_value, tested, n_varying)


def compare_all_groups_adjusted(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    n_groups: int,
    covariates: npt.NDArray[np.floating],
    *,
    level: float | None = None,
) -> OmnibusComparison:
    """Test every latent for a difference between any of several groups at equal covariates.

    The model is that of `compare_groups_adjusted` with a column for each group but one; p is that of the partial F.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        groups: Group of each subject, 0 to `n_groups - 1`, shape `(P,)`.
        n_groups: Groups.
        covariates: As for `compare_groups_adjusted`.
        level: As for `compare_groups_adjusted`, with `cytosae.analysis.design.least_p_by_others`.

    Returns:
        The comparison: `statistic` is F, `effect` the partial R squared.

    Raises:
        ConfoundedError: If the covariates say which group a subject is in, for any of the groups.
        TooFewSubjectsError: If they are not more than the columns of the model.
        ValueError: If the shapes do not fit, or a value is not finite.
    """
    groups = np.asarray(groups)
    left = _remove(counts, (groups[:, None] == np.arange(1, n_groups)).astype(np.float64), covariates)
    tested = np.asarray(counts.max(axis=0) > counts.min(axis=0))
    n_varying = int(tested.sum())
    if level is not None:
        bound = least_p_by_others(np.bincount(groups, minlength=n_groups).tolist())
        tested = _able(counts, tested, lambda _, n_others: bound[n_others], level)
    n_latents, extra, k = counts.shape[1], fold_change_pseudocount(counts), left.basis.shape[1]
    statistic, effect = np.zeros(n_latents), np.zeros(n_latents)
    for start in range(0, n_latents, LATENT_BLOCK):
        block = slice(start, start + LATENT_BLOCK)
        along, rest = _project(counts[:, block], extra, left)
        explained = (along**2).sum(axis=0)
        statistic[block] = explained / k / (rest / left.freedom)
        effect[block] = explained / (explained + rest)
    p_value = np.where(tested, f_distribution.sf(statistic, k, left.freedom), 1.0)
    q_value = np.ones(n_latents)
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    statistic, effect = np.where(tested, statistic, 0), np.where(tested, effect, 0)
    return OmnibusComparison(statistic, effect, p_value, q_value, tested, n_varying)


def _able(
    counts: npt.NDArray[np.floating],
    varying: npt.NDArray[np.bool_],
    least: Callable[[Floats, npt.NDArray[np.int64]], Floats],
    level: float,
) -> npt.NDArray[np.bool_]:
    """The latents that could reach a level, or the best that any of them could; shape `(S,)`.

    Args:
        counts: Counts.
        varying: Latents that vary.
        least: The smallest possible p by centred midranks and by the subjects with other counts than the most frequent.
        level: The level.
    """
    latents = np.flatnonzero(varying)
    bound = np.ones(len(latents))
    for start in range(0, len(latents), LATENT_BLOCK):
        block = np.asarray(counts[:, latents[start : start + LATENT_BLOCK]], dtype=np.float64)
        bound[start : start + LATENT_BLOCK] = least(*rank_and_count_others(block))
    able = np.zeros(len(varying), dtype=np.bool_)
    able[latents[bound <= max(level, bound.min(initial=1.0)) * (1 + 1e-9)]] = True
    return able


def _remove(counts: npt.NDArray[np.floating], columns: Floats, covariates: npt.NDArray[np.floating]) -> _Residuals:
    """The part of the groups' columns that the covariates do not explain.

    Raises:
        ValueError: As for `compare_groups_adjusted`, with its subclasses.
    """
    covariates = np.asarray(covariates, dtype=np.float64)
    n = len(counts)
    if counts.ndim != 2 or covariates.ndim != 2 or len(columns) != n or len(covariates) != n:
        raise ValueError(
            f"counts must be (P, S), the groups (P,) and covariates (P, K), found {counts.shape}, {columns.shape[:1]} "
            f"and {covariates.shape}"
        )
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    if not np.isfinite(covariates).all():
        raise ValueError("covariates must be finite: leave subjects out where one is unknown")
    basis = _orthonormal(np.column_stack([np.ones(n), covariates]))
    residual = columns - basis @ (basis.T @ columns)
    own = _orthonormal(residual, np.linalg.norm(columns, axis=0).max(initial=1.0))
    freedom = n - basis.shape[1] - columns.shape[1]
    if own.shape[1] < columns.shape[1]:
        raise ConfoundedError(
            "the covariates say which group a subject is in: a difference of the groups cannot be told from theirs"
        )
    if freedom < 1:
        raise TooFewSubjectsError(f"{n} subjects are too few for {basis.shape[1] - 1} covariates and the groups")
    return _Residuals(own, basis, freedom)


def _orthonormal(columns: Floats, scale: float | None = None) -> Floats:
    """An orthonormal basis of the columns' span, one column after the other; those that add nothing are left out."""
    basis: list[Floats] = []
    for column in columns.T:
        rest = column - sum((axis * (axis @ column) for axis in basis), np.zeros(len(column)))
        rest = rest - sum((axis * (axis @ rest) for axis in basis), np.zeros(len(column)))
        if np.linalg.norm(rest) > 1e-8 * (scale or np.linalg.norm(column) or 1.0):
            basis.append(rest / np.linalg.norm(rest))
    return np.stack(basis, axis=1) if basis else np.zeros((len(columns), 0))


def _project(counts: npt.NDArray[np.floating], extra: float, left: _Residuals) -> tuple[Floats, Floats]:
    """Logarithms along the groups' own columns, shape `(k, n)`, and the squares that the model leaves, `(n,)`.

    The second is never less than what rounding leaves, so that a latent without scatter has no difference of rounding.
    """
    logs = np.log2(np.asarray(counts, dtype=np.float64) + extra)
    total = np.einsum("pn,pn->n", logs, logs)
    logs = logs - left.covariates @ (left.covariates.T @ logs)
    along = left.basis.T @ logs
    logs = logs - left.basis @ along
    rest = np.einsum("pn,pn->n", logs, logs)
    return along, np.maximum(rest, np.maximum(_TOLERANCE**2 * total, _LEAST))
