"""Two groups of subjects compared within strata: what differs between strata is not taken for the groups'."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, norm, rankdata

from cytosae.analysis.design import least_p_within
from cytosae.analysis.differential import GroupComparison, Method, fold_change_pseudocount
from cytosae.analysis.rank_sums import TiedRanks
from cytosae.analysis.strata import (
    LATENT_BLOCK,
    PERMUTATION_BLOCK,
    Floats,
    Strata,
    iter_blocks,
    iter_shuffled,
    rank_within,
    row_weights,
    varies_within,
)

REFINED_BELOW = 0.25
"""Above this p, an approximation is not refined: such a p is never significant."""

LARGEST_TABLE = 3e7
"""Largest number of additions for an exact distribution; longer ones are not computed."""

SAMPLED_BELOW = 9
"""Then p is that of random assignments, if the smaller sides of the strata have fewer subjects than this together."""

_TOLERANCE = 1e-9
"""Statistics that differ by less than this share are equal: sums over the same subjects in another order."""


def compare_groups_within(
    counts: npt.NDArray[np.floating],
    in_first: npt.NDArray[np.bool_],
    strata: npt.NDArray[np.integer],
    *,
    method: Method = "mann-whitney",
    n_permutations: int = 10_000,
    seed: int = 0,
    level: float | None = None,
) -> GroupComparison:
    """Test every latent for a difference between two groups of subjects, within strata.

    Subjects are compared with those of their own stratum only, so that what differs between strata cannot become a
    difference of the groups, whatever the groups' shares in the strata are. `mann-whitney` is van Elteren's test
    (1960): the first group's rank sums within the strata, weighted by `1 / (P_h + 1)` and added. P is that of the exact
    distribution over all assignments within the strata, ties included, where p is below `REFINED_BELOW`; where that
    would take too long, and for larger p, that of the normal distribution with the variance of tied ranks, or of random
    assignments where few subjects are compared. With one stratum it is the test of Mann and Whitney.

    `permutation` adds the differences of means within the strata, weighted by `n_first n_second / (P_h + 1)`, and p is
    the share of assignments within the strata in which their sum is at least as large; of all of them if there are at
    most `n_permutations`, else of this many random ones, as for `compare_groups`.

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        in_first: True for the first group's subjects, False for the second's, shape `(P,)`.
        strata: Stratum of each subject, shape `(P,)`; -1 where it is unknown, which leaves the subject out.
        method: The test.
        n_permutations: Largest number of assignments.
        seed: Seed of the random assignments.
        level: Leave out latents that cannot reach this p, as `compare_groups` does.

    Returns:
        The comparison. Means, fold change and effect are those within the strata, averaged with the weights
        `n_first n_second / (P_h + 1)`: of `effect`, the strata's rank-biserial correlations.

    Raises:
        NoOverlapError: If no stratum has both groups.
        ValueError: If the shapes do not fit, a count is negative or not finite, or the method is unknown.
    """
    first = np.asarray(in_first)
    if counts.ndim != 2 or first.shape != counts.shape[:1] or first.dtype != np.bool_:
        raise ValueError(f"counts must be (P, S) and in_first bool (P,), found {counts.shape} and {first.shape}")
    if method not in ("mann-whitney", "permutation"):
        raise ValueError(f"method must be 'mann-whitney' or 'permutation', found {method!r}")
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    plan = Strata.of(first.astype(np.int64), strata)
    tested, n_varying = _choose_tested(counts, first, plan, method, level)
    n_latents = counts.shape[1]
    effect, p_value, q_value = np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    for latents in iter_blocks(np.flatnonzero(tested)):
        block = np.asarray(counts[:, latents], dtype=np.float64)
        ranks = rank_within(block, plan)
        effect[latents] = _effect(ranks, first, plan)
        if method == "mann-whitney":
            p_value[latents] = _van_elteren(ranks, first, plan, n_permutations, seed)
        else:
            p_value[latents] = _permute(_center_within(block, plan), first, plan, n_permutations, seed)
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    means = _means(counts, first, plan)
    extra = fold_change_pseudocount(counts[plan.used])
    fold = np.log2(means[0] + extra) - np.log2(means[1] + extra)
    direction = np.sign(effect if method == "mann-whitney" else means[0] - means[1]).astype(np.int8)
    return GroupComparison(*means, fold, direction, effect, p_value, q_value, tested, n_varying)


def _choose_tested(
    counts: npt.NDArray[np.floating], first: npt.NDArray[np.bool_], plan: Strata, method: Method, level: float | None
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which latents are tested, and how many vary."""
    tested = varies_within(counts, plan)
    varying = np.flatnonzero(tested)
    if level is None or not len(varying):
        return tested, len(varying)
    n_first = [int(first[rows].sum()) for rows in plan.rows]
    weights = plan.weights if method == "mann-whitney" else plan.weights * [len(rows) for rows in plan.rows]
    least = np.ones(len(varying))
    for start in range(0, len(varying), LATENT_BLOCK):
        block = np.asarray(counts[:, varying[start : start + LATENT_BLOCK]], dtype=np.float64)
        values = [rankdata(block[rows], axis=0) if method == "mann-whitney" else block[rows] for rows in plan.rows]
        least[start : start + LATENT_BLOCK] = least_p_within(values, n_first, weights.tolist())
    tested = np.zeros(counts.shape[1], dtype=np.bool_)
    tested[varying[least <= max(level, least.min()) * (1 + 1e-9)]] = True
    return tested, len(varying)


