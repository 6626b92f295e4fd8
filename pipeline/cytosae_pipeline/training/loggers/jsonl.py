"""Metrics as JSON lines, which every run writes."""

import json
import math
from pathlib import Path

from cytosae_cache.storage.atomic import write_file
from cytosae_pipeline.training.loggers.base import Histograms, Metrics


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
        write_file(path, "".join(kept).encode())
        self._file = path.open("a", buffering=1)

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write a line, without histograms; NaN and infinity become null, since JSON has neither."""
        values = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
