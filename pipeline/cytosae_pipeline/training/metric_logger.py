"""What every destination of metrics has in common: the interface, and what it takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Metrics = Mapping[str, float | int]


class Histogram(NamedTuple):
    """How many values fall into each bin."""

    counts: npt.NDArray[np.int64]
    """Values in each bin, shape `(bins,)`."""
    edges: npt.NDArray[np.float64]
    """Edges of the bins, shape `(bins + 1,)`."""


Histograms = Mapping[str, Histogram]


def make_histogram(values: npt.NDArray[np.floating[Any]], *, n_bins: int = 64) -> Histogram:
    """The histogram of the finite values, in equal bins from the smallest to the largest."""
    counts, edges = np.histogram(values[np.isfinite(values)], bins=n_bins)
    return Histogram(counts.astype(np.int64), edges.astype(np.float64))


class MetricLogger(Protocol):
    """Takes metrics of training steps."""

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Record the metrics of a step."""
        ...

    def close(self) -> None:
        """Write what is pending."""
        ...


def one_line(error: Exception, max_length: int = 300) -> str:
    """An error's text on one line, or its type if it has none."""
    return " ".join(str(error).split())[:max_length].rstrip(".") or type(error).__name__
