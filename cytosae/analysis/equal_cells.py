"""The same number of cells of every subject: counts of 50 cells and of 500 are not equally certain.

Counts per image of a subject with few images scatter more, and where few cells activate a latent they are skewed: most
such subjects have none, a few have many. The mean over subjects stays the same, but neither the spread nor the median
does, so if one group's subjects have fewer images, ranks differ where nothing else does. That is no fault of the ranks:
under the null hypothesis the subjects are no longer exchangeable, on which every permutation rests. Drawing the same
number of images of every subject makes them so again, and any test of them as exact as it was, without a model.

It is drawn once. The mean over many draws would be the count of all images again, with its unequal spread; and p-values
of counts thinned token by token instead of image by image are too small, since tokens of one image are not independent.
"""

import numpy as np
import numpy.typing as npt

UNEQUAL_RATIO = 2.0
"""Groups whose median subjects differ by more than this factor in their images are pointed out (docs/statistics.md)."""


def draw_equal(
    subjects: npt.NDArray[np.integer], n_subjects: int, n_each: int, *, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Draw the same number of images of every subject, without replacement.

    Which images are drawn depends on the seed and on the rows alone, not on how subjects are numbered.

    Args:
        subjects: Subject of each image, shape `(n,)`; -1 leaves an image out.
        n_subjects: Subjects U.
        n_each: Images of each.
        seed: Seed of the draw.

    Returns:
        Rows of the images, increasing, int64, shape `(U n_each,)`.

    Raises:
        ValueError: If a subject has fewer images, or is out of range.
    """
    subjects = np.asarray(subjects)
    if n_each < 1:
        raise ValueError(f"n_each must be at least 1, found {n_each}")
    if len(subjects) and subjects.max() >= n_subjects:
        raise ValueError(f"subjects must lie in -1..{n_subjects - 1}, found {subjects.max()}")
    available = np.bincount(subjects[subjects >= 0], minlength=n_subjects)
    if n_subjects and available.min() < n_each:
        raise ValueError(f"subject {available.argmin()} has {available.min()} images, fewer than {n_each}")
    order = np.lexsort((np.random.default_rng(seed).random(len(subjects)), subjects))
    order = order[subjects[order] >= 0]
    # Place of each image among those of its subject, in random order.
    starts = np.cumsum(available) - available
    place = np.arange(len(order)) - starts[subjects[order]]
    return np.sort(order[place < n_each]).astype(np.int64)


def median_images(n_images: npt.NDArray[np.integer], in_first: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Median number of images of the subjects in two groups.

    Args:
        n_images: Images of each subject, shape `(U,)`.
        in_first: True for the first group's, shape `(U,)`.

    Returns:
        Of the first and of the second group.
    """
    return float(np.median(n_images[in_first])), float(np.median(n_images[~in_first]))