def _center_within(block: Floats, plan: Strata) -> Floats:
    """Counts less their mean in each stratum, times `P_h`.

    The first group's weighted sum of these is that of the differences of means times `n_first n_second / (P_h + 1)`.
    """
    centred = np.zeros_like(block)
    for rows in plan.rows:
        centred[rows] = (block[rows] - block[rows].mean(axis=0)) * len(rows)
    return centred


def _sum_first(values: Floats, first: npt.NDArray[np.bool_], plan: Strata) -> Floats:
    """Weighted sum over the first group, shape `(n,)`."""
    return np.asarray((first * row_weights(plan, len(first))) @ values)


def _pair_weights(first: npt.NDArray[np.bool_], plan: Strata) -> Floats:
    """`n_first n_second / (P_h + 1)` of each stratum."""
    n_first = np.array([first[rows].sum() for rows in plan.rows])
    return np.asarray(n_first * ([len(rows) for rows in plan.rows] - n_first) * plan.weights)


def _effect(ranks: Floats, first: npt.NDArray[np.bool_], plan: Strata) -> Floats:
    """Weighted mean of the strata's rank-biserial correlations: each is `2 (U - E U) / (n_first n_second)`."""
    return np.asarray(2 * _sum_first(ranks, first, plan) / _pair_weights(first, plan).sum())


def _means(counts: npt.NDArray[np.floating], first: npt.NDArray[np.bool_], plan: Strata) -> tuple[Floats, Floats]:
    """Weighted means over the strata of both groups' means."""
    weights = _pair_weights(first, plan)
    sides = []
    for side in (first, ~first):
        means = [counts[rows[side[rows]]].mean(axis=0, dtype=np.float64) for rows in plan.rows]
        sides.append(np.asarray(weights @ np.stack(means) / weights.sum()))
    return sides[0], sides[1]


