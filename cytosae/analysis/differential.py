"""Differences of latents between two groups of patients: a test, an effect size and a fold change per latent.

A patient is one row of counts, so the tests compare *patients*, not cells: a thousand cells of one patient are one
observation. Latents are processed in blocks, so that memory stays bounded for any width of the autoencoder.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata

from cytosae.analysis.design import least_p, least_p_of_design
from cytosae.analysis.rank_sums import TiedRanks

LATENT_BLOCK = 2048
"""Latents tested together."""

PERMUTATION_BLOCK = 1024
"""Permutations evaluated together."""

EXACT_BELOW = 9
"""Mann-Whitney is exact if a group has fewer patients than this: scipy's rule, applied to ties as well."""

EXPECTED_BELOW = 10
"""With ties, it is also exact if fewer than this many of the patients with another count than the most frequent one are
expected in the smaller group: the rule of thumb for normal approximations of counts."""

REFINED_BELOW = 0.25
"""Above this p, an approximation is not refined: such a p is never significant."""

LARGEST_TABLE = 3e7
"""Largest number of additions for an exact distribution; larger ones are sampled."""

_TOLERANCE = 1e-12
"""Sums over the same patients in another order differ by less than this share of the latent's total."""

Method = Literal["mann-whitney", "permutation"]
Floats = npt.NDArray[np.float64]


class GroupComparison(NamedTuple):
    """Difference of each latent between two groups; every array has shape `(S,)`."""

    mean_first: Floats
    """Mean count of the first group's patients."""
    mean_second: Floats
    """Mean count of the second group's patients."""
    log2_fold_change: Floats
    """`log2((mean_first + c) / (mean_second + c))` with c of `fold_change_pseudocount`."""
    direction: npt.NDArray[np.int8]
    """1 if the first group is higher in what the test compares (ranks or means), -1 if lower, 0 if equal."""
    effect: Floats
    """Rank-biserial correlation, -1 to 1: the share of patient pairs in which the first group's patient has the larger
    count, minus the share in which it has the smaller. Equal to `2 AUC - 1`."""
    p_value: Floats
    """Two-sided p; 1 where not tested."""
    q_value: Floats
    """Benjamini-Hochberg adjusted p over the tested latents; 1 where not tested."""
    tested: npt.NDArray[np.bool_]
    """Whether the latent varies among these patients and, with a `level`, could reach it."""
    n_varying: int = 0
    """Latents that vary among these patients, tested or not."""


