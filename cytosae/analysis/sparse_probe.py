"""Sparse probing: how well a few latents tell labels apart, on images of persons that the probe has not seen.

Latents are selected by moments of the training images of each fold, so that no array of images x latents is needed;
then only the scores of selected latents are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

_CONSTANT = 1e-12
"""Scores count as constant if their variance is at most this share of their mean square: float64 rounding."""


class ProbeMoments:
    """Sums of scores by fold and label: F x C x S numbers in float64, whatever the number of images.

    Args:
        n_folds: Folds F, at least 2.
        n_labels: Labels C.
        n_latents: Latents S.
        device: Device of the state, which has float64.
    """

    def __init__(self, n_folds: int, n_labels: int, n_latents: int, *, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(n_folds, n_labels, n_latents, dtype=torch.float64, device=device)
        self._squares = torch.zeros(n_folds, n_latents, dtype=torch.float64, device=device)
        self._n = torch.zeros(n_folds, n_labels, dtype=torch.float64, device=device)

    def update(self, scores: torch.Tensor, folds: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images.

        Args:
            scores: Shape `(n, S)`.
            folds: Fold in which each image is tested, int64, shape `(n,)`.
            labels: Label of each image, int64, shape `(n,)`.
        """
        wide, device = scores.to(self._sums), self._sums.device
        folds, labels = folds.to(device), labels.to(device)
        n_folds, n_labels, n_latents = self._sums.shape
        place = folds * n_labels + labels
        self._sums.view(-1, n_latents).index_add_(0, place, wide)
        self._squares.index_add_(0, folds, wide.square())
        self._n += torch.bincount(place, minlength=n_folds * n_labels).view(n_folds, n_labels)

    def variance_shares(self, fold: int, label: int | None = None) -> torch.Tensor:
        """Share of each latent's variance that is between labels, over the images that are not tested in a fold.

        Args:
            fold: The fold that is left out.
            label: One label against all others; None for all labels against each other.

        Returns:
            Between 0 and 1, float64, shape `(S,)`; 0 for latents that do not vary.
        """
        others = torch.arange(len(self._n), device=self._n.device) != fold
        sums, n = self._sums[others].sum(dim=0), self._n[others].sum(dim=0)
        if label is not None:
            sums = torch.stack([sums[label], sums.sum(dim=0) - sums[label]])
            n = torch.stack([n[label], n.sum() - n[label]])
        squares, total = self._squares[others].sum(dim=0), n.sum()
        mean = sums.sum(dim=0) / total
        there = n > 0
        between = (n[there, None] * (sums[there] / n[there, None] - mean).square()).sum(dim=0)
        within_all = squares - total * mean.square()
        varies = within_all > _CONSTANT * squares
        return torch.where(varies, between / within_all.clamp(min=1e-300), 0.0).clamp(0, 1)

    def select(self, fold: int, k: int, label: int | None = None) -> npt.NDArray[np.int64]:
        """The k latents with the largest variance share, largest first, ties by index; shape `(min(k, S),)`.

        Args:
            fold: The fold whose images are not looked at.
            k: How many.
            label: As for `variance_shares`.
        """
        shares = self.variance_shares(fold, label).cpu()
        return shares.argsort(descending=True, stable=True)[:k].numpy()


class Accuracy(NamedTuple):
    """Shares of test images predicted rightly."""

    balanced_accuracy: float
    """Mean over the labels of the share of their images predicted rightly; guessing gives 1 / C."""
    accuracy: float
    """Share of images predicted rightly."""


def probe_folds(
    features: npt.NDArray[np.floating],
    labels: npt.NDArray[np.integer],
    folds: npt.NDArray[np.integer],
    columns: Sequence[npt.NDArray[np.integer]] | None = None,
) -> npt.NDArray[np.int64]:
    """Predict the label of each image by a model fitted to the images of all other folds.

    The model standardises the features on its training images and is a logistic regression with an L2 penalty
    (scikit-learn's `C = 1`) and equal weight for every label.

    Args:
        features: Shape `(n, m)`.
        labels: Label of each image, shape `(n,)`; every training part must have at least two.
        folds: Fold in which each image is tested, from 0, shape `(n,)`.
        columns: Features that the model of each fold uses; all by default.

    Returns:
        Predicted labels, shape `(n,)`.
    """
    predicted = np.zeros(len(labels), dtype=np.int64)
    for fold in range(int(folds.max()) + 1):
        test = folds == fold
        used = features if columns is None else features[:, columns[fold]]
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        model.fit(used[~test].astype(np.float64), labels[~test])
        predicted[test] = model.predict(used[test].astype(np.float64))
    return predicted


def score_predictions(labels: npt.NDArray[np.integer], predicted: npt.NDArray[np.integer]) -> Accuracy:
    """Accuracies of predictions, over the labels that occur.

    Args:
        labels: True labels, shape `(n,)`.
        predicted: Predicted labels, shape `(n,)`.
    """
    hits = labels == predicted
    by_label = [float(hits[labels == label].mean()) for label in np.unique(labels)]
    return Accuracy(float(np.mean(by_label)), float(hits.mean()))
