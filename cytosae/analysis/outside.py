"""Finds images outside of what a reference knows (docs/definitions.md, section 13).

The shares are those of conformal prediction (Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005):
if a new image and the reference images are drawn alike, a share of at most a appears with a probability of at most a,
whatever the distribution.
"""

import numpy as np
import numpy.typing as npt


def worse_share(reference: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Share of images whose value is as large as that of each new image, among the reference and the image itself.

    Args:
        reference: Value of each reference image, rising, shape `(n,)`.
        values: Value of each new image, shape `(m,)`.

    Returns:
        `(1 + #{reference >= value}) / (n + 1)`, float64, shape `(m,)`; NaN where a value is NaN.

    Raises:
        ValueError: If there is no reference image, or the reference does not rise.
    """
    if reference.ndim != 1 or not len(reference) or not (np.diff(reference) >= 0).all():
        raise ValueError(f"reference must be (n,), rising, with n at least 1, found shape {reference.shape}")
    n = len(reference)
    share = (1 + n - np.searchsorted(reference, values, side="left")) / (n + 1)
    return np.where(np.isnan(values), np.nan, share)


def known_share(*shares: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """One share from those of several values: the smallest, times their number (Bonferroni), at most 1.

    It is at most a with a probability of at most a, as each of them is, however they depend on each other.

    Args:
        *shares: Results of `worse_share` for different values of the same images, shape `(m,)` each.

    Returns:
        Float64, shape `(m,)`; NaN where one of them is NaN.
    """
    return np.asarray(np.minimum(len(shares) * np.min(shares, axis=0), 1.0), dtype=np.float64)


def unusual_share(scores: npt.NDArray[np.floating], highest: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Share of the latents active in each image whose score is above a high quantile of the reference.

    Args:
        scores: Score of each latent in each image, shape `(n, S)`.
        highest: The quantile of each latent, shape `(S,)`; 0 for a latent that no reference image activates.

    Returns:
        Float64, shape `(n,)`; 0 for an image without active latents.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if scores.ndim != 2 or highest.shape != scores.shape[1:]:
        raise ValueError(f"scores must be (n, S) and highest (S,), found {scores.shape} and {highest.shape}")
    n_active = (scores > 0).sum(axis=1)
    n_above = ((scores > 0) & (scores > highest)).sum(axis=1)
    return np.asarray(n_above / np.maximum(n_active, 1))
