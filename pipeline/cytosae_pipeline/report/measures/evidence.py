"""What the scores of all images say about a latent: images at quantiles, and labels told on held-out images."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.label_rules import choose_rules, try_rules
from cytosae.analysis.quantile_images import QuantileImages, images_at_quantiles
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.measures.halves import Halves, split_rows

QUANTILES = (0.9, 0.5, 0.0)
"""Quantiles of a latent's positive scores whose images are shown; 0 for those just above 0."""

LEAST_IMAGES = 5
"""A label with fewer images in either half is not chosen."""

MAX_LABELS = 64
"""Most labels of which a page has the rules: those with the most images."""


class LatentEvidence(NamedTuple):
    """What the scores of one latent say."""

    n_images: int
    """Images that were looked at."""
    n_active: int
    """Those with a score above 0."""
    quantiles: list[QuantileImages]
    """Images at quantiles, `places` being rows of the store."""
    labels: dict[str, Any] | None
    """Rules that tell labels, as the page shows them; None if there are no labels, or no two halves."""

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """Rows of all images at quantiles, each once."""
        return np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(found.places for found in self.quantiles)]))


class EvidenceMaker:
    """Makes the evidence of any number of latents on the same images.

    Args:
        data: Store, autoencoder and statistics.
        rows: Rows of the images, increasing, shape `(n,)`.
    """

    def __init__(self, data: ReportData, rows: npt.NDArray[np.int64]) -> None:
        self._rows, self._n_quantile_images = rows, data.config.quantile_images
        self.halves: Halves = split_rows(data, rows)
        """The halves."""
        labels = data.labels[rows]
        counts = np.bincount(labels[labels >= 0], minlength=len(data.features.labels))
        self._labels = np.sort(np.argsort(-counts, kind="stable")[:MAX_LABELS])
        """Labels whose rules are made; the others are images without it."""
        numbers = np.full(len(counts) + 1, len(self._labels))
        numbers[self._labels] = np.arange(len(self._labels))
        self._numbers = numbers[labels]
        self._choosing = np.flatnonzero(self.halves.choosing & (labels >= 0))
        self._held_out = np.flatnonzero(self.halves.held_out & (labels >= 0))

    def make(self, scores: npt.NDArray[np.float32]) -> LatentEvidence:
        """The evidence of one latent from its scores on the images, shape `(n,)`."""
        found = []
        if self._n_quantile_images:
            found = [
                one._replace(places=self._rows[one.places])
                for one in images_at_quantiles(scores, QUANTILES, self._n_quantile_images)
            ]
        return LatentEvidence(len(self._rows), int((scores > 0).sum()), found, self._tell_labels(scores))

    def _tell_labels(self, scores: npt.NDArray[np.float32]) -> dict[str, Any] | None:
        """Rules chosen on one half, and what they say of the other."""
        n = len(self._labels)
        if not n or not len(self._choosing) or not len(self._held_out):
            return None
        # One number more, of the labels that are left out.
        rules = choose_rules(scores[self._choosing], self._numbers[self._choosing], n + 1)
        tests = try_rules(rules, scores[self._held_out], self._numbers[self._held_out])
        enough = (rules.n_images[:n] >= LEAST_IMAGES) & (tests.n_images[:n] >= LEAST_IMAGES)
        auroc = np.where(enough, np.nan_to_num(rules.auroc[:n], nan=-1), -1)
        records = [
            {
                "label": label,
                "n_images": [int(rules.n_images[at]), int(tests.n_images[at])],
                "auroc": [_number(rules.auroc[at]), _number(tests.auroc[at])],
                "threshold": _number(rules.threshold[at]),
                "f1": [_number(rules.f1[at]), _number(tests.f1[at])],
                "precision": _number(tests.precision[at]),
                "recall": _number(tests.recall[at]),
            }
            for at, label in enumerate(self._labels.tolist())
            if rules.n_images[at] or tests.n_images[at]
        ]
        best = int(self._labels[auroc.argmax()]) if auroc.max() >= 0 else -1
        n_images = [len(self._choosing), len(self._held_out)]
        return {"unit": self.halves.unit, "n_images": n_images, "best": best, "rules": records}


def _number(value: float) -> float | None:
    """A number of float32's precision; None for NaN."""
    return None if math.isnan(value) else float(np.float32(value))