def compare_groups(
    counts: npt.NDArray[np.floating],
    in_first: npt.NDArray[np.bool_],
    *,
    method: Method = "mann-whitney",
    n_permutations: int = 10_000,
    seed: int = 0,
    level: float | None = None,
) -> GroupComparison:
    """Test every latent for a difference between two groups of patients.

    `mann-whitney` compares ranks (Mann & Whitney 1947) with the normal approximation, corrected for ties and
    continuity. Where that may be far off, it uses the exact distribution of the smaller group's rank sum over all
    assignments of these patients, ties included (Streitberg & Roehmel 1986): if a group has at most 8 patients, or if
    few patients differ from the most frequent count. Then most are tied at zero, and one of three patients against
    sixty zeros is not a finding, although the approximation gives p = 1e-5. If the exact distribution would take too
    long, it is sampled with `n_permutations` random assignments, as in `permutation`.

    `permutation` compares means. The statistic is `|mean_first - mean_second|`, and p is the share of assignments of
    the patients to two groups of these sizes in which it is at least as large as observed. All assignments are used if
    there are at most `n_permutations`; otherwise this many are drawn at random, and p is
    `(1 + n_extreme) / (1 + n_drawn)` (Phipson & Smyth 2010). All latents use the same draws. No p can be below
    `1 / (1 + n_permutations)`, which after the adjustment for thousands of latents may be too coarse to find a single
    latent.

    Args:
        counts: Normalised counts of patients, finite and not negative, shape `(P, S)`.
        in_first: True for the first group's patients, False for the second's, shape `(P,)`.
        method: The test.
        n_permutations: Largest number of assignments.
        seed: Seed of the random assignments.
        level: Leave out latents that cannot reach this p, whichever patients were in which group
            (`cytosae.analysis.design.least_p`), so that they do not count among the tests that q is adjusted for
            (Tarone 1990, Gilbert 2005). It looks at the counts of all patients together and never at the groups, so a
            p of what is left means what it did. Without latents that could reach it, the one that the best latent
            could reach takes its place. None tests all that vary.

    Returns:
        The comparison, one entry per latent.

    Raises:
        ValueError: If the shapes do not fit, a count is negative or not finite, a group has fewer than two patients, or
            the method is unknown.
    """
    first = _check(counts, in_first)
    if method not in ("mann-whitney", "permutation"):
        raise ValueError(f"method must be 'mann-whitney' or 'permutation', found {method!r}")
    if n_permutations < 1:
        raise ValueError(f"n_permutations must be at least 1, found {n_permutations}")
    tested = np.asarray(counts.max(axis=0) > counts.min(axis=0))
    n_varying = int(tested.sum())
    if level is not None:
        tested = _can_reach(level, counts, np.flatnonzero(tested), first, method)
    effect, p_value, q_value = _test(counts, np.flatnonzero(tested), first, method, n_permutations, seed)
    mean_first = counts[first].mean(axis=0, dtype=np.float64)
    mean_second = counts[~first].mean(axis=0, dtype=np.float64)
    extra = fold_change_pseudocount(counts)
    fold = np.log2(mean_first + extra) - np.log2(mean_second + extra)
    direction = np.sign(effect if method == "mann-whitney" else mean_first - mean_second).astype(np.int8)
    return GroupComparison(mean_first, mean_second, fold, direction, effect, p_value, q_value, tested, n_varying)


def _can_reach(
    level: float,
    counts: npt.NDArray[np.floating],
    varying: npt.NDArray[np.int64],
    first: npt.NDArray[np.bool_],
    method: Method,
) -> npt.NDArray[np.bool_]:
    """Which latents could have a p of at most the level, or of the best that any of them could have; shape `(S,)`."""
    least, n_first = np.ones(len(varying)), int(first.sum())
    for start in range(0, len(varying), LATENT_BLOCK):
        block = np.asarray(counts[:, varying[start : start + LATENT_BLOCK]], dtype=np.float64)
        values = rankdata(block, axis=0) if method == "mann-whitney" else block
        least[start : start + LATENT_BLOCK] = least_p(values, n_first)
    # Sums of logarithms of factorials are off in the last digits.
    bound = max(level, least.min(initial=1.0)) * (1 + 1e-9)
    reached = np.zeros(counts.shape[1], dtype=np.bool_)
    reached[varying[least <= bound]] = True
    return reached


