"""Finds images outside of what a reference knows (docs/definitions.md, section 15).

The share is that of conformal prediction (Vovk, Gammerman & Shafer, Algorithmic Learning in a Random World, 2005): if
a new image and the reference images are drawn alike, a share of at most a appears with a probability of at most a,
whatever the distribution.
"""

import numpy as np
import numpy.typing as npt


def known_share(reference: npt.NDArray[np.floating], values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Share of images that are as strange as each new image, among the reference images and the image itself.

    An image's rank in one number is how many of these n + 1 images have one at least as large, itself included. The
    smaller the product of an image's ranks over all numbers, the stranger it is. All n + 1 images are treated alike, so
    that the share is exact however the numbers depend on each other.

    Args:
        reference: K numbers of each reference image, larger if it is stranger, shape `(n, K)`.
        values: The same of each new image, shape `(m, K)`; NaN is stranger than anything.

    Returns:
        `#{images with a product at most the new one's} / (n + 1)`, float64, shape `(m,)`.

    Raises:
        ValueError: If the shapes do not fit, there is no reference image, or one of its numbers is not finite.
    """
    if reference.ndim != 2 or values.ndim != 2 or not len(reference) or values.shape[1] != reference.shape[1]:
        raise ValueError(
            f"reference must be (n, K) with n at least 1, and values (m, K), found {reference.shape} and {values.shape}"
        )
    if not np.isfinite(reference).all():
        raise ValueError("numbers of the reference must be finite")
    n, n_numbers = reference.shape
    values = np.where(np.isnan(values), np.inf, values)
    ranks = np.empty((n, n_numbers), dtype=np.int64)
    for at, column in enumerate(reference.T):
        ranks[:, at] = n - np.searchsorted(np.sort(column), column, side="left")
    found = np.empty(len(values))
    for at, image in enumerate(values):
        products = np.prod(ranks + (image >= reference), axis=1)
        found[at] = (1 + np.count_nonzero(products <= np.prod(1 + (reference >= image).sum(axis=0)))) / (n + 1)
    return found


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
