"""Destinations of metrics: always a JSON-lines file, and several destinations as one."""

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Self

from cytosae_pipeline.training.metric_logger import Histograms, MetricLogger, Metrics


class JsonlLogger:
    """Appends one JSON object per line; a resumed run continues the same file.

    Args:
        path: The file.
        after_step: Lines of later steps are dropped: the resumed run writes them again.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # the line that a killed run was writing
                    continue
                if record["step"] <= after_step:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self._file = path.open("a", buffering=1)

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write a line, without histograms; NaN and infinity become null, since JSON has neither."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


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
