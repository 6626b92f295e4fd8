"""Two halves of the images: rules are chosen on one and shown on the other."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import epoch_order
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.statistics.halves import split_in_halves


class Halves(NamedTuple):
    """Which images choose and which test."""

    choosing: npt.NDArray[np.bool_]
    """Whether rules are chosen on an image, shape `(n,)`."""
    held_out: npt.NDArray[np.bool_]
    """Whether they are shown on it, shape `(n,)`."""
    unit: str
    """What the halves have none of in common: `patient`, `subject` or `image`."""
    n_left_out: int
    """Images in neither half: their patient is not known."""


def split_rows(data: ReportData, rows: npt.NDArray[np.int64]) -> Halves:
    """Halves of some images: whole persons where they are known, and about half of every label's images.

    Args:
        data: The store and its patients.
        rows: Rows of the images, shape `(n,)`.
    """
    labels = data.labels[rows]
    labels = np.where(labels < 0, len(data.features.labels), labels)
    if data.cohort is None:
        choosing = halve_images(labels, seed=data.config.seed)
        return Halves(choosing, ~choosing, "image", 0)
    subjects = data.subjects
    groups = (data.patients if subjects is None else subjects)[rows]
    known = groups >= 0
    choosing = np.zeros(len(rows), dtype=bool)
    if known.any():
        # Numbers without gaps, of persons by their first image: pseudonyms, which order them anew, change no half.
        _, first, groups = np.unique(groups[known], return_index=True, return_inverse=True)
        groups = np.argsort(np.argsort(first))[groups]
        labels = np.unique(labels[known], return_inverse=True)[1]
        choosing[known] = split_in_halves(groups, labels, seed=data.config.seed)
    unit = "patient" if subjects is None else "subject"
    return Halves(choosing, known & ~choosing, unit, int((~known).sum()))


def halve_images(labels: npt.NDArray[np.int64], *, seed: int) -> npt.NDArray[np.bool_]:
    """`split_in_halves` where every image is a group of its own: the images of a label take turns.

    Args:
        labels: Label of each image, 0-based, shape `(n,)`.
        seed: Seed of the order in which they do.
    """
    order = epoch_order(len(labels), seed=seed, epoch=0)
    order = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels)
    turns = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    choosing = np.zeros(len(labels), dtype=bool)
    choosing[order] = turns % 2 == 0
    return choosing
