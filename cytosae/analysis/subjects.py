"""Samples pooled by person: several samples of one person are not several persons.

A test of patients assumes that they are independent of each other. Samples of one person are not: people differ more
than their samples do, so four samples of each of six people count as twenty-four people that never existed, and people
that happen to differ become findings. One row per person is the simple cure, and an exact one.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class SplitSubjectError(ValueError):
    """The samples of one subject are in two groups."""

    def __init__(self, subject: int, groups: tuple[int, int]) -> None:
        self.subject = subject
        """The subject by its index."""
        self.groups = groups
        """Two of its groups, the smaller index first."""
        super().__init__(f"subject {subject} has samples in groups {groups[0]} and {groups[1]}")


class Pooled(NamedTuple):
    """Samples added up by subject; U subjects."""

    raw: npt.NDArray[np.int64]
    """Raw counts, shape `(U, S)`."""
    n_images: npt.NDArray[np.int64]
    """Images, shape `(U,)`."""

    @property
    def counts(self) -> npt.NDArray[np.float64]:
        """Counts per image, shape `(U, S)`; 0 for a subject without images."""
        return self.raw / np.maximum(self.n_images, 1)[:, None]


def pool_samples(
    raw: npt.NDArray[np.int64], n_images: npt.NDArray[np.int64], subjects: npt.NDArray[np.integer], n_subjects: int
) -> Pooled:
    """Add up the counts and the images of each subject's samples.

    Every image has the same weight, whichever sample it comes from: the counts per image of a subject are those of all
    its images together, not the mean over its samples.

    Args:
        raw: Raw counts of the samples, int64, shape `(P, S)`.
        n_images: Images of each sample, int64, shape `(P,)`.
        subjects: Subject of each sample, shape `(P,)`; -1 leaves a sample out.
        n_subjects: Subjects U.

    Returns:
        Sums by subject; 0 for one without samples.

    Raises:
        ValueError: If the shapes do not fit, or a subject is out of range.
    """
    subjects = np.asarray(subjects)
    if raw.ndim != 2 or n_images.shape != raw.shape[:1] or subjects.shape != raw.shape[:1]:
        raise ValueError(
            f"raw must be (P, S), n_images and subjects (P,), found {raw.shape}, {n_images.shape} and {subjects.shape}"
        )
    _check_range(subjects, n_subjects)
    kept = np.flatnonzero(subjects >= 0)
    pooled = Pooled(np.zeros((n_subjects, raw.shape[1]), dtype=np.int64), np.zeros(n_subjects, dtype=np.int64))
    np.add.at(pooled.raw, subjects[kept], raw[kept])
    np.add.at(pooled.n_images, subjects[kept], n_images[kept])
    return pooled


def subject_groups(
    groups: npt.NDArray[np.integer], subjects: npt.NDArray[np.integer], n_subjects: int
) -> npt.NDArray[np.int64]:
    """The group of each subject: that of its samples.

    Args:
        groups: Group of each sample, shape `(P,)`; -1 for none.
        subjects: Subject of each sample, shape `(P,)`; -1 leaves a sample out.
        n_subjects: Subjects U.

    Returns:
        Shape `(U,)`; -1 if no sample of the subject has a group.

    Raises:
        SplitSubjectError: If samples of one subject are in two groups; samples without a group do not count.
        ValueError: If the shapes do not fit, or a subject is out of range.
    """
    groups, subjects = np.asarray(groups), np.asarray(subjects)
    if groups.ndim != 1 or groups.shape != subjects.shape:
        raise ValueError(f"groups and subjects must be (P,), found {groups.shape} and {subjects.shape}")
    _check_range(subjects, n_subjects)
    kept = (groups >= 0) & (subjects >= 0)
    pairs = np.unique(np.stack([subjects[kept], groups[kept]], axis=1).astype(np.int64), axis=0)
    twice = np.flatnonzero(np.diff(pairs[:, 0]) == 0)
    if len(twice):
        subject, first = pairs[twice[0]].tolist()
        raise SplitSubjectError(subject, (first, int(pairs[twice[0] + 1, 1])))
    of = np.full(n_subjects, -1, dtype=np.int64)
    of[pairs[:, 0]] = pairs[:, 1]
    return of


def _check_range(subjects: npt.NDArray[np.integer], n_subjects: int) -> None:
    """Raise if a subject is out of range."""
    if len(subjects) and not -1 <= int(subjects.min()) <= int(subjects.max()) < n_subjects:
        raise ValueError(f"subjects must lie in -1..{n_subjects - 1}, found {subjects.min()} to {subjects.max()}")
