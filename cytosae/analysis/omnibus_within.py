"""Several groups of subjects compared within strata, all at once."""

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, false_discovery_control

from cytosae.analysis.design import least_p_by_others
from cytosae.analysis.omnibus import (
    EXPECTED_BELOW,
    PERMUTED_BELOW,
    REFINED_BELOW,
    OmnibusComparison,
    rank_and_count_others,
)
from cytosae.analysis.strata import (
    Floats,
    Ints,
    Strata,
    iter_blocks,
    iter_shuffled,
    rank_within,
    row_weights,
    varies_within,
)

_TOLERANCE = 1e-9
"""Statistics that differ by less than this share are equal: sums over the same subjects in another order."""


def compare_all_groups_within(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    n_groups: int,
    strata: npt.NDArray[np.integer],
    *,
    n_permutations: int = 10_000,
    seed: int = 0,
    level: float | None = None,
) -> OmnibusComparison:
    """Test every latent for a difference between any of several groups of subjects, within strata.

    The groups' rank sums within the strata, weighted by `1 / (P_h + 1)` and added, less their expectation, make a
    vector; the statistic is its square by the inverse of its covariance over assignments within the strata (the row
    mean score statistic of Landis, Heyman and Koch 1978 with van Elteren's scores). With one stratum it is the H of
    Kruskal and Wallis. P is that of chi squared; of permutations within the strata where `compare_all_groups` permutes.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        groups: Group of each subject, 0 to `n_groups - 1`, shape `(P,)`.
        n_groups: Groups.
        strata: Stratum of each subject, shape `(P,)`; -1 where it is unknown, which leaves the subject out.
        n_permutations: Number of random assignments.
        seed: Their seed.
        level: Leave out latents that cannot reach this p.

    Returns:
        The comparison; `effect` is the statistic as a share of its largest value, subjects less strata.

    Raises:
        NoOverlapError: If no stratum has two groups.
        ValueError: If the shapes do not fit, or a count is negative or not finite.
    """
    groups = np.asarray(groups)
    if counts.ndim != 2 or groups.shape != counts.shape[:1]:
        raise ValueError(f"counts must be (P, S) and groups (P,), found {counts.shape} and {groups.shape}")
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    plan = Strata.of(groups, strata)
    sizes = [np.bincount(groups[rows], minlength=n_groups) for rows in plan.rows]
    bounds = [least_p_by_others(size.tolist()) for size in sizes]
    n_latents = counts.shape[1]
    statistic, p_value, q_value = np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    varying = np.flatnonzero(varies_within(counts, plan))
    tested = np.zeros(n_latents, dtype=np.bool_)
    for latents in iter_blocks(varying):
        block = np.asarray(counts[:, latents], dtype=np.float64)
        ranks = rank_within(block, plan)
        others = np.stack([rank_and_count_others(block[rows])[1] for rows in plan.rows])
        bound = np.prod([least[n] for least, n in zip(bounds, others, strict=True)], axis=0)
        if level is not None:
            able = bound <= level * (1 + 1e-9)
            latents, ranks, others = latents[able], ranks[:, able], others[:, able]
        tested[latents] = True
        inverse, freedom = _invert_covariance(ranks, sizes, plan)
        statistic[latents] = _quadratic(ranks, groups[None], n_groups, plan, inverse)[0]
        p = chi2.sf(statistic[latents], np.maximum(freedom, 1))
        doubtful = np.flatnonzero((p < REFINED_BELOW) & _is_small(others, sizes))
        if len(doubtful):
            at, chosen = statistic[latents][doubtful], (ranks[:, doubtful], inverse[doubtful])
            p[doubtful] = _permute(at, *chosen, groups, n_groups, plan, n_permutations, seed)
        p_value[latents] = p
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    largest = len(plan.used) - len(plan.rows)
    return OmnibusComparison(statistic, statistic / largest, p_value, q_value, tested, len(varying))


def _is_small(others: Ints, sizes: list[Ints]) -> npt.NDArray[np.bool_]:
    """Where chi squared may be far off: in small groups, and where most counts are tied; shape `(n,)`.

    Args:
        others: Subjects of each stratum with another count than the most frequent, shape `(H, n)`.
        sizes: Sizes of the groups in each stratum.
    """
    expected = sum(n * size[size > 0].min() / size.sum() for n, size in zip(others, sizes, strict=True))
    return np.asarray((expected < EXPECTED_BELOW) | (np.sum(sizes, axis=0).min() < PERMUTED_BELOW))


def _permute(
    observed: Floats,
    ranks: Floats,
    inverse: Floats,
    groups: npt.NDArray[np.integer],
    n_groups: int,
    plan: Strata,
    n_permutations: int,
    seed: int,
) -> Floats:
    """P of each latent over random assignments within the strata, shape `(n,)`."""
    n_extreme = np.zeros(len(observed))
    for drawn in iter_shuffled(groups, plan, n_permutations, seed):
        found = _quadratic(ranks, drawn, n_groups, plan, inverse)
        n_extreme += (found >= observed * (1 - _TOLERANCE)).sum(axis=0)
    return (1 + n_extreme) / (1 + n_permutations)


def _quadratic(ranks: Floats, groups: npt.NDArray[np.integer], n_groups: int, plan: Strata, inverse: Floats) -> Floats:
    """The statistic for assignments `(n, P)`: shape `(n, S)`."""
    weights = row_weights(plan, len(ranks))
    members = (groups[:, None] == np.arange(n_groups)[:, None]) * weights
    sums = np.tensordot(members, ranks, axes=1)
    return np.asarray(np.einsum("agn,ngh,ahn->an", sums, inverse, sums))


def _invert_covariance(ranks: Floats, sizes: list[Ints], plan: Strata) -> tuple[Floats, Ints]:
    """Pseudoinverse of the covariance of the weighted sums, shape `(n, G, G)`, and its rank, shape `(n,)`."""
    covariance = np.zeros((ranks.shape[1], len(sizes[0]), len(sizes[0])))
    for rows, size, weight in zip(plan.rows, sizes, plan.weights.tolist(), strict=True):
        n = len(rows)
        spread = np.einsum("pn,pn->n", ranks[rows], ranks[rows]) / (n - 1)
        covariance += (weight**2 * spread)[:, None, None] * (np.diag(size) - np.outer(size, size) / n)
    inverse = np.linalg.pinv(covariance, rcond=1e-9, hermitian=True)
    rank = np.linalg.matrix_rank(covariance, tol=1e-9 * np.abs(covariance).max(axis=(1, 2)), hermitian=True)
    return np.asarray(inverse, dtype=np.float64), np.asarray(rank, dtype=np.int64)