def _van_elteren(ranks: Floats, first: npt.NDArray[np.bool_], plan: Strata, n_permutations: int, seed: int) -> Floats:
    """Two-sided p of each latent, shape `(n,)`."""
    observed = _sum_first(ranks, first, plan)
    variance = np.zeros(ranks.shape[1])
    for rows, weight in zip(plan.rows, plan.weights.tolist(), strict=True):
        n_first, n = int(first[rows].sum()), len(rows)
        spread = np.einsum("pn,pn->n", ranks[rows], ranks[rows]) / (n - 1)
        variance += weight**2 * n_first * (n - n_first) / n * spread
    p_value = np.minimum(1, 2 * norm.sf(np.abs(observed) / np.sqrt(variance)))
    sampled = []
    for latent in np.flatnonzero(p_value < REFINED_BELOW).tolist():
        p = _exact(ranks[:, latent], first, plan)
        if p is not None:
            p_value[latent] = p
        elif sum(min(first[rows].sum(), (~first[rows]).sum()) for rows in plan.rows) < SAMPLED_BELOW:
            sampled.append(latent)
    if sampled:
        p_value[sampled] = _permute(ranks[:, sampled], first, plan, n_permutations, seed)
    return np.asarray(p_value)


def _exact(ranks: Floats, first: npt.NDArray[np.bool_], plan: Strata) -> float | None:
    """Two-sided p of one latent over all assignments within the strata; None if that takes too long.

    The distributions of the strata's rank sums are convolved. Sums are whole numbers in the unit of half a rank over
    the least common multiple of the strata's `P_h + 1`.
    """
    scale = math.lcm(*(len(rows) + 1 for rows in plan.rows))
    steps = [scale // (len(rows) + 1) for rows in plan.rows]
    unit = math.gcd(*steps)
    shares, low, expected, observed = np.ones(1), 0, 0.0, 0
    for rows, step in zip(plan.rows, (step // unit for step in steps), strict=True):
        ties = TiedRanks.of_group(ranks[rows], first[rows])
        here, start = ties.distribution()
        if len(here) * float(len(shares) + step * len(here)) > LARGEST_TABLE or ties.n_additions > LARGEST_TABLE:
            return None
        wider = np.zeros(len(shares) + step * (len(here) - 1))
        for at in np.flatnonzero(here).tolist():
            wider[step * at : step * at + len(shares)] += here[at] * shares
        shares, low = wider, low + step * start
        expected += step * ties.n_chosen * sum(ties.offsets) / ties.n_patients
        observed += step * ties.observed
    distance = np.abs(low + np.arange(len(shares)) - expected)
    return min(1.0, float(shares[distance >= abs(observed - expected) - _TOLERANCE * len(shares)].sum()))


def _permute(values: Floats, first: npt.NDArray[np.bool_], plan: Strata, n_permutations: int, seed: int) -> Floats:
    """Two-sided p of the first group's weighted sum of centred values over assignments within the strata."""
    n_all = math.prod(math.comb(len(rows), int(first[rows].sum())) for rows in plan.rows)
    complete = n_all <= n_permutations
    weighted = values * row_weights(plan, len(first))[:, None]
    observed = np.abs(first.astype(np.float64) @ weighted) - _TOLERANCE * np.abs(weighted).sum(axis=0)
    n_extreme = np.zeros(values.shape[1])
    drawn = (
        _every_assignment(first, plan)
        if complete
        else iter_shuffled(first.astype(np.int64), plan, n_permutations, seed)
    )
    for members in drawn:
        n_extreme += (np.abs(members.astype(np.float64) @ weighted) >= observed).sum(axis=0)
    return np.asarray(n_extreme / n_all if complete else (1 + n_extreme) / (1 + n_permutations))


def _every_assignment(first: npt.NDArray[np.bool_], plan: Strata) -> Iterator[npt.NDArray[np.integer]]:
    """Every choice of the first group within the strata, in blocks of shape `(n, P)`."""
    choices = [itertools.combinations(rows.tolist(), int(first[rows].sum())) for rows in plan.rows]
    every = itertools.product(*choices)
    while chosen := list(itertools.islice(every, PERMUTATION_BLOCK)):
        members = np.zeros((len(chosen), len(first)), dtype=np.int64)
        for row, parts in enumerate(chosen):
            members[row, list(itertools.chain.from_iterable(parts))] = 1
        yield members
