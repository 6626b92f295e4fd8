"""A tracker in a process of its own, so that it can neither stop nor slow nor outlive the training."""

import os
import queue
import signal
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from cytosae_pipeline.runtime.workers import process_context

if TYPE_CHECKING:
    from collections.abc import Callable

    from cytosae_pipeline.training.loggers import Histograms, Metrics, Tracker

_MAX_ERROR_LENGTH = 300


class Background:
    """Runs a tracker in a process of its own; nothing it does is waited for before `close`.

    A thread alone would not do: wandb puts itself into `sys.exit`, and at the interpreter's end waits for its service
    for as long as the network is away. A process can be ended.

    Args:
        name: What messages call it.
        make: Makes the tracker, in the process; also returns what the user should know, or "". Picklable.
        advice: Ends the messages about failures.
        close_s: Seconds that `close` waits for what is pending.
        n_pending: Records that may wait to be taken; further ones are dropped and counted.
    """

    def __init__(
        self,
        name: str,
        make: "Callable[[], tuple[Tracker, str]]",
        *,
        advice: str,
        close_s: float = 30.0,
        n_pending: int = 1000,
    ) -> None:
        self._name, self._advice, self._close_s, self._n_pending = name, advice, close_s, n_pending
        self.n_dropped = 0
        """Records that were dropped."""
        context = process_context()
        here, there = context.Pipe()
        # The environment is passed on, since a fork server keeps the one it was started with.
        self._process = context.Process(target=_serve, args=(there, dict(os.environ), make), daemon=True)
        self._calls: queue.SimpleQueue[tuple[object, ...] | None] = queue.SimpleQueue()
        self._notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._forward, args=(here, there), name=name, daemon=True)
        self._ended = False
        self._thread.start()

    def log(self, step: int, metrics: "Metrics", histograms: "Histograms | None" = None) -> None:
        """Pass a record on; returns at once, and never raises for what the tracker did."""
        self._say_notes()
        if not self._thread.is_alive():
            return
        if self._calls.qsize() >= self._n_pending:
            self.n_dropped += 1
        else:
            self._calls.put((step, dict(metrics), dict(histograms or {})))

    def close(self) -> None:
        """Wait a while for what is pending, then end the process."""
        self._calls.put(None)
        try:
            self._thread.join(self._close_s)
            if self._thread.is_alive():
                self._notes.put(f"{self._name} did not finish within {self._close_s:g} s and was ended. {self._advice}")
            elif self.n_dropped:
                self._notes.put(f"{self._name} was too slow: {self.n_dropped} records were dropped. {self._advice}")
        finally:
            self._ended = True
            if self._process.is_alive():
                self._process.kill()
                self._process.join(1)
            self._say_notes()

    def _forward(self, here: Connection, there: Connection) -> None:
        """The thread: start the process, and hand it one record after another."""
        try:
            self._process.start()
            there.close()
            self._hear(here)
            while (call := self._calls.get()) is not None:
                here.send(call)
                self._hear(here)
            here.send(None)
            self._hear(here)
        except Exception as error:  # noqa: BLE001 - whatever it was, training goes on
            if self._ended:
                return
            reason = "its process ended" if isinstance(error, EOFError | ConnectionError) else one_line(error)
            self._notes.put(f"{self._name} stopped: {reason}. Training goes on without it. {self._advice}")

    def _hear(self, here: Connection) -> None:
        """One answer of the process.

        Raises:
            RuntimeError: If the tracker failed.
        """
        failed, text = here.recv()
        if failed:
            raise RuntimeError(text)
        if text:
            self._notes.put(text)

    def _say_notes(self) -> None:
        """Messages are written by the caller's thread, between its own."""
        while not self._notes.empty():
            sys.stderr.write(self._notes.get() + "\n")


def _serve(
    connection: Connection, environment: dict[str, str], make: "Callable[[], tuple[Tracker, str]]"
) -> None:  # fmt: skip
    """The process: records until there are no more, or the tracker fails, or the parent has gone.

    Ctrl-C reaches the whole group of processes, and the parent decides what happens. What the tracker prints is lost.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        tracker, note = make()
        connection.send((False, note))
        while (call := connection.recv()) is not None:
            tracker.log(*call)
            connection.send((False, ""))
        tracker.close()
        connection.send((False, ""))
    except EOFError:
        return
    except Exception as error:  # noqa: BLE001 - told to the parent, if there still is one
        connection.send((True, one_line(error)))


def one_line(error: Exception) -> str:
    """An error's text, or its kind if it has none."""
    return " ".join(str(error).split())[:_MAX_ERROR_LENGTH].rstrip(".") or type(error).__name__
