"""Images at quantiles of a latent's score: what its largest scores do not show."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class QuantileImages(NamedTuple):
    """Images around one quantile of a latent's positive scores."""

    quantile: float
    """The quantile; 0 for the smallest positive scores."""
    value: float
    """The quantile of the positive scores: the smallest with at least this share of them at or below it."""
    places: npt.NDArray[np.int64]
    """Places of the images, by falling score, equals by place, shape `(at most n,)`."""
    scores: npt.NDArray[np.floating]
    """Their scores, shape `(at most n,)`."""


def images_at_quantiles(scores: npt.NDArray[np.floating], quantiles: Sequence[float], n: int) -> list[QuantileImages]:
    """Images at quantiles of the scores above 0 (docs/definitions.md, section 13).

    The m active images are ordered by falling score, equals by place. Quantile q is the image at rank
    `m - max(ceil(q m), 1)`, counted from 0; the n images around it are taken, moved inwards at the ends.

    Args:
        scores: Scores of a latent on images, shape `(N,)`.
        quantiles: The quantiles, each 0 to 1.
        n: Images for each; fewer if fewer are active.

    Returns:
        One entry per quantile; none if no score is above 0.
    """
    active = np.flatnonzero(scores > 0)
    if not len(active):
        return []
    order = active[np.lexsort((active, -scores[active].astype(np.float64)))]
    found = []
    for quantile in quantiles:
        # Rounded down by less than a float64 can tell apart, so that 0.9 of 10 is the ninth.
        rank = len(order) - max(int(np.ceil(quantile * len(order) - 1e-9)), 1)
        first = min(max(rank - n // 2, 0), max(len(order) - n, 0))
        places = order[first : first + n]
        found.append(QuantileImages(quantile, float(scores[order[rank]]), places, scores[places]))
    return found
