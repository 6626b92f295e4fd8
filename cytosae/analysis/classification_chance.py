"""What a classification of groups reaches by chance: the same cross-validation of shuffled groups."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.classification import (
    DEFAULT_SETTING,
    N_INNER_FOLDS,
    SETTINGS,
    Setting,
    split_folds,
    variance_share,
)
from cytosae.analysis.logistic import fit_logistic

Floats = npt.NDArray[np.float64]


class Chance(NamedTuple):
    """Balanced accuracies of shuffled groups."""

    balanced_accuracy: Floats
    """Of each shuffle, shape `(n,)`; those that could not be split are left out."""

    def p_value(self, observed: float) -> float:
        """Share of the shuffles, the observation among them, that reach an observed balanced accuracy.

        Args:
            observed: That of the groups as they are.
        """
        n_extreme = int((self.balanced_accuracy >= observed - 1e-9).sum())
        return (1 + n_extreme) / (1 + len(self.balanced_accuracy))

    def spread(self, level: float = 0.95) -> tuple[float, float]:
        """The range in which the middle `level` of the shuffles lies.

        Args:
            level: Between 0 and 1.
        """
        low, high = np.quantile(self.balanced_accuracy, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def shuffle_groups(
    counts: npt.NDArray[np.floating],
    groups: npt.NDArray[np.integer],
    *,
    n_folds: int = 5,
    seed: int = 0,
    n_shuffles: int = 100,
    advance: Callable[[], object] = lambda: None,
) -> Chance:
    """Classify shuffled groups as `cytosae.analysis.classification.classify_groups` does the true ones.

    Everything is done again for every shuffle: splitting, choosing settings and latents, and fitting, by the same rules
    and with the same candidates. The model is fitted by `cytosae.analysis.logistic`, which is faster than
    scikit-learn's on so few rows and finds the same minimum.

    Args:
        counts: Normalised counts, one row per subject, shape `(P, S)`.
        groups: Group of each, 0 to G - 1, shape `(P,)`; at least two of each group.
        n_folds: Outer folds, as for `classify_groups`.
        seed: Seed of the shuffles and folds.
        n_shuffles: How many.
        advance: Called after each.

    Raises:
        ValueError: If the shapes do not fit, or there are no shuffles.
    """
    groups = np.asarray(groups)
    if counts.ndim != 2 or groups.shape != counts.shape[:1] or n_shuffles < 1:
        raise ValueError(
            f"counts must be (P, S), groups (P,) and n_shuffles at least 1, found {counts.shape}, {groups.shape} and "
            f"{n_shuffles}"
        )
    features = np.log1p(np.asarray(counts, dtype=np.float64))
    rng, found = np.random.default_rng(seed), []
    for _ in range(n_shuffles):
        accuracy = cross_validate(features, rng.permutation(groups), n_folds=n_folds, seed=seed)
        if accuracy is not None:
            found.append(accuracy)
        advance()
    return Chance(np.array(found))


def cross_validate(
    features: Floats, groups: npt.NDArray[np.integer], *, n_folds: int = 5, seed: int = 0
) -> float | None:
    """Balanced accuracy of the nested cross-validation of `classify_groups`; None if it cannot be split.

    Args:
        features: Logarithms of counts, shape `(P, S)`.
        groups: Group of each row, 0 to G - 1, shape `(P,)`.
        n_folds: Outer folds.
        seed: Seed of the folds.
    """
    splits = split_folds(groups, np.arange(len(groups)), n_folds, seed)
    if splits is None:
        return None
    predicted = np.empty(len(groups), dtype=np.int64)
    for train, test in splits:
        inner = split_folds(groups[train], train, N_INNER_FOLDS, seed)
        if inner is None:
            setting = DEFAULT_SETTING
        else:
            scores = np.mean([_score_settings(features[train], groups[train], *split) for split in inner], axis=0)
            # The first of equally good ones.
            setting = SETTINGS[int(np.argmax(np.round(scores, 12)))]
        (predicted[test],) = _predict(features[train], groups[train], features[test], [setting])
    return _balanced(groups, predicted)


def _score_settings(
    features: Floats, groups: npt.NDArray[np.integer], train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]
) -> list[float]:
    """Balanced accuracy of each candidate."""
    found = _predict(features[train], groups[train], features[test], SETTINGS)
    return [_balanced(groups[test], predicted) for predicted in found]


def _predict(
    features: Floats, groups: npt.NDArray[np.integer], new: Floats, settings: Sequence[Setting]
) -> list[npt.NDArray[np.int64]]:
    """Groups that models with some settings predict for new rows."""
    share = variance_share(features, groups)
    order = np.argsort(share, kind="mergesort")
    names, numbers = np.unique(groups, return_inverse=True)
    predicted = []
    for n_latents, c in settings:
        chosen = order[-min(n_latents, len(order)) :]
        columns = features[:, chosen]
        mean, spread = columns.mean(axis=0), columns.std(axis=0)
        spread = np.where(spread > 10 * np.finfo(np.float64).eps, spread, 1.0)
        coefficients, intercepts = fit_logistic((columns - mean) / spread, numbers, len(names), c)
        logits = (new[:, chosen] - mean) / spread @ coefficients + intercepts
        predicted.append(names[np.argmax(logits, axis=1)])
    return predicted


def _balanced(groups: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> float:
    """Mean over the groups that are there of the share predicted correctly."""
    right = groups == predicted
    return float(np.mean([right[groups == group].mean() for group in np.unique(groups)]))
