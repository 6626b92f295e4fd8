"""How well one latent's score tells a label: AUROC, and the threshold with the largest F1, chosen and tested apart."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]


class LabelRules(NamedTuple):
    """Rules `label if score >= threshold`, one per label; every array has shape `(L,)`."""

    n_images: npt.NDArray[np.int64]
    """Images of each label among those that the rule was chosen on."""
    auroc: Floats
    """Probability that an image of the label has the larger score, ties counted half; NaN without such a pair."""
    threshold: Floats
    """The score above 0 from which the rule says the label; NaN if the latent is active on no image of it."""
    f1: Floats
    """F1 of the rule; 0 without one."""


class RuleTests(NamedTuple):
    """The same rules on other images; every array has shape `(L,)`."""

    n_images: npt.NDArray[np.int64]
    """Images of each label."""
    auroc: Floats
    """As in `LabelRules`."""
    precision: Floats
    """Share of the label among the images that the rule says it of; NaN if it says it of none."""
    recall: Floats
    """Share of the label's images that the rule says it of; NaN without images of the label."""
    f1: Floats
    """`2 TP / (2 TP + FP + FN)`; NaN without images of the label, 0 without a rule."""


def choose_rules(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], n_labels: int) -> LabelRules:
    """The threshold with the largest F1 for each label; of equal F1 the largest threshold.

    Args:
        scores: Scores of one latent, shape `(n,)`.
        labels: Label of each image, `0..L - 1`, shape `(n,)`.
        n_labels: Labels L.
    """
    counts = np.bincount(labels, minlength=n_labels)
    threshold, f1 = np.full(n_labels, np.nan), np.zeros(n_labels)
    active = np.flatnonzero(scores > 0)
    order = active[np.argsort(-scores[active].astype(np.float64), kind="stable")]
    values, named = scores[order], labels[order]
    # A threshold takes all images of equal score: only the last of them is a place to cut.
    cuts = np.flatnonzero(np.append(values[1:] != values[:-1], True)) if len(order) else np.zeros(0, dtype=np.int64)
    for label in np.unique(named).tolist():
        hits = np.cumsum(named == label)[cuts]
        found = 2 * hits / (cuts + 1 + counts[label])
        best = int(found.argmax())
        threshold[label], f1[label] = values[cuts[best]], found[best]
    return LabelRules(counts, auroc_of_labels(scores, labels, n_labels), threshold, f1)


def try_rules(rules: LabelRules, scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer]) -> RuleTests:
    """What the rules of `choose_rules` say of other images.

    Args:
        rules: The rules.
        scores: Scores of the same latent, shape `(n,)`.
        labels: Label of each image, `0..L - 1`, shape `(n,)`.
    """
    n_labels = len(rules.threshold)
    counts = np.bincount(labels, minlength=n_labels)
    order = np.argsort(scores, kind="stable")
    below = np.searchsorted(scores[order], np.nan_to_num(rules.threshold, nan=np.inf).astype(scores.dtype), "left")
    said = len(scores) - below
    hits = np.array([np.count_nonzero(labels[order[at:]] == label) for label, at in enumerate(below.tolist())])
    with np.errstate(invalid="ignore", divide="ignore"):
        precision, recall = hits / said, hits / counts
        f1 = np.where(counts > 0, 2 * hits / (said + counts), np.nan)
    return RuleTests(counts, auroc_of_labels(scores, labels, n_labels), precision, recall, f1)


def auroc_of_labels(scores: npt.NDArray[np.floating], labels: npt.NDArray[np.integer], n_labels: int) -> Floats:
    """Area under the ROC curve of each label against all others, from midranks (Mann & Whitney 1947).

    Args:
        scores: Scores, shape `(n,)`.
        labels: Label of each image, `0..L - 1`, shape `(n,)`.
        n_labels: Labels L.

    Returns:
        Shape `(L,)`; NaN for a label without images, or without any other image.
    """
    counts = np.bincount(labels, minlength=n_labels).astype(np.float64)
    sums = np.bincount(labels, weights=rankdata(scores), minlength=n_labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums - counts * (counts + 1) / 2) / (counts * (len(labels) - counts)))
