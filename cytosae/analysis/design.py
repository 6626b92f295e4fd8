"""What a comparison of groups can find at all: from the numbers of subjects, and from the ties of each latent.

A test that compares all assignments of subjects to groups has a smallest possible p. Three against three have 20
assignments, and no difference is larger than that between the three largest and the three smallest counts: no p is
below 0.1. Where most counts are tied at zero it is larger still, and a latent that cannot reach the level of
significance, whatever the groups are, need not be tested: it costs the others power and cannot be found itself (Tarone
1990, for p adjusted by Bonferroni; Gilbert 2005, for the false discovery rate).
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from cytosae.analysis.rank_sums import log_choices

Floats = npt.NDArray[np.float64]

_TOLERANCE = 1e-9
"""Differences of sums below this share of a latent's total are of rounding."""


def least_p(values: npt.NDArray[np.floating], n_first: int) -> Floats:
    """The smallest two-sided p that a latent could have, were the subjects assigned to two groups in another way.

    The statistic is the distance of the first group's sum from its expectation over all assignments. It is largest if
    the first group has the largest or the smallest values; p is the share of assignments in which it is as large, which
    differ from these in which of the equal values at the edge they take.

    Args:
        values: Midranks, for a rank-sum test, or counts, for one of means: shape `(P, n)`.
        n_first: Subjects in the first group, between 1 and P - 1.

    Returns:
        Float64, shape `(n,)`; 1 for a latent that does not vary.
    """
    return least_p_within([values], [n_first], [1.0])


def least_p_within(
    values: Sequence[npt.NDArray[np.floating]], n_first: Sequence[int], weights: Sequence[float]
) -> Floats:
    """The same where subjects are assigned to the groups within strata: of the weighted sum of the strata's statistics.

    In the most extreme assignments the first group has the largest values of every stratum, or the smallest.

    Args:
        values: Of each stratum, shape `(P_h, n)`.
        n_first: Subjects of the first group in each stratum, between 1 and P_h - 1.
        weights: Weight of each stratum's sum, above 0.

    Returns:
        Float64, shape `(n,)`; 1 for a latent that varies in no stratum.
    """
    distances, log_shares, total = np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(1)
    for block, n, weight in zip(values, n_first, weights, strict=True):
        far, log_share, size = _extremes(block, n)
        distances, log_shares, total = distances + weight * far, log_shares + log_share, total + weight * size
    extreme = distances >= distances.max(axis=0) - _TOLERANCE * total
    return np.asarray(np.minimum(np.where(extreme, np.exp(log_shares), 0).sum(axis=0), 1))


def _extremes(values: npt.NDArray[np.floating], n_first: int) -> tuple[Floats, Floats, Floats]:
    """How far the first group's sum is from its expectation if it has the smallest or the largest values.

    Returns:
        The distances, shape `(2, n)`; the logarithm of the share of assignments with each, shape `(2, n)`; and the sum
        of the values' distances from their mean, shape `(n,)`.
    """
    n = len(values)
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=0)
    ordered = ordered - ordered.mean(axis=0)
    total = np.abs(ordered).sum(axis=0)
    distances = np.stack([-ordered[:n_first].sum(axis=0), ordered[n - n_first :].sum(axis=0)])
    log_all, log_shares = log_choices(n, np.array(n_first)), []
    for edge, inside in ((n_first - 1, slice(n_first)), (n - n_first, slice(n - n_first, n))):
        tied = np.abs(ordered - ordered[edge]) <= _TOLERANCE * total
        n_tied, n_taken = tied.sum(axis=0), tied[inside].sum(axis=0)
        log_ways = gammaln(n_tied + 1) - gammaln(n_taken + 1) - gammaln(n_tied - n_taken + 1)
        log_shares.append(log_ways - log_all)
    return distances, np.stack(log_shares), total


def least_p_of_design(n_first: int | Sequence[int], n_second: int | Sequence[int]) -> float:
    """The smallest p of any latent in a comparison of two groups over all assignments: of one without ties.

    Args:
        n_first: Subjects in the first group; in each stratum, where they are assigned within strata.
        n_second: Subjects in the second group, likewise.
    """
    sizes = np.broadcast_arrays(np.atleast_1d(n_first), np.atleast_1d(n_second))
    return min(1.0, 2 / math.prod(math.comb(a + b, a) for a, b in zip(*(s.tolist() for s in sizes), strict=True)))


def least_p_by_others(sizes: Sequence[int]) -> Floats:
    """A bound below the p of a test of several groups, by how many subjects differ from the most frequent count.

    With m such subjects, a test can see no more than which of them are in which group, and every way of dealing them
    out has a probability of at least that of the rarest: no p is smaller.

    Args:
        sizes: Subjects in each group.

    Returns:
        The bound for m = 0 to P, float64, shape `(P + 1,)`.
    """
    total = sum(sizes)
    # k of m subjects can take places in a group of n in n (n - 1) ... (n - k + 1) ways: the least product over all k.
    ways = np.array([0.0])
    for size in sizes:
        more = np.full(len(ways) + size, np.inf)
        for k, log_ways in enumerate(_log_falling(size).tolist()):
            more[k : k + len(ways)] = np.minimum(more[k : k + len(ways)], ways + log_ways)
        ways = more
    return np.exp(ways - _log_falling(total))


def n_needed(least: float, n_tested: int, level: float) -> int:
    """How many latents must have the smallest possible p before any has a q (Benjamini & Hochberg 1995) below a level.

    Args:
        least: The smallest possible p.
        n_tested: Latents tested.
        level: Level of q, above 0.

    Returns:
        At least 1; more than `n_tested` if no number is enough.
    """
    return n_tested + 1 if least >= level else math.floor(least * n_tested / level) + 1


def _log_falling(n: int) -> Floats:
    """Logarithm of n (n - 1) ... (n - m + 1) for m = 0 to n."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(n, 0, -1)))])
