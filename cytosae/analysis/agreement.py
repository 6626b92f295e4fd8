"""Agreement of raters beyond chance: Cohen's kappa of two, Fleiss' kappa of several."""

from typing import Literal

import numpy as np
import numpy.typing as npt

Weights = Literal["none", "quadratic"]


def cohen_kappa(first: npt.ArrayLike, second: npt.ArrayLike, n_categories: int, *, weights: Weights = "none") -> float:
    """Cohen's kappa of two raters: `1 - sum w_ij o_ij / sum w_ij e_ij`.

    `o_ij` is the share of items that the first rater put into category i and the second into j, `e_ij` the product of
    the two raters' own shares. Without weights `w_ij` is 1 off the diagonal (Cohen 1960, Educational and Psychological
    Measurement 20:37); quadratic weights are `(i - j)^2`, for categories in an order (Cohen 1968, Psychological
    Bulletin 70:213).

    Args:
        first: Categories of one rater, 0 to K - 1, shape `(n,)`.
        second: Those of the other, shape `(n,)`.
        n_categories: Categories K.
        weights: How much a disagreement counts.

    Returns:
        Kappa: 1 for full agreement, 0 for that of chance; NaN without items, or if chance alone gives full agreement
        because both use one and the same category only.

    Raises:
        ValueError: If the shapes do not fit, or a category is out of range.
    """
    one, other = np.asarray(first, dtype=np.int64), np.asarray(second, dtype=np.int64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"first and second must be (n,), found {one.shape} and {other.shape}")
    _check_categories(np.concatenate([one, other]), n_categories)
    if not len(one):
        return float("nan")
    places = np.arange(n_categories)
    distance = np.abs(places[:, None] - places[None, :])
    weight = (distance > 0).astype(np.int64) if weights == "none" else distance**2
    counts = np.bincount(one * n_categories + other, minlength=n_categories**2).reshape(n_categories, n_categories)
    # Whole numbers until the end: n observed against n^2 expected.
    expected = int((weight * np.outer(counts.sum(axis=1), counts.sum(axis=0))).sum())
    if expected == 0:
        return float("nan")
    return 1 - len(one) * int((weight * counts).sum()) / expected


def fleiss_kappa(ratings: npt.ArrayLike, n_categories: int) -> float:
    """Fleiss' kappa of m raters (Fleiss 1971, Psychological Bulletin 76:378): `(P - Pe) / (1 - Pe)`.

    `P` is the mean over items of the share of pairs of raters that agree, `Pe` the sum of the squared shares of the
    categories over all ratings.

    Args:
        ratings: Category of every item from every rater, 0 to K - 1, shape `(n, m)`; at least two raters.
        n_categories: Categories K.

    Returns:
        Kappa; NaN without items, or if all ratings are one and the same category.

    Raises:
        ValueError: If the shape does not fit, there are fewer than two raters, or a category is out of range.
    """
    found = np.asarray(ratings, dtype=np.int64)
    if found.ndim != 2 or found.shape[1] < 2:
        raise ValueError(f"ratings must be (n, m) with at least two raters, found {found.shape}")
    _check_categories(found, n_categories)
    n, m = int(found.shape[0]), int(found.shape[1])
    counts = (found[:, :, None] == np.arange(n_categories)).sum(axis=1)
    chance = int((counts.sum(axis=0) ** 2).sum())
    if n == 0 or chance == (n * m) ** 2:
        return float("nan")
    agreed, by_chance = int((counts * (counts - 1)).sum()) / (n * m * (m - 1)), chance / (n * m) ** 2
    return (agreed - by_chance) / (1 - by_chance)


def _check_categories(found: npt.NDArray[np.int64], n_categories: int) -> None:
    """Raise if a category is out of range."""
    if found.size and not 0 <= int(found.min()) <= int(found.max()) < n_categories:
        raise ValueError(f"categories must lie in 0..{n_categories - 1}, found {found.min()} to {found.max()}")
