"""How much of a latent's activity comes from one patient or site."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ONE_SOURCE_SHARE = 0.5
"""A latent is of one patient if more than this share of its activity is that patient's."""

ONE_SOURCE_EXCESS = 2.0
"""And if that share is at least so many times the patient's share of the images."""


class LargestShares(NamedTuple):
    """The patient with the largest share of each latent's activity; every array has shape `(S,)`."""

    source: npt.NDArray[np.int64]
    """The patient, the first of equals; -1 where there is no activity."""
    share: npt.NDArray[np.float64]
    """The share; 0 where there is no activity."""
    is_one: npt.NDArray[np.bool_]
    """Whether the latent is of one patient (docs/definitions.md, section 13)."""


def largest_shares(counts: npt.NDArray[np.integer], n_images: npt.NDArray[np.integer]) -> LargestShares:
    """The largest share of each latent, and whether it is far above the share of the images.

    Args:
        counts: Active tokens of each patient, shape `(P, S)`.
        n_images: Images of each patient, shape `(P,)`.
    """
    n_latents = counts.shape[1]
    if not len(counts):
        nothing = np.zeros(n_latents)
        return LargestShares(np.full(n_latents, -1), nothing, nothing > 0)
    totals = counts.sum(axis=0)
    source = counts.argmax(axis=0)
    share = counts[source, np.arange(n_latents)] / np.maximum(totals, 1)
    of_images = n_images / max(int(n_images.sum()), 1)
    is_one = (share > ONE_SOURCE_SHARE) & (share >= ONE_SOURCE_EXCESS * of_images[source])
    return LargestShares(np.where(totals > 0, source, -1), share, is_one)
