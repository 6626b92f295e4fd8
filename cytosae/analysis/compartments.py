"""Where on images a latent is active, by compartments of a mask."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

INSIDE = 0.5
"""A patch lies in a compartment if at least this share of its pixels does."""

Floats = npt.NDArray[np.float64]


class CompartmentScores(NamedTuple):
    """A latent's activation by compartment; every array has shape `(C,)`."""

    share: Floats
    """Share of the activation over all patches, each patch's being divided by the shares of its pixels; NaN without
    any activation."""
    area: Floats
    """Share of the pixels: the share of an activation that is the same everywhere."""
    precision: Floats
    """Average precision of the activation as a score of the patches inside; NaN if none is."""
    inside: Floats
    """Share of the patches that are inside: the average precision of chance."""


def patch_shares(
    mask: npt.NDArray[np.uint8], grid: tuple[int, int], size: int, n_compartments: int
) -> npt.NDArray[np.float32]:
    """Share of each patch's pixels in each compartment, the mask being resized as its image was, to the nearest pixel.

    Args:
        mask: Values, 0 for the background, shape `(H, W)`.
        grid: Rows and columns of patches.
        size: Height and width of the network's input in pixels; a rest at the right and lower edge is in no patch.
        n_compartments: Compartments C; larger values belong to none.

    Returns:
        Shape `(rows x columns, C + 1)`; the first is the background.
    """
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in mask.shape)
    resized = mask[rows][:, columns]
    height, width = size // grid[0], size // grid[1]
    patches = resized[: grid[0] * height, : grid[1] * width].reshape(grid[0], height, grid[1], width)
    shares = [(patches == value).mean(axis=(1, 3), dtype=np.float64) for value in range(n_compartments + 1)]
    return np.stack(shares, axis=-1).reshape(-1, n_compartments + 1).astype(np.float32)


def compare_compartments(acts: npt.NDArray[np.float32], shares: npt.NDArray[np.float32]) -> CompartmentScores:
    """Share of the activation, and average precision, of every compartment.

    Args:
        acts: Activation of each patch, 0 or more, shape `(n,)`.
        shares: Share of its pixels in each compartment, shape `(n, C)`.
    """
    values, total = acts.astype(np.float64), float(acts.sum(dtype=np.float64))
    share = values @ shares / total if total > 0 else np.full(shares.shape[1], np.nan)
    inside = shares >= INSIDE
    order = np.argsort(-values, kind="stable")
    falling = values[order]
    cuts = np.flatnonzero(np.append(falling[1:] != falling[:-1], True))
    precision = np.array([_average_precision(inside[order, at], cuts) for at in range(shares.shape[1])])
    return CompartmentScores(np.asarray(share), shares.mean(axis=0, dtype=np.float64), precision, inside.mean(axis=0))


def _average_precision(hits: npt.NDArray[np.bool_], cuts: npt.NDArray[np.int64]) -> float:
    """Sum of the precisions at the cuts, times the recall that each adds; equal scores are one cut."""
    found = np.cumsum(hits)[cuts]
    if not len(found) or not found[-1]:
        return float("nan")
    return float((np.diff(found, prepend=0) * found / (cuts + 1)).sum() / found[-1])