def _test(
    counts: npt.NDArray[np.floating],
    varying: npt.NDArray[np.int64],
    first: npt.NDArray[np.bool_],
    method: Method,
    n_permutations: int,
    seed: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Effect, p and adjusted p of every latent, each of shape `(S,)`; those that do not vary have 0, 1 and 1."""
    n_latents = counts.shape[1]
    effect, p_value, q_value = np.zeros(n_latents), np.ones(n_latents), np.ones(n_latents)
    for latents in _blocks(varying):
        block = np.asarray(counts[:, latents], dtype=np.float64)
        effect[latents] = rank_biserial(block, first)
        if method == "mann-whitney":
            p_value[latents] = _mann_whitney(block, first, n_permutations, seed)
    if method == "permutation":
        p_value[varying] = _permutation(counts, varying, first, n_permutations, seed)
    if len(varying):
        q_value[varying] = false_discovery_control(p_value[varying], method="bh")
    return effect, p_value, q_value


def fold_change_pseudocount(counts: npt.NDArray[np.floating]) -> float:
    """The number added to both means of a fold change: half the smallest positive count in the table.

    Half of the detection limit is the usual substitute for "not observed". It scales with the counts, so fold changes
    are the same for counts normalised by images, by tokens or not at all.

    Args:
        counts: Counts of all compared patients, shape `(P, S)`.

    Returns:
        The pseudocount, in the unit of the counts; 1 if no count is positive.
    """
    positive = counts[counts > 0]
    return float(positive.min()) / 2 if len(positive) else 1.0


def adjust_together(comparisons: Sequence[GroupComparison]) -> list[Floats]:
    """Benjamini-Hochberg adjusted p over the tested latents of several comparisons together.

    A q within one comparison bounds the share of false findings in it. To pick the most striking latent of many
    comparisons, use this one.

    Args:
        comparisons: Comparisons of the same S latents.

    Returns:
        One array for each, float64, shape `(S,)`; 1 where not tested.
    """
    adjusted = [np.ones(len(found.p_value)) for found in comparisons]
    values = [found.p_value[found.tested] for found in comparisons]
    if sum(map(len, values)):
        together = np.split(
            false_discovery_control(np.concatenate(values), method="bh"), np.cumsum([len(part) for part in values])[:-1]
        )
        for array, found, part in zip(adjusted, comparisons, together, strict=True):
            array[found.tested] = part
    return adjusted


def least_p_of(n_first: int, n_second: int, method: Method, *, n_permutations: int = 10_000) -> float:
    """The smallest p that `compare_groups` can give any latent.

    Args:
        n_first: Subjects in the first group.
        n_second: Subjects in the second group.
        method: The test.
        n_permutations: Largest number of assignments.
    """
    n_assignments = math.comb(n_first + n_second, n_first)
    if method == "permutation":
        least = (1 + (n_first == n_second)) / n_assignments
        return min(1.0, least) if n_assignments <= n_permutations else 1 / (1 + n_permutations)
    smaller, n = min(n_first, n_second), n_first + n_second
    if smaller < EXACT_BELOW or (n - 1) * smaller / n < EXPECTED_BELOW:
        return least_p_of_design(n_first, n_second)
    ranks = np.arange(n, dtype=np.float64)
    return float(mannwhitneyu(ranks[:n_first], ranks[n_first:], method="asymptotic").pvalue)


def largest_differences(comparison: GroupComparison, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The latents that differ most, by direction.

    Args:
        comparison: Comparison of two groups.
        n: Largest number of latents per direction.

    Returns:
        Indices of the latents higher in the first group and of those higher in the second, by `direction`, int64, each
        of shape `(at most n,)`, ordered by ascending q value, then descending |effect|, then index.
    """
    order = np.lexsort((-np.abs(comparison.effect), comparison.q_value)).astype(np.int64)
    direction = comparison.direction[order]
    return order[direction > 0][:n], order[direction < 0][:n]


def rank_biserial(counts: npt.NDArray[np.floating], in_first: npt.NDArray[np.bool_]) -> Floats:
    """Rank-biserial correlation of each latent with being in the first group (Cureton 1956), ties counted half.

    Args:
        counts: Shape `(P, S)`.
        in_first: True for the first group, shape `(P,)`.

    Returns:
        `2 U / (n_first n_second) - 1` with Mann and Whitney's U, float64, shape `(S,)`.
    """
    n_first, n_second = int(in_first.sum()), int((~in_first).sum())
    u = rankdata(counts, axis=0)[in_first].sum(axis=0) - n_first * (n_first + 1) / 2
    return np.asarray(2 * u / (n_first * n_second) - 1)


def _check(counts: npt.NDArray[np.floating], in_first: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The first group as a checked mask.

    Raises:
        ValueError: As for `compare_groups`.
    """
    first = np.asarray(in_first)
    if counts.ndim != 2 or first.shape != counts.shape[:1] or first.dtype != np.bool_:
        raise ValueError(
            f"counts must be (P, S) and in_first bool of shape (P,), found {counts.shape} and {first.dtype} of shape "
            f"{first.shape}"
        )
    sizes = int(first.sum()), int((~first).sum())
    if min(sizes) < 2:
        raise ValueError(
            f"a comparison needs at least 2 patients in each group, found {sizes[0]} in the first and {sizes[1]} in "
            "the second"
        )
    if counts.size and not (counts.min() >= 0 and counts.max() < np.inf):
        raise ValueError("counts must be finite and not negative")
    return first


def _blocks(latents: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
    """The latents in blocks of at most `LATENT_BLOCK`."""
    for start in range(0, len(latents), LATENT_BLOCK):
        yield latents[start : start + LATENT_BLOCK]


def _mann_whitney(block: Floats, first: npt.NDArray[np.bool_], n_permutations: int, seed: int) -> Floats:
    """Two-sided p of each latent, shape `(n,)`; every latent must vary."""
    small = min(first.sum(), (~first).sum()) < EXACT_BELOW
    distinct = np.zeros(block.shape[1], dtype=np.bool_)
    if small:
        distinct[:] = (np.diff(np.sort(block, axis=0), axis=0) > 0).all(axis=0)
    p_value = np.ones(block.shape[1])
    for which, how in ((distinct, "exact"), (~distinct, "asymptotic")):
        if which.any():
            chosen = block[:, which]
            p_value[which] = mannwhitneyu(chosen[first], chosen[~first], axis=0, method=how).pvalue
    doubtful = np.flatnonzero(~distinct & (p_value < REFINED_BELOW))
    ranks = rankdata(block[:, doubtful], axis=0)
    sampled = []
    for column, latent in enumerate(doubtful.tolist()):
        ties = TiedRanks.of(ranks[:, column], first)
        if not (small or ties.n_expected < EXPECTED_BELOW):
            continue
        if ties.n_additions <= LARGEST_TABLE:
            p_value[latent] = ties.p_value()
        else:
            sampled.append(column)
    if sampled:
        latents = np.arange(len(sampled))
        p_value[doubtful[sampled]] = _permutation(ranks[:, sampled], latents, first, n_permutations, seed)
    return p_value


def _permutation(
    counts: npt.NDArray[np.floating],
    latents: npt.NDArray[np.int64],
    first: npt.NDArray[np.bool_],
    n_permutations: int,
    seed: int,
) -> Floats:
    """Two-sided p of the difference of means of some latents, shape `(n,)`.

    For centred latents, the difference of means is the first group's sum times a constant for every assignment, so a
    block of assignments is one matrix product.
    """
    n_all = math.comb(len(first), int(first.sum()))
    complete = n_all <= n_permutations
    n_drawn = n_all if complete else n_permutations
    n_extreme = np.zeros(len(latents), dtype=np.int64)
    for members in _all_assignments(first) if complete else _random_assignments(first, n_drawn, seed):
        for start in range(0, len(latents), LATENT_BLOCK):
            chosen = slice(start, start + LATENT_BLOCK)
            block = np.asarray(counts[:, latents[chosen]], dtype=np.float64)
            slack = _TOLERANCE * block.sum(axis=0)
            block -= block.mean(axis=0)
            observed = np.abs(block[first].sum(axis=0)) - slack
            n_extreme[chosen] += (np.abs(members @ block) >= observed).sum(axis=0)
    return n_extreme / n_drawn if complete else (1 + n_extreme) / (1 + n_drawn)


def _all_assignments(first: npt.NDArray[np.bool_]) -> Iterator[Floats]:
    """Every choice of the first group, 1 for its members, in blocks of shape `(n, P)`."""
    chosen = itertools.combinations(range(len(first)), int(first.sum()))
    while rows := list(itertools.islice(chosen, PERMUTATION_BLOCK)):
        members = np.zeros((len(rows), len(first)))
        np.put_along_axis(members, np.array(rows), 1.0, axis=1)
        yield members


def _random_assignments(first: npt.NDArray[np.bool_], n_permutations: int, seed: int) -> Iterator[Floats]:
    """Random choices of the first group, 1 for its members, in blocks of shape `(n, P)`."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_permutations, PERMUTATION_BLOCK):
        n_rows = min(PERMUTATION_BLOCK, n_permutations - start)
        yield rng.permuted(np.tile(first.astype(np.float64), (n_rows, 1)), axis=1)
