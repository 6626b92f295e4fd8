"""Worker processes that cannot hang the program, whenever and however they die."""

import multiprocessing
import os
import queue
import signal
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future
    from multiprocessing.context import ForkServerContext, SpawnContext
    from multiprocessing.process import BaseProcess

_MAX_SOCKET_PATH = 107 if sys.platform == "linux" else 103
"""Bytes that the path of a Unix socket may have."""

_SOCKET_NAME = "/pymp-12345678/listener-12345678"
"""What multiprocessing appends to the folder of temporary files for the socket of its fork server."""

_starting = threading.Lock()

P = ParamSpec("P")
T = TypeVar("T")


class WorkerDiedError(Exception):
    """A worker process was killed, or ended by itself."""


class WorkerPool:
    """Processes that run functions, each over a pipe of its own whose far end no other process has open.

    The standard library's process pool shares one pipe among all workers and keeps both ends open: if a worker is
    killed in the middle of a long result, the pool waits for the rest forever. Here the pipe reports end of file at
    once, and a worker whose parent was killed sees the same and exits.

    Args:
        n_workers: Number of processes, at least 1.
    """

    def __init__(self, n_workers: int) -> None:
        context = process_context()
        self.processes: list[BaseProcess] = []
        """The workers."""
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(n_workers, "worker")
        try:
            for _ in range(n_workers):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(there,))
                start_process(process)
                self.processes.append(process)
                there.close()
                self._idle.put(here)
        except BaseException:
            self.shutdown()
            raise

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call a function in a worker process; function, arguments and result or error must be picklable.

        The future raises `WorkerDiedError` if the process dies. That worker is not replaced.
        """
        return self._threads.submit(self._call, function, args, kwargs)

    def shutdown(self) -> None:
        """Kill the workers; calls that have not begun are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()
        self._threads.shutdown()
        for process in self.processes:
            process.join()

    def _call(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        connection = self._idle.get()
        try:
            connection.send((function, args, kwargs))
            result, error = connection.recv()
        except (EOFError, OSError) as broken:
            raise WorkerDiedError from broken
        finally:
            self._idle.put(connection)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def can_start_processes() -> bool:
    """Whether this process may have children; daemonic processes of multiprocessing may not."""
    return not multiprocessing.current_process().daemon


def process_context() -> "ForkServerContext | SpawnContext":
    """How child processes are started. Not by fork: the parent has threads, torch's among them, and could deadlock.

    The fork server listens on a socket in the folder of temporary files. Where that path is too long for a socket, as
    in many batch jobs, each process is spawned on its own, which is slower by the start of an interpreter.
    """
    on_linux = sys.platform not in ("win32", "darwin")
    fits = len(os.fsencode(tempfile.gettempdir() + _SOCKET_NAME)) <= _MAX_SOCKET_PATH
    return multiprocessing.get_context("forkserver" if on_linux and fits else "spawn")  # type: ignore[return-value]


def start_process(process: "BaseProcess") -> None:
    """Start a child process that does not run the user's script again.

    multiprocessing imports the parent's `__main__` in every child. In a script without `if __name__ == "__main__":` the
    child would call what the parent has just called, and die. Our children take functions of our modules alone, so
    there is no `__main__` for them to import.
    """
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = main


def _serve(connection: Connection) -> None:
    """The worker: take calls until the parent is gone.

    Ctrl-C and SIGTERM reach the whole group of processes, and the parent decides what happens.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        answer: tuple[object, Exception | None]
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:  # noqa: BLE001 - raised in the parent
            answer = None, error
        try:
            connection.send(answer)
        except OSError:
            return
