"""How far a classification of groups may be believed: an interval of its accuracy, and whether probabilities hold."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import beta

_N_CELLS = 2048
"""Cells of the grid on which distributions of accuracies are convolved."""


class Calibration(NamedTuple):
    """Predicted probabilities beside what came true; arrays have one entry per bin."""

    predicted: npt.NDArray[np.float64]
    """Mean probability of the predicted group."""
    right: npt.NDArray[np.float64]
    """Share of the subjects whose group was predicted."""
    n_subjects: npt.NDArray[np.int64]
    """Subjects."""
    brier: float
    """Mean over the subjects of the squared distance between probabilities and truth, 0 to 2 (Brier 1950)."""


def calibrate(
    probability: npt.NDArray[np.floating], groups: npt.NDArray[np.integer], *, n_bins: int = 5, n_least: int = 5
) -> Calibration:
    """Compare predicted probabilities with what came true.

    Subjects are ordered by the probability of the group predicted for them and dealt into bins of equal numbers.

    Args:
        probability: Probability of each group for each subject, from a model that did not see it, shape `(P, G)`.
        groups: True group of each, shape `(P,)`.
        n_bins: Largest number of bins.
        n_least: Least number of subjects of a bin, as far as there are so many.

    Raises:
        ValueError: If the shapes do not fit, or there are no subjects.
    """
    probability, groups = np.asarray(probability, dtype=np.float64), np.asarray(groups)
    if probability.ndim != 2 or groups.shape != probability.shape[:1] or not len(groups):
        raise ValueError(f"probability must be (P, G) and groups (P,), found {probability.shape} and {groups.shape}")
    truth = (groups[:, None] == np.arange(probability.shape[1])).astype(np.float64)
    order = np.argsort(probability.max(axis=1), kind="stable")
    right = probability.argmax(axis=1) == groups
    bins = np.array_split(order, max(1, min(n_bins, len(groups) // n_least)))
    return Calibration(
        np.array([probability[rows].max(axis=1).mean() for rows in bins]),
        np.array([right[rows].mean() for rows in bins]),
        np.array([len(rows) for rows in bins]),
        float(((probability - truth) ** 2).sum(axis=1).mean()),
    )


def balanced_accuracy_interval(confusion: npt.NDArray[np.integer], level: float = 0.95) -> tuple[float, float]:
    """A credible interval of the balanced accuracy, by the number of subjects of each group (Brodersen et al. 2010).

    With a flat prior, the accuracy in a group of which k of n are right has the distribution Beta(k + 1, n - k + 1),
    and the balanced accuracy is the mean of the groups' independent accuracies. Their distributions are convolved on a
    grid. The subjects' predictions come from models that share training subjects, which the interval does not know.

    Args:
        confusion: Subjects by true and predicted group, shape `(G, G)`.
        level: Mass in the interval; as much is left out below as above.
    """
    edges = np.linspace(0, 1, _N_CELLS + 1)
    mass, right = np.ones(1), np.diag(confusion)
    for k, n in zip(right.tolist(), confusion.sum(axis=1).tolist(), strict=True):
        mass = np.convolve(mass, np.diff(beta.cdf(edges, k + 1, n - k + 1)))
    n_groups = len(right)
    centres = (np.arange(len(mass)) + n_groups / 2) / (_N_CELLS * n_groups)
    low, high = np.interp([(1 - level) / 2, (1 + level) / 2], np.cumsum(mass) - mass / 2, centres)
    return float(low), float(high)
