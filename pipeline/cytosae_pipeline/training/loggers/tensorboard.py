"""TensorBoard's event files, written by torch's writer in this process."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.training.loggers.base import Histograms, Metrics, one_line

logger = logging.getLogger(__name__)


class TensorboardLogger:
    """Writes event files; a writer that fails is reported once and left out, and training continues.

    Args:
        folder: Folder for the files.
        after_step: Later steps of earlier files no longer count: the resumed run writes them again.

    Raises:
        UserError: If tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, after_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "--tensorboard needs tensorboard: pip install tensorboard, or leave the option out"
            ) from error
        make: Any = SummaryWriter  # torch leaves it untyped
        self._writer: Any = None
        others, self._outer_hook = set(threading.enumerate()), threading.excepthook
        self._guard(lambda: setattr(self, "_writer", make(str(folder), purge_step=after_step + 1, flush_secs=10)))
        # An error in the writer's thread is raised again in its next call, and reported there.
        self._threads = set(threading.enumerate()) - others
        threading.excepthook = self._report_thread

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Write the metrics of a step."""
        self._guard(lambda: self._write(step, metrics, histograms or {}))

    def close(self) -> None:
        """Finish the files."""
        self._guard(lambda: self._writer and self._writer.close())
        self._writer = None
        threading.excepthook = self._outer_hook

    def _report_thread(self, error: threading.ExceptHookArgs) -> None:
        """Report an error that ended a thread, unless it is the writer's."""
        if error.thread not in self._threads:
            self._outer_hook(error)

    def _write(self, step: int, metrics: Metrics, histograms: Histograms) -> None:
        if self._writer is None:
            return
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name, (counts, edges) in histograms.items():
            centres = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                name, min=edges[0], max=edges[-1], num=counts.sum(), sum=counts @ centres,
                sum_squares=counts @ centres**2, bucket_limits=edges[1:].tolist(), bucket_counts=counts.tolist(),
                global_step=step,
            )  # fmt: skip

    def _guard(self, call: Callable[[], object]) -> None:
        """Run a call of the writer; its first error ends it."""
        try:
            call()
        except Exception as error:  # noqa: BLE001 - training continues in any case
            self._writer = None
            logger.warning(
                f"tensorboard stopped: {one_line(error)}. Training continues without it. "
                "Every metric is in metrics.jsonl"
            )
