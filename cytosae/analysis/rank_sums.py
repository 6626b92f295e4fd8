"""The exact distribution of a rank sum, ties included (Streitberg & Roehmel 1986)."""

from functools import lru_cache
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

Floats = npt.NDArray[np.float64]


class TiedRanks(NamedTuple):
    """One latent's midranks as integers: twice their distance from the midrank of the most frequent count."""

    offsets: tuple[int, ...]
    """Those of the patients with other counts, ascending, shape `(m,)`."""
    n_patients: int
    """Number of patients P."""
    n_chosen: int
    """Number of patients in the group whose sum is observed: the smaller, unless another is chosen."""
    observed: int
    """Sum of its offsets."""

    @classmethod
    def of(cls, ranks: Floats, first: npt.NDArray[np.bool_]) -> Self:
        """From one latent's midranks, shape `(P,)`."""
        return cls.of_group(ranks, first if 2 * first.sum() <= len(first) else ~first)

    @classmethod
    def of_group(cls, ranks: Floats, chosen: npt.NDArray[np.bool_]) -> Self:
        """The same with this group as the one whose sum is observed, whichever is smaller."""
        values, counts = np.unique(ranks, return_counts=True)
        offsets = np.rint(2 * (ranks - values[counts.argmax()])).astype(np.int64)
        others = tuple(np.sort(offsets[offsets != 0]).tolist())
        return cls(others, len(ranks), int(chosen.sum()), int(offsets[chosen].sum()))

    @property
    def n_expected(self) -> float:
        """Expected number of patients with other counts in the smaller group."""
        return len(self.offsets) * self.n_chosen / self.n_patients

    @property
    def n_additions(self) -> float:
        """Number of additions for the exact distribution."""
        low, high = _sum_range(self.offsets, self.n_chosen)
        return len(self.offsets) * min(self.n_chosen, len(self.offsets)) * float(high - low + 1)

    def distribution(self) -> tuple[Floats, int]:
        """Probability of each sum of the chosen group's offsets, and the smallest sum."""
        return _sum_distribution(self.offsets, self.n_patients, self.n_chosen)

    def p_value(self) -> float:
        """Share of all assignments in which the sum is at least as far from its expectation as observed."""
        shares, low = self.distribution()
        # Multiplied by P, so that all numbers are integers.
        expected = self.n_chosen * sum(self.offsets)
        distance = np.abs(self.n_patients * (low + np.arange(len(shares))) - expected)
        return min(1.0, float(shares[distance >= abs(self.n_patients * self.observed - expected)].sum()))


def _sum_range(offsets: tuple[int, ...], n_chosen: int) -> tuple[int, int]:
    """The smallest and largest sum of at most `n_chosen` of some ascending offsets."""
    low = sum(offset for offset in offsets[:n_chosen] if offset < 0)
    return low, sum(offset for offset in offsets[-n_chosen:] if offset > 0)


@lru_cache(maxsize=256)
def _sum_distribution(offsets: tuple[int, ...], n_patients: int, n_chosen: int) -> tuple[Floats, int]:
    """Probability of each sum of `n_chosen` patients' offsets, drawn without replacement, and the smallest sum.

    The shift algorithm of Streitberg and Roehmel: row k of a table counts the choices of k of the m patients whose
    offset is not 0, by their sum, patient after patient; the others of the group are drawn from those with offset 0.
    """
    low, high = _sum_range(offsets, n_chosen)
    k = np.arange(min(n_chosen, len(offsets)) + 1)
    table = np.zeros((len(k), high - low + 1))
    table[0, -low] = 1
    for offset in offsets:
        if offset > 0:
            table[1:, offset:] += table[:-1, :-offset]
        else:
            table[1:, :offset] += table[:-1, -offset:]
    n_zero = n_patients - len(offsets)
    possible = k[(n_chosen - k >= 0) & (n_chosen - k <= n_zero)]
    weights = np.exp(log_choices(n_zero, n_chosen - possible) - log_choices(n_patients, np.array(n_chosen)))
    return np.asarray(weights @ table[possible]), low


def log_choices(n: int, k: npt.NDArray[np.integer]) -> Floats:
    """Logarithm of the number of ways to choose k of n."""
    return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))
