"""Decoding in a process of its own with limits, so that a picture can cost no more than that process."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from cytosae.backbones.images import UnreadableImageError
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.workers import WorkerDiedError, WorkerPool

_N_TRIALS = 2
_CRASHES = {-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE}

T = TypeVar("T")


class DecodingError(UserError):
    """Images cannot be decoded here at the moment, though perhaps later or on another machine."""


class Limits(NamedTuple):
    """What decoding one picture may cost."""

    cpu_s: int = 60
    """Seconds of computing."""
    n_bytes: int = 2 << 30
    """Memory beside what the process has already; only Linux enforces it."""


def limit_process(limits: Limits) -> None:
    """Limit this process for the next picture; called in a process that does nothing else.

    The system kills it with SIGXCPU once it has computed for too long, and refuses it further memory. It writes no file
    when it crashes: that would contain pictures of patients.
    """
    import resource

    used = int(time.process_time()) + 1
    _lower(resource.RLIMIT_CPU, used + limits.cpu_s)
    _lower(resource.RLIMIT_CORE, 0)
    if (held := _data_bytes()) is not None:
        _lower(resource.RLIMIT_DATA, held + limits.n_bytes)


class Isolation:
    """A process for pictures that might cost more than others; use as a context manager.

    Args:
        limits: What one picture may cost.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._pool: WorkerPool | None = None

    def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function of one picture, which limits its own process.

        Args:
            function: The function; it and its result are picklable.
            *arguments: Its arguments.

        Raises:
            UnreadableImageError: If the picture takes too long or too much memory, or ends the process twice.
            DecodingError: If something else ends the process.
        """
        reason = ""
        for _ in range(_N_TRIALS):
            try:
                if self._pool is None:
                    self._pool = WorkerPool(1)
                return self._pool.submit(function, *arguments).result()
            except MemoryError as error:
                limit = f"{self.limits.n_bytes / 1e9:.1f} GB of memory"
                raise UnreadableImageError(f"needs more than {limit} to decode") from error
            except WorkerDiedError as error:
                reason = describe_end(error, self.limits)
                if not reason:
                    raise DecodingError(killed_message(0)) from error
                if error.exit_code == -signal.SIGXCPU:
                    break
        raise UnreadableImageError(reason)

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe_end(error: WorkerDiedError, limits: Limits) -> str:
    """Why a picture is to blame for the end of the process that decoded it; '' if it is not."""
    if error.exit_code == -signal.SIGXCPU:
        return f"takes longer than {limits.cpu_s} s to decode"
    return "its decoder crashed" if error.exit_code in _CRASHES else ""


def killed_message(n_workers: int) -> str:
    """What to do about a process that was killed.

    Args:
        n_workers: Processes to try next.
    """
    return (
        "a decoding process was killed, perhaps for lack of memory. Run the command again to "
        f"resume, with fewer processes: --workers {n_workers}"
    )


def require_free_memory(n_bytes: int, name: str) -> None:
    """Refuse to decode a picture that would take the memory of other processes.

    Args:
        n_bytes: What it takes.
        name: Its name in the message.

    Raises:
        DecodingError: If there is too little.
    """
    free = available_ram()
    if free is not None and n_bytes > free:
        raise DecodingError(
            f"image '{name}' needs {n_bytes / 1e9:.2f} GB of memory to decode, and {free / 1e9:.2f} GB are free. Close "
            "other programs, or save a smaller picture, and run the command again to resume"
        )


def _lower(kind: int, wanted: int) -> None:
    """Set a limit of this process, which no earlier limit may be below."""
    import resource

    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _data_bytes() -> int | None:
    """Memory that this process has allocated; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:")), None)
