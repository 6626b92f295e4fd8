"""Positions of images on a plane, from their scores (docs/definitions.md, section 11)."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Components(NamedTuple):
    """Principal components of the scores of n images."""

    positions: npt.NDArray[np.float64]
    """Shape `(n, c)`."""
    shares: npt.NDArray[np.float64]
    """Share of the total variance along each component, falling, shape `(c,)`."""


def principal_components(scores: npt.NDArray[np.floating], n_components: int) -> Components:
    """Exact principal components of centred scores.

    Args:
        scores: Shape `(n, M)`, at least one image.
        n_components: Most components; there are at most min(n, M).

    Returns:
        Positions on the components. The sign of a component is such that its entry of the largest size is positive.
    """
    centred = np.asarray(scores, dtype=np.float64)
    centred = centred - centred.mean(axis=0)
    is_wide = centred.shape[0] < centred.shape[1]
    values, vectors = np.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    keep = np.argsort(-values, kind="stable")[: min(n_components, *centred.shape)]
    values, vectors = np.maximum(values[keep], 0), vectors[:, keep]
    positions = vectors * np.sqrt(values) if is_wide else centred @ vectors
    if len(keep):
        largest = np.abs(positions).argmax(axis=0)
        positions *= np.where(positions[largest, np.arange(len(keep))] < 0, -1, 1)
    total = float((centred**2).sum())
    return Components(positions, values / total if total > 0 else np.zeros(len(keep)))


def nearest_images(scores: npt.NDArray[np.floating], wanted: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.int64]:
    """The images whose scores are most similar to an image's, by cosine; ties go to the earlier one.

    Args:
        scores: Scores of the images, shape `(n_images, M)`.
        wanted: Scores of one image, shape `(M,)`.
        n: Most images to return.

    Returns:
        Their places, most similar first, int64; none if the image has no score above 0.
    """
    if not wanted.any():
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-cosine_similarity(scores, wanted), kind="stable")
    return order[:n].astype(np.int64)


def cosine_similarity(scores: npt.NDArray[np.floating], wanted: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Cosine of each image's scores with those of one image, shape `(n_images,)`; 0 where either has none."""
    tiny = np.finfo(np.float64).tiny
    lengths = np.linalg.norm(scores, axis=1).astype(np.float64) * float(np.linalg.norm(wanted))
    found: npt.NDArray[np.float64] = (scores @ wanted) / np.maximum(lengths, tiny)
    return found
