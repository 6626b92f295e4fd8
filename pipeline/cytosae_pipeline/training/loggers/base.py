"""The interface of every destination of metrics, and several destinations as one."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

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


class MetricLoggers:
    """Several metric loggers as one; use as a context manager."""

    def __init__(self, *loggers: MetricLogger) -> None:
        self._loggers = loggers

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Record the metrics of a step everywhere."""
        for one in self._loggers:
            one.log(step, metrics, histograms)

    def close(self) -> None:
        """Write what is pending everywhere."""
        for one in self._loggers:
            one.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def one_line(error: Exception, max_length: int = 300) -> str:
    """An error's text on one line, or its type if it has none."""
    return " ".join(str(error).split())[:max_length].rstrip(".") or type(error).__name__
