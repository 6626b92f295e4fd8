"""Worker processes that cannot hang the program nor outlive it, whenever and however they die."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import spawn
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

_BOOT = (
    "import sys; file, parent, *sys.path = sys.argv[1:]; "
    "from cytosae_pipeline.runtime.child import main; main(int(file), int(parent))"
)
"""What the interpreter of a child runs: not the user's script, which would call what the parent has just called."""

_INTERVAL_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class WorkerDiedError(Exception):
    """A worker process was killed, or ended by itself.

    Args:
        exit_code: Its exit code, minus the signal's number if one ended it; None if it is not known.
    """

    def __init__(self, exit_code: int | None = None) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Child:
    """A process of a fresh interpreter, which ends with the thread that starts it.

    It is not forked: this process has threads, torch's among them, and the child could deadlock. Nor is it started by a
    server of multiprocessing, which would outlive this process if a process forked from this one is still there.

    Args:
        function: Runs in the child, with the connection to this process as its first argument; picklable.
        *arguments: Its further arguments; picklable.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        here, there = socket.socketpair()
        signals = {signal.SIGINT, signal.SIGTERM}
        with there:
            # The child keeps them blocked until it ignores them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            try:
                command = [
                    os.fsdecode(spawn.get_executable()),
                    "-P",
                    "-c",
                    _BOOT,
                    str(there.fileno()),
                    str(os.getpid()),
                ]
                self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and code of ours
                    [*command, *_import_path()], pass_fds=[there.fileno()], stdin=subprocess.DEVNULL
                )
            except BaseException:
                here.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.connection = Connection(here.detach())
        """Messages to and from the child."""
        self.pid = self._process.pid
        """Its number."""
        self.send((function, arguments))

    def send(self, message: object) -> None:
        """Send a message to the child.

        Raises:
            WorkerDiedError: If it has ended.
        """
        try:
            self.connection.send(message)
        except OSError as error:
            raise WorkerDiedError(self.end()) from error

    def receive(self) -> Any:  # noqa: ANN401 - whatever the child sends
        """Wait for a message of the child.

        Raises:
            WorkerDiedError: If it has ended.
        """
        try:
            # End of file does not come if a process that was forked from this one has the child's end open.
            while not self.connection.poll(_INTERVAL_S):
                if not self.is_alive() and not self.connection.poll():
                    raise EOFError
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError(self.end()) from error

    def is_alive(self) -> bool:
        """Whether the child has not ended."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Kill the child."""
        self._process.kill()

    def end(self) -> int:
        """Kill the child if it has not ended, and return its exit code; minus the signal's number if one ended it."""
        try:
            return self._process.wait(_INTERVAL_S)  # its connection closes just before
        except subprocess.TimeoutExpired:
            self.kill()
            return self._process.wait()


class WorkerPool:
    """Processes that run functions, each over a connection of its own.

    The standard library's process pool shares one pipe among all workers and keeps both ends open: if a worker is
    killed in the middle of a long result, the pool waits for the rest forever. A worker that died is replaced when the
    next call needs it.

    Args:
        n_workers: Number of processes, at least 1.
    """

    def __init__(self, n_workers: int) -> None:
        self.processes: list[Child] = []
        """The workers that have not died."""
        self._idle: queue.SimpleQueue[Child | None] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(n_workers, "worker")
        # One thread starts all: a child ends with the thread that started it.
        self._starter = ThreadPoolExecutor(1, "starter")
        self._lock = threading.Lock()
        self._closed = False
        try:
            for _ in range(n_workers):
                self._idle.put(self._start())
        except BaseException:
            self.shutdown()
            raise

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        """Call a function in a worker process; function, arguments and result or error must be picklable.

        The future raises `WorkerDiedError` if the process dies.
        """
        return self._threads.submit(self._call, function, args, kwargs)

    def shutdown(self) -> None:
        """Kill the workers; calls that have not begun are cancelled."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._closed = True
            children = list(self.processes)
        for child in children:
            child.kill()
        self._threads.shutdown()
        for child in children:
            child.end()
            child.connection.close()
        self._starter.shutdown()

    def _start(self) -> Child:
        """A new worker.

        Raises:
            WorkerDiedError: If the pool was shut down.
        """
        child = self._starter.submit(Child, _serve).result()
        with self._lock:
            if not self._closed:
                self.processes.append(child)
                return child
        child.kill()
        raise WorkerDiedError(child.end())

    def _call(self, function: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        child = self._idle.get()
        try:
            child = child or self._start()
            child.send((function, args, kwargs))
            result, error = child.receive()
        except WorkerDiedError:
            if child is not None and not self._closed:
                with self._lock:
                    self.processes.remove(child)
                child.connection.close()
                child = None
            raise
        finally:
            self._idle.put(child)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]


def _import_path() -> list[str]:
    """Where this process imports from: tests and notebooks add to it."""
    return [entry for entry in sys.path if isinstance(entry, str)]


def _serve(connection: Connection) -> None:
    """The worker: take calls until the parent is gone."""
    while True:
        answer: tuple[object, Exception | None]
        try:
            function, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        except Exception as error:  # noqa: BLE001 - what cannot be imported here
            answer = None, error
        else:
            try:
                answer = function(*args, **kwargs), None
            except Exception as error:  # noqa: BLE001 - raised in the parent
                answer = None, error
        try:
            connection.send(answer)
        except OSError:
            return
