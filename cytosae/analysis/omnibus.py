"""Several groups of subjects at once: one test per latent of whether any of them differ, before pairs are compared."""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import chi2, false_discovery_control, rankdata

from cytosae.analysis.design import least_p_by_others

LATENT_BLOCK = 2048
"""Latents tested together."""

PERMUTATION_BLOCK = 256
"""Permutations evaluated together."""

PERMUTED_BELOW = 9
"""P comes from permutations if a group has fewer subjects than this, as the test of two groups is exact then."""

EXPECTED_BELOW = 10
"""It also does if fewer than this many of the subjects with another count than the most frequent one are expected in
the smallest group."""

REFINED_BELOW = 0.25
"""Above this p, an approximation is not refined: such a p is never significant."""

_TOLERANCE = 1e-9
"""Statistics that differ by less than this share are equal: sums over the same subjects in another order."""

Floats = npt.NDArray[np.float64]


class OmnibusComparison(NamedTuple):
    """Difference of each latent between any of several groups; every array has shape `(S,)`."""

    statistic: Floats
    """Kruskal and Wallis' H, corrected for ties; 0 where not tested."""
    effect: Floats
    """Epsilon squared, `H / (P - 1)`: the share of the variance of the ranks that is between the groups, 0 to 1."""
    p_value: Floats
    """P; 1 where not tested."""
    q_value: Floats
    """Benjamini-Hochberg adjusted p over the tested latents; 1 where not tested."""
    tested: npt.NDArray[np.bool_]
    """Whether the latent varies among these subjects and, with a `level`, could reach it."""
    n_varying: int
    """Latents that vary among these subjects, tested or not."""


def compare_all_groups(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    n_groups: int,
    *,
    n_permutations: int = 10_000,
    seed: int = 0,
    level: float | None = None,
) -> OmnibusComparison:
    """Test every latent for a difference between any of several groups of subjects.

    The test is that of Kruskal and Wallis (1952): ranks of all subjects, their sums by group, H corrected for ties. P
    is that of chi squared with `n_groups - 1` degrees of freedom. Where that may be far off (groups of fewer than
    `PERMUTED_BELOW` subjects, or mostly tied counts) and p is below `REFINED_BELOW`, it is the share of assignments of
    the subjects to groups of these sizes whose H is at least as large: of all assignments if there are at most
    `n_permutations`, else of this many random ones, as `(1 + n_extreme) / (1 + n_drawn)` (Phipson & Smyth 2010).

    Args:
        counts: Normalised counts of subjects, finite and not negative, shape `(P, S)`.
        groups: Group of each subject, 0 to `n_groups - 1`, shape `(P,)`.
        n_groups: Groups.
        n_permutations: Largest number of assignments.
        seed: Seed of the random assignments.
        level: Leave out latents that cannot reach this p, whichever subjects were in which group, judged by how many
            differ from the most frequent count (`cytosae.analysis.design.least_p_by_others`). None tests all that vary.

    Returns:
        The comparison, one entry per latent.

    Raises:
        ValueError: If the shapes do not fit, a count is negative or not finite, or there are fewer than two groups or
            a group of fewer than two subjects.
    """
    groups = np.asarray(groups)
    sizes = _check(counts, groups, n_groups, n_permutations)
    n_latents, n = counts.shape[1], len(counts)
    statistic, p_value, q_value = np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    varying = np.flatnonzero(counts.max(axis=0) > counts.min(axis=0))
    bound = least_p_by_others(sizes)
    tested = np.zeros(n_latents, dtype=np.bool_)
    for start in range(0, len(varying), LATENT_BLOCK):
        latents = varying[start : start + LATENT_BLOCK]
        ranks, n_others = rank_and_count_others(counts[:, latents])
        if level is not None:
            able = bound[n_others] <= level * (1 + 1e-9)
            latents, ranks, n_others = latents[able], ranks[:, able], n_others[able]
        tested[latents] = True
        statistic[latents] = _kruskal(ranks, groups, sizes)
        p = chi2.sf(statistic[latents], n_groups - 1)
        sparse = n_others * min(sizes) / n < EXPECTED_BELOW
        doubtful = np.flatnonzero((p < REFINED_BELOW) & (sparse | (min(sizes) < PERMUTED_BELOW)))
        p[doubtful] = _permuted(ranks[:, doubtful], groups, sizes, n_permutations, seed)
        p_value[latents] = p
    if tested.any():
        q_value[tested] = false_discovery_control(p_value[tested], method="bh")
    return OmnibusComparison(statistic, statistic / (n - 1), p_value, q_value, tested, len(varying))


