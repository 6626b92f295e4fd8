"""Subjects in strata, such as sites: which can be compared with which, and their ranks among their own."""

from collections.abc import Iterator
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

LATENT_BLOCK = 2048
"""Latents tested together."""

PERMUTATION_BLOCK = 256
"""Permutations evaluated together."""

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class NoOverlapError(ValueError):
    """No stratum has subjects of two groups."""


class Strata(NamedTuple):
    """The strata that compare something: those with subjects of at least two groups."""

    rows: tuple[Ints, ...]
    """Subjects of each stratum."""
    weights: Floats
    """Weight of each stratum's rank sums, `1 / (P_h + 1)` (van Elteren 1960), shape `(H,)`."""

    @classmethod
    def of(cls, groups: npt.NDArray[np.integer], strata: npt.NDArray[np.integer]) -> Self:
        """The strata of subjects.

        Args:
            groups: Group of each subject, shape `(P,)`; -1 leaves a subject out.
            strata: Stratum of each subject, shape `(P,)`; -1 where it is unknown, which leaves the subject out.

        Raises:
            NoOverlapError: If no stratum has two groups.
            ValueError: If the shapes do not fit.
        """
        groups, strata = np.asarray(groups), np.asarray(strata)
        if groups.ndim != 1 or groups.shape != strata.shape:
            raise ValueError(f"groups and strata must be (P,), found {groups.shape} and {strata.shape}")
        known = (groups >= 0) & (strata >= 0)
        every = (np.flatnonzero(known & (strata == stratum)) for stratum in np.unique(strata[known]))
        rows = tuple(here for here in every if len(set(groups[here].tolist())) > 1)
        if not rows:
            raise NoOverlapError("no stratum has subjects of two groups: within strata there is nothing to compare")
        return cls(rows, np.array([1 / (len(here) + 1) for here in rows]))

    @property
    def used(self) -> Ints:
        """All subjects of these strata, stratum by stratum."""
        return np.concatenate(self.rows)


def iter_blocks(latents: Ints) -> Iterator[Ints]:
    """Latents in blocks.

    Args:
        latents: Their indices.
    """
    for start in range(0, len(latents), LATENT_BLOCK):
        yield latents[start : start + LATENT_BLOCK]


def varies_within(counts: npt.NDArray[np.floating], plan: Strata) -> npt.NDArray[np.bool_]:
    """Which latents vary within a stratum, shape `(S,)`."""
    return np.asarray(np.any([counts[rows].max(axis=0) > counts[rows].min(axis=0) for rows in plan.rows], axis=0))


def rank_within(block: Floats, plan: Strata) -> Floats:
    """Midranks within each stratum, less their mean; 0 for subjects of no stratum; shape `(P, n)`."""
    ranks = np.zeros_like(block)
    for rows in plan.rows:
        ranks[rows] = rankdata(block[rows], axis=0) - (len(rows) + 1) / 2
    return ranks


def row_weights(plan: Strata, n: int) -> Floats:
    """Weight of each subject's rank, shape `(n,)`; 0 for subjects of no stratum."""
    weights = np.zeros(n)
    for rows, weight in zip(plan.rows, plan.weights.tolist(), strict=True):
        weights[rows] = weight
    return weights


def iter_shuffled(
    groups: npt.NDArray[np.integer], plan: Strata, n_permutations: int, seed: int
) -> Iterator[npt.NDArray[np.integer]]:
    """Random assignments within the strata, in blocks of shape `(n, P)`."""
    rng = np.random.default_rng(seed)
    for start in range(0, n_permutations, PERMUTATION_BLOCK):
        drawn = np.tile(groups, (min(PERMUTATION_BLOCK, n_permutations - start), 1))
        for rows in plan.rows:
            drawn[:, rows] = rng.permuted(drawn[:, rows], axis=1)
        yield drawn
