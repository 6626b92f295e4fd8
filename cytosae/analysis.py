"""Reading the statistics: how specific latents are to labels, and how well patients' counts tell groups apart."""

import numpy as np
import numpy.typing as npt

_EPSILON = 1e-9


def label_entropy(
    values: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], n_labels: int
) -> npt.NDArray[np.float64]:
    """Entropy of the labels among each latent's top-k images, weighted by activation (definition 4.8).

    Args:
        values: Scores of the top-k images, shape `(S, k)`; 0 in empty slots.
        labels: Their label indices, shape `(S, k)`; -1 in empty slots and for images without a label.
        n_labels: Labels there are.

    Returns:
        `-sum_c p_c ln(p_c + 1e-9)` in nats, float64, shape `(S,)`, with `p_c` the share of value mass on label c;
        -1 where fewer than k slots are filled.

    Raises:
        ValueError: If the shapes differ.
    """
    if values.shape != labels.shape or values.ndim != 2:
        raise ValueError(f"values and labels must both be (S, k), found {values.shape} and {labels.shape}")
    mass = np.zeros((len(values), n_labels))
    for label in range(n_labels):
        mass[:, label] = np.where(labels == label, values, 0).sum(axis=1, dtype=np.float64)
    share = mass / np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    entropy = -(share * np.log(share + _EPSILON)).sum(axis=1)
    return np.where((labels >= 0).all(axis=1), entropy, -1.0)


def leave_one_out_accuracy(features: npt.NDArray[np.floating], groups: npt.NDArray[np.integer]) -> float:
    """Share of rows whose group's centroid, computed without the row itself, is the nearest by cosine.

    Counts are compressed by `log1p` and standardised a column first, so that a few loud latents do not decide alone.

    Args:
        features: One row a patient, non-negative, shape `(n, S)`.
        groups: Group of each row, 0-based, shape `(n,)`.

    Returns:
        Accuracy between 0 and 1.

    Raises:
        ValueError: If the lengths differ or a group has fewer than two rows.
    """
    names, sizes = np.unique(groups, return_counts=True)
    if len(features) != len(groups) or (sizes < 2).any():
        raise ValueError(
            f"need one group a row and two rows a group, found {len(features)} rows, sizes {sizes.tolist()}"
        )
    scaled = np.log1p(np.asarray(features, dtype=np.float64))
    scaled -= scaled.mean(axis=0)
    scaled /= np.maximum(scaled.std(axis=0), np.finfo(np.float64).tiny)
    hits = 0
    for row in range(len(scaled)):
        others = np.arange(len(scaled)) != row
        centroids = np.stack([scaled[others & (groups == name)].mean(axis=0) for name in names])
        lengths = np.maximum(np.linalg.norm(centroids, axis=1), np.finfo(np.float64).tiny)
        hits += int(names[np.argmax(centroids @ scaled[row] / lengths)] == groups[row])
    return hits / len(scaled)
