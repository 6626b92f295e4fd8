"""Two groups of patients compared, latent by latent: there are tens of thousands of latents and few patients."""

import itertools
import math
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

Method = Literal["mann-whitney", "permutation"]

_LATENTS_AT_ONCE = 2048
_PERMUTATIONS_AT_ONCE = 256
_EXACT_UP_TO = 8
"""Patients of the smaller group up to whom the exact distribution of ranks is used, where there are no ties."""

_ROUNDING = 1e-9
"""Relative slack within which two differences of means count as equal: sums in another order differ by rounding."""


class GroupComparison(NamedTuple):
    """Every latent compared between two groups of patients; arrays of shape `(S,)`."""

    mean_first: npt.NDArray[np.float64]
    """Mean count of the first group."""
    mean_second: npt.NDArray[np.float64]
    """Mean count of the second group."""
    log2_fold_change: npt.NDArray[np.float64]
    """`log2((mean_first + c) / (mean_second + c))`; c is 1 % of the mean of all positive counts."""
    effect: npt.NDArray[np.float64]
    """Rank-biserial correlation `2 U / (n1 n2) - 1` (Wendt 1972): 1 if all of the first group are above all of the
    second, -1 the other way round, ties count half."""
    p_value: npt.NDArray[np.float64]
    """Two-sided; 1 where not tested."""
    q_value: npt.NDArray[np.float64]
    """Benjamini-Hochberg adjusted (1995) over the tested latents; 1 where not tested."""
    tested: npt.NDArray[np.bool_]
    """Whether the latent varies among these patients at all."""


def compare_groups(
    counts: npt.NDArray[np.floating],
    in_first: npt.NDArray[np.bool_],
    *,
    method: Method = "mann-whitney",
    n_permutations: int = 10_000,
    seed: int = 0,
) -> GroupComparison:
    """Compare two groups of patients in every latent.

    `mann-whitney` is the rank-sum test: exact for latents without ties if the smaller group has at most 8 patients,
    else the normal approximation with tie correction and continuity. `permutation` tests the difference of means: all
    assignments if there are at most `n_permutations`, else random ones, where `p = (b + 1) / (n + 1)` (Phipson & Smyth
    2010).

    Args:
        counts: Normalised counts of each patient, at least 0, shape `(P, S)`.
        in_first: Whether each patient is of the first group, shape `(P,)`; the others are of the second.
        method: The test.
        n_permutations: Assignments looked at by `permutation`, the observed one aside.
        seed: Of random assignments.

    Raises:
        ValueError: If the shapes do not fit, a group has fewer than two patients, or the method is unknown.
    """
    wide: npt.NDArray[np.float64] = np.asarray(counts, dtype=np.float64)
    if wide.ndim != 2 or in_first.shape != wide.shape[:1]:
        raise ValueError(f"need counts (P, S) and in_first (P,), found {wide.shape} and {in_first.shape}")
    n_first, n_second = int(in_first.sum()), int((~in_first).sum())
    if min(n_first, n_second) < 2:
        raise ValueError(f"each group needs two patients, found {n_first} and {n_second}")
    if method not in ("mann-whitney", "permutation"):
        raise ValueError(f"method must be mann-whitney or permutation, found {method!r}")
    tested = wide.min(axis=0) < wide.max(axis=0)
    effect, p_value = np.zeros(wide.shape[1]), np.ones(wide.shape[1])
    latents = np.flatnonzero(tested)
    for start in range(0, len(latents), _LATENTS_AT_ONCE):
        part = latents[start : start + _LATENTS_AT_ONCE]
        values = wide[:, part]
        effect[part], by_rank = _rank_test(values[in_first], values[~in_first])
        permuted = method == "permutation"
        p_value[part] = _permutation_test(values, in_first, n_permutations, seed) if permuted else by_rank
    q_value = np.ones(len(tested))
    if len(latents):
        q_value[tested] = stats.false_discovery_control(p_value[tested])
    means = wide[in_first].mean(axis=0), wide[~in_first].mean(axis=0)
    positive = wide[wide > 0]
    pseudocount = 0.01 * positive.mean() if positive.size else 1.0
    fold = np.log2((means[0] + pseudocount) / (means[1] + pseudocount))
    return GroupComparison(*means, fold, effect, p_value, q_value, tested)


def largest_differences(comparison: GroupComparison, n: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Tested latents that differ most each way: by p, then size of the effect, then number.

    Args:
        comparison: A comparison.
        n: Latents wanted on each side.

    Returns:
        Latents with more in the first group, and with more in the second, int64, most different first.
    """
    latents = np.arange(len(comparison.tested))
    order = np.lexsort((latents, -np.abs(comparison.effect), comparison.p_value))
    order = order[comparison.tested[order]]
    effect = comparison.effect[order]
    return order[effect > 0][:n], order[effect < 0][:n]


def _rank_test(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rank-biserial correlation and two-sided p of each column."""
    both = np.sort(np.concatenate([first, second]), axis=0)
    tied = (both[1:] == both[:-1]).any(axis=0)
    found = stats.mannwhitneyu(first, second, axis=0, method="asymptotic")
    p_value = np.array(found.pvalue)
    if min(len(first), len(second)) <= _EXACT_UP_TO and not tied.all():
        exact = stats.mannwhitneyu(first[:, ~tied], second[:, ~tied], axis=0, method="exact")
        p_value[~tied] = exact.pvalue
    return 2 * found.statistic / (len(first) * len(second)) - 1, np.clip(p_value, 0, 1)


def _permutation_test(
    values: npt.NDArray[np.float64], in_first: npt.NDArray[np.bool_], n_permutations: int, seed: int
) -> npt.NDArray[np.float64]:
    """Two-sided p of the difference of means of each column."""
    n_first, n_all = int(in_first.sum()), len(in_first)
    # With everything fixed but the assignment, the difference of means moves with the first group's sum alone.
    centre = values.mean(axis=0) * n_first
    observed = np.abs(values[in_first].sum(axis=0) - centre)
    least = observed - _ROUNDING * np.maximum(np.abs(centre), observed)
    n_extreme = np.zeros(values.shape[1], dtype=np.int64)
    n_exact = math.comb(n_all, n_first)
    exact = n_exact <= n_permutations
    if exact:
        chosen = itertools.combinations(range(n_all), n_first)
        batches = iter(lambda: list(itertools.islice(chosen, _PERMUTATIONS_AT_ONCE)), [])
        masks = (_masks(np.array(batch), n_all) for batch in batches)
    else:
        rng = np.random.default_rng(seed)
        sizes = [_PERMUTATIONS_AT_ONCE] * (n_permutations // _PERMUTATIONS_AT_ONCE)
        sizes += [n_permutations % _PERMUTATIONS_AT_ONCE]
        masks = (_masks(rng.random((size, n_all)).argsort(axis=1)[:, :n_first], n_all) for size in sizes if size)
    for mask in masks:
        n_extreme += (np.abs(mask @ values - centre) >= least).sum(axis=0)
    return n_extreme / n_exact if exact else (n_extreme + 1) / (n_permutations + 1)


def _masks(chosen: npt.NDArray[np.int64], n_all: int) -> npt.NDArray[np.float64]:
    """One row of zeros and ones for each choice of patients."""
    masks = np.zeros((len(chosen), n_all))
    masks[np.arange(len(chosen))[:, None], chosen] = 1
    return masks
