"""A metric logger in a process of its own, so that it can neither stop nor slow down nor outlive training."""

import logging
import os
import queue
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.workers import Child, WorkerDiedError
from cytosae_pipeline.training.loggers.base import Histograms, MetricLogger, Metrics, one_line

logger = logging.getLogger(__name__)


class Background:
    """Runs a metric logger in a process of its own; training never waits for it before `close`.

    A thread is not enough: wandb hooks into `sys.exit`, and at the interpreter's end waits for its service for as long
    as the network is down. A process can be killed.

    Args:
        name: Its name in messages.
        make: Makes the logger, in the process; also returns what the user should know, or "". Picklable.
        advice: Last sentence of messages about failures.
        close_s: Seconds that `close` waits for pending records.
        n_pending: Records that may be pending; further ones are dropped and counted.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], tuple[MetricLogger, str]],
        *,
        advice: str,
        close_s: float = 30.0,
        n_pending: int = 1000,
    ) -> None:
        self._name, self._advice, self._close_s, self._n_pending = name, advice, close_s, n_pending
        self.n_dropped = 0
        """Records that were dropped."""
        self._make = make
        self._process: Child | None = None
        self._calls: queue.SimpleQueue[tuple[object, ...] | None] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, name=name, daemon=True)
        self._ended = False
        self._thread.start()

    def log(self, step: int, metrics: Metrics, histograms: Histograms | None = None) -> None:
        """Pass a record on; returns at once, and never raises an error of the logger."""
        self._say_notes()
        if not self._thread.is_alive():
            return
        if self._calls.qsize() >= self._n_pending:
            self.n_dropped += 1
        else:
            self._calls.put((step, dict(metrics), dict(histograms or {})))

    def close(self) -> None:
        """Wait a while for pending records, then end the process."""
        self._calls.put(None)
        try:
            self._thread.join(self._close_s)
            if self._thread.is_alive():
                self._notes.put(
                    f"{self._name} did not finish within {self._close_s:g} s and was stopped. {self._advice}"
                )
            elif self.n_dropped:
                dropped = say_count(self.n_dropped, "record was", "records were")
                self._notes.put(f"{self._name} was too slow: {dropped} dropped. {self._advice}")
        finally:
            self._ended = True
            if self._process is not None:
                self._process.kill()
                self._process.end()
            self._say_notes()

    def _forward(self) -> None:
        """The thread: start the process, which ends with it, and send it one record after another."""
        try:
            self._process = child = Child(_serve, self._make)
            self._receive(child)
            while (call := self._calls.get()) is not None:
                child.send(call)
                self._receive(child)
            child.send(None)
            self._receive(child)
        except Exception as error:  # noqa: BLE001 - training continues in any case
            if self._ended:
                return
            reason = "its process ended" if isinstance(error, WorkerDiedError) else one_line(error)
            self._notes.put(f"{self._name} stopped: {reason}. Training continues without it. {self._advice}")

    def _receive(self, child: Child) -> None:
        """Receive one reply of the process.

        Raises:
            RuntimeError: If the logger failed.
        """
        failed, text = child.receive()
        if failed:
            raise RuntimeError(text)
        if text:
            self._notes.put(text)

    def _say_notes(self) -> None:
        """Log messages from the caller's thread, between its own."""
        while not self._notes.empty():
            logger.warning(self._notes.get())


def _serve(connection: Connection, make: Callable[[], tuple[MetricLogger, str]]) -> None:
    """The process: take records until there are no more, the logger fails, or the parent is gone.

    What the logger prints is dropped.
    """
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        metric_logger, note = make()
        connection.send((False, note))
        while (call := connection.recv()) is not None:
            metric_logger.log(*call)
            connection.send((False, ""))
        metric_logger.close()
        connection.send((False, ""))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - reported to the parent, if it is still there
        connection.send((True, one_line(error)))
