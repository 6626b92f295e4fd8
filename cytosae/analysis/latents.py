"""Label entropy, selection and clustering of latents, and the similarity of patients by their counts."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Range = tuple[float | None, float | None]
"""Ends of a closed range; None for no limit."""

_EPSILON = 1e-9
_SLACK = 1e-6


def label_mass(
    values: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], n_labels: int
) -> npt.NDArray[np.float64]:
    """Summed values of each label among each latent's top-k images.

    Args:
        values: Scores of the top-k images, shape `(S, k)`.
        labels: Their label indices, shape `(S, k)`; -1 in empty slots and for images without a label.
        n_labels: Number of labels L.

    Returns:
        Float64, shape `(S, L)`.
    """
    mass = np.zeros((len(values), n_labels))
    latents, slots = (labels >= 0).nonzero()
    np.add.at(mass, (latents, labels[latents, slots]), values[latents, slots])
    return mass


def label_entropy(
    values: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], n_labels: int
) -> npt.NDArray[np.float64]:
    """Entropy of the labels among each latent's top-k images, weighted by activation (docs/definitions.md, section 8).

    Args:
        values: Scores of the top-k images, shape `(S, k)`; 0 in empty slots.
        labels: Their label indices, shape `(S, k)`; -1 in empty slots and for images without a label, which count as
            empty.
        n_labels: Number of labels.

    Returns:
        `-sum_c p_c ln(p_c + 1e-9)` in nats, at least 0, float64, shape `(S,)`, where `p_c` is the share of the summed
        values on label c; -1 where fewer than k slots are filled.

    Raises:
        ValueError: If the shapes differ.
    """
    if values.shape != labels.shape or values.ndim != 2:
        raise ValueError(f"values and labels must both be (S, k), found {values.shape} and {labels.shape}")
    mass = label_mass(values, labels, n_labels)
    share = mass / np.maximum(mass.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    entropy = -(share * np.log(share + _EPSILON)).sum(axis=1)
    # A single label gives -ln(1 + 1e-9), slightly below 0.
    return np.where((labels >= 0).all(axis=1), np.maximum(entropy, 0.0), -1.0)


def is_defined(entropy: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """Whether each label entropy is defined; older files hold values slightly below 0 for a single label."""
    return entropy > -0.5


def select_latents(
    sparsity: npt.NDArray[np.floating],
    mean_acts: npt.NDArray[np.floating],
    entropy: npt.NDArray[np.floating],
    *,
    log10_sparsity: Range | None = None,
    log10_mean: Range | None = None,
    entropy_range: Range | None = None,
) -> npt.NDArray[np.bool_]:
    """Latents within all given ranges, ends included; latents that are never active are excluded.

    Args:
        sparsity: Share of images where each latent is active, shape `(S,)`.
        mean_acts: Mean activation where active, shape `(S,)`.
        entropy: Label entropy in nats, shape `(S,)`; -1 where not defined.
        log10_sparsity: Range of log10 sparsity; None for any.
        log10_mean: Range of log10 mean activation; None for any.
        entropy_range: Range of the entropy; None for any. A range excludes latents without a defined entropy.

    Returns:
        Whether each latent is selected, shape `(S,)`.
    """
    chosen = sparsity > 0
    # Values are float32: 1 % has log10 -2.00000001, which a range that begins at -2 should include.
    for values, ends in ((_log10(sparsity), log10_sparsity), (_log10(mean_acts), log10_mean), (entropy, entropy_range)):
        if ends is not None:
            low, high = ends
            chosen &= (values >= (-np.inf if low is None else low - _SLACK)) & (
                values <= (np.inf if high is None else high + _SLACK)
            )
    if entropy_range is not None:
        chosen &= is_defined(entropy)
    return chosen


def best_latents(
    sparsity: npt.NDArray[np.floating],
    mean_acts: npt.NDArray[np.floating],
    entropy: npt.NDArray[np.floating],
    n: int,
) -> npt.NDArray[np.int64]:
    """The latents to look at first: by lowest label entropy, then largest mean activation, then smallest index.

    Latents without a defined entropy come last; latents that are never active are excluded.

    Args:
        sparsity: Share of images where each latent is active, shape `(S,)`.
        mean_acts: Mean activation where active, shape `(S,)`.
        entropy: Label entropy, shape `(S,)`; -1 where not defined.
        n: Largest number of latents.

    Returns:
        Latents, best first, int64, shape `(at most n,)`.
    """
    order = np.lexsort((np.arange(len(sparsity)), -mean_acts, np.where(is_defined(entropy), entropy, np.inf)))
    return order[sparsity[order] > 0][:n].astype(np.int64)


def cluster_latents(
    mean_acts: npt.NDArray[np.floating], sparsity: npt.NDArray[np.floating], n_clusters: int, *, seed: int = 0
) -> npt.NDArray[np.int64]:
    """Clusters of latents by k-means on log10 mean activation and log10 sparsity, each standardised.

    Args:
        mean_acts: Mean activation where active, shape `(S,)`.
        sparsity: Share of images where each latent is active, shape `(S,)`.
        n_clusters: Number of clusters; fewer if there are fewer distinct latents.
        seed: Seed of the initial centres.

    Returns:
        Cluster of each latent, int64, shape `(S,)`, numbered by descending mean sparsity; -1 for latents that are never
        active.
    """
    from sklearn.cluster import KMeans

    clusters = np.full(len(sparsity), -1, dtype=np.int64)
    active = np.flatnonzero((sparsity > 0) & (mean_acts > 0))
    points = np.stack([_log10(mean_acts[active]), _log10(sparsity[active])], axis=1)
    n_clusters = min(n_clusters, len(np.unique(points, axis=0)))
    if not n_clusters:
        return clusters
    points -= points.mean(axis=0)
    points /= np.maximum(points.std(axis=0), np.finfo(np.float64).tiny)
    found = KMeans(n_clusters, n_init=10, random_state=seed).fit_predict(points)
    means = [sparsity[active][found == cluster].mean() for cluster in range(n_clusters)]
    place = np.empty(n_clusters, dtype=np.int64)
    place[np.argsort(np.negative(means), kind="stable")] = np.arange(n_clusters)
    clusters[active] = place[found]
    return clusters


def group_means(
    counts: npt.NDArray[np.floating], groups: npt.NDArray[np.integer], n_groups: int
) -> npt.NDArray[np.float64]:
    """Mean barcode of each group.

    Args:
        counts: Counts of each patient, shape `(P, S)`.
        groups: Group of each patient, 0-based, shape `(P,)`.
        n_groups: Number of groups.

    Returns:
        Float64, shape `(n_groups, S)`; zeros for groups without patients.
    """
    sums: npt.NDArray[np.float64] = np.zeros((n_groups, counts.shape[1]))
    np.add.at(sums, groups, counts)
    n_patients = np.maximum(np.bincount(groups, minlength=n_groups), 1)
    sums /= n_patients[:, None]
    return sums


def correlate(counts: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Pearson correlation between patients, of `log(1 + count)` over all latents.

    Args:
        counts: Counts of each patient, at least 0, shape `(P, S)`.

    Returns:
        Float64, shape `(P, P)`, in -1..1; a patient without variance has 0 with others and 1 with itself.
    """
    rows = np.log1p(np.asarray(counts, dtype=np.float64))
    varies = rows.max(axis=1, keepdims=True, initial=0) > rows.min(axis=1, keepdims=True, initial=np.inf)
    rows -= rows.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=varies)
    found: npt.NDArray[np.float64] = np.clip(rows @ rows.T, -1, 1)
    np.fill_diagonal(found, 1)
    return found


def order_by_group(groups: npt.NDArray[np.integer], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Order of patients by group, then by name in natural order: P2 before P10. Patients without a group come last.

    Args:
        groups: Group of each patient, shape `(P,)`; -1 for none.
        names: Their names.

    Returns:
        A permutation of `range(P)`, int64.
    """

    def key(at: int) -> tuple[object, ...]:
        parts: list[tuple[int, str]] = []
        for place, part in enumerate(re.split(r"(\d+)", names[at])):
            # Every second part is a number. Its length, then its digits, give the order by value for any length.
            digits = part.lstrip("0")
            parts.append((len(digits), digits) if place % 2 else (-1, part))
        return groups[at] < 0, groups[at], parts, at

    return np.array(sorted(range(len(names)), key=key), dtype=np.int64)


def _log10(values: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Base-10 logarithm; minus infinity for 0, without a warning."""
    wide = np.asarray(values, dtype=np.float64)
    return np.log10(wide, out=np.full(wide.shape, -np.inf), where=wide > 0)
