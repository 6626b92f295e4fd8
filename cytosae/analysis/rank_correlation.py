"""Spearman's rank correlation of scores with values of which some may be unknown."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]

LEAST_IMAGES = 5
"""Fewer images with a value give no correlation."""


class RankCorrelations(NamedTuple):
    """Correlation of one latent with every column; every array has shape `(C,)`."""

    n: npt.NDArray[np.int64]
    """Images with a value."""
    rho: Floats
    """Spearman's rho: Pearson's correlation of midranks; NaN if fewer than `LEAST_IMAGES` have a value, or all values
    or all scores are equal."""
    p: Floats
    """Two-sided p by Student's t with n - 2 degrees of freedom, images taken as independent; NaN without a rho."""


class RankedColumns:
    """Columns of values, ranked once for any number of latents.

    Args:
        values: Shape `(n, C)`, float64; NaN where unknown. An image counts for a column only if its value is known.
    """

    def __init__(self, values: Floats) -> None:
        known = ~np.isnan(values)
        self._n = known.sum(axis=0)
        patterns: dict[bytes, list[int]] = {}
        for column in range(values.shape[1]):
            patterns.setdefault(np.packbits(known[:, column]).tobytes(), []).append(column)
        self._groups = [
            (columns, np.flatnonzero(known[:, columns[0]]), [rankdata(values[known[:, c], c]) for c in columns])
            for columns in patterns.values()
        ]

    def correlate(self, scores: npt.NDArray[np.floating]) -> RankCorrelations:
        """Correlations of one latent's scores, shape `(n,)`, with every column."""
        rho = np.full(len(self._n), np.nan)
        for columns, places, ranked in self._groups:
            if len(places) < LEAST_IMAGES:
                continue
            # The sum of midranks is n (n + 1) / 2, ties or not.
            centre = (len(places) + 1) / 2
            mine = rankdata(scores[places]) - centre
            for column, ranks in zip(columns, ranked, strict=True):
                theirs = ranks - centre
                size = np.sqrt((mine @ mine) * (theirs @ theirs))
                if size > 0:
                    rho[column] = np.clip((mine @ theirs) / size, -1, 1)
        freedom = np.maximum(self._n - 2, 1)
        with np.errstate(divide="ignore"):
            t = np.abs(rho) * np.sqrt(freedom / np.maximum((1 - rho) * (1 + rho), 0))
        return RankCorrelations(self._n, rho, np.asarray(2 * stdtr(freedom, -t)))
