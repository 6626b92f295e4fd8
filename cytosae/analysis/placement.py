"""Places new patients among reference patients by their barcodes."""

import numpy as np
import numpy.typing as npt


def correlate_with(counts: npt.NDArray[np.floating], reference: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Pearson correlation of new patients with reference patients, of `log(1 + count)` over all latents.

    The same number as `cytosae.analysis.latents.correlate` gives for two patients of one cohort.

    Args:
        counts: Counts per image of the new patients, at least 0, shape `(Q, S)`.
        reference: Those of the reference patients, shape `(P, S)`.

    Returns:
        Float64, shape `(Q, P)`, in -1..1; 0 for patients without variance.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if counts.ndim != 2 or reference.ndim != 2 or counts.shape[1] != reference.shape[1]:
        raise ValueError(f"counts must be (Q, S) and reference (P, S), found {counts.shape} and {reference.shape}")
    return np.asarray(np.clip(_standardise(counts) @ _standardise(reference).T, -1, 1))


def find_nearest(correlation: npt.NDArray[np.floating], n: int) -> npt.NDArray[np.int64]:
    """Reference patients with the largest correlation, largest first; of equal ones the smaller index first.

    Args:
        correlation: Shape `(Q, P)`.
        n: How many at most.

    Returns:
        Indices, int64, shape `(Q, min(n, P))`.
    """
    return np.argsort(-correlation, axis=1, kind="stable")[:, :n].astype(np.int64)


def _standardise(counts: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Rows of `log(1 + count)`, centred, of length 1; 0 where a row does not vary."""
    rows = np.log1p(np.asarray(counts, dtype=np.float64))
    varies = rows.max(axis=1, keepdims=True, initial=0) > rows.min(axis=1, keepdims=True, initial=np.inf)
    rows -= rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(np.divide(rows, lengths, out=np.zeros_like(rows), where=varies))