def _check(
    counts: npt.NDArray[np.floating], groups: npt.NDArray[np.integer], n_groups: int, n_permutations: int
) -> list[int]:
    """Sizes of the groups.

    Raises:
        ValueError: As for `compare_all_groups`.
    """
    if counts.ndim != 2 or groups.shape != counts.shape[:1] or groups.dtype.kind not in "iu":
        raise ValueError(
            f"counts must be (P, S) and groups whole numbers of shape (P,), found {counts.shape} and {groups.dtype} of "
            f"shape {groups.shape}"
        )
    if n_groups < 2 or (len(groups) and not 0 <= groups.min() <= groups.max() < n_groups):
        raise ValueError(f"groups must be numbers from 0 to {n_groups - 1} of at least 2 groups")
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, found {n_permutations}")
    sizes: list[int] = np.bincount(groups, minlength=n_groups).tolist()
    if min(sizes) < 2:
        raise ValueError(f"a comparison needs at least 2 subjects in each group, found {', '.join(map(str, sizes))}")
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    return sizes


def rank_and_count_others(counts: npt.NDArray[np.floating]) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Centred midranks of each latent, and how many of its subjects have another count than the most frequent.

    Args:
        counts: Shape `(P, n)`.

    Returns:
        Shapes `(P, n)` and `(n,)`.
    """
    ranks = rankdata(counts, axis=0)
    ordered = np.sort(ranks, axis=0)
    # Equal counts have equal ranks: the longest run of them.
    longest, run = np.ones(ranks.shape[1], dtype=np.int64), np.ones(ranks.shape[1], dtype=np.int64)
    for before, after in itertools.pairwise(ordered):
        run = np.where(before == after, run + 1, 1)
        longest = np.maximum(longest, run)
    return ranks - (len(counts) + 1) / 2, len(counts) - longest


def _between(ranks: Floats, members: Floats, sizes: list[int]) -> Floats:
    """Sum of squares between the groups of centred ranks `(P, S)` for assignments `(n, G, P)`: shape `(n, S)`."""
    sums = np.tensordot(members, ranks, axes=1)
    return np.asarray(np.einsum("agn,g->an", sums**2, 1 / np.array(sizes)))


def _kruskal(ranks: Floats, groups: npt.NDArray[np.integer], sizes: list[int]) -> Floats:
    """H, corrected for ties, of centred midranks: `(P - 1)` times the share of their sum of squares between groups."""
    between = _between(ranks, _one_hot(groups[None], len(sizes)), sizes)[0]
    return np.asarray((len(groups) - 1) * between / np.einsum("pn,pn->n", ranks, ranks))


def _permuted(
    ranks: Floats, groups: npt.NDArray[np.integer], sizes: list[int], n_permutations: int, seed: int
) -> Floats:
    """P of each latent over assignments of the subjects to the groups, shape `(n,)`."""
    n_all = math.factorial(len(groups)) // math.prod(map(math.factorial, sizes))
    complete = n_all <= n_permutations
    observed = _between(ranks, _one_hot(groups[None], len(sizes)), sizes)[0] * (1 - _TOLERANCE)
    n_extreme, n_drawn = np.zeros(ranks.shape[1]), 0
    for drawn in _all_assignments(sizes) if complete else _random_assignments(groups, n_permutations, seed):
        n_extreme += (_between(ranks, _one_hot(drawn, len(sizes)), sizes) >= observed).sum(axis=0)
        n_drawn += len(drawn)
    return n_extreme / n_drawn if complete else (1 + n_extreme) / (1 + n_drawn)


def _one_hot(groups: npt.NDArray[np.integer], n_groups: int) -> Floats:
    """Assignments, shape `(n, P)`, as 1 for the members of each group, shape `(n, G, P)`."""
    return np.asarray(groups[:, None] == np.arange(n_groups)[:, None], dtype=np.float64)


def _all_assignments(sizes: list[int]) -> Iterator[npt.NDArray[np.int64]]:
    """Every assignment of subjects to groups of these sizes, in blocks of shape `(n, P)`."""

    def place(free: tuple[int, ...], group: int) -> Iterator[dict[int, int]]:
        if group == len(sizes) - 1:
            yield dict.fromkeys(free, group)
            return
        for chosen in itertools.combinations(free, sizes[group]):
            left = tuple(item for item in free if item not in chosen)
            for rest in place(left, group + 1):
                yield dict.fromkeys(chosen, group) | rest

    every = place(tuple(range(sum(sizes))), 0)
    while rows := list(itertools.islice(every, PERMUTATION_BLOCK)):
        yield np.array([[row[at] for at in range(sum(sizes))] for row in rows])


def _random_assignments(
    groups: npt.NDArray[np.integer], n_permutations: int, seed: int
) -> Iterator[npt.NDArray[np.integer]]:
    """Random assignments, in blocks of shape `(n, P)`."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_permutations, PERMUTATION_BLOCK):
        n_rows = min(PERMUTATION_BLOCK, n_permutations - start)
        yield rng.permuted(np.tile(groups, (n_rows, 1)), axis=1)
