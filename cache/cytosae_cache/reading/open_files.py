"""The files that a process keeps open for reading: one budget of descriptors for all readers."""

import errno
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, TypeVar, cast

_MOST_DESCRIPTORS = 4096
"""Most descriptors, however many the system allows."""

_RESERVED_DESCRIPTORS = 32
"""Descriptors that are left to everything else, before the rest is divided by two."""

_LEAST_DESCRIPTORS = 8


class HoldsDescriptors(Protocol):
    """Something open; its descriptors close with the object."""

    n_descriptors: int
    """Descriptors of the operating system that it holds."""


File = TypeVar("File", bound=HoldsDescriptors)


class OpenFiles:
    """Open files of any number of readers; the least recently used are closed first.

    Args:
        most: Most descriptors; by default half of what the system allows at the time. That limit is never raised: code
            that calls `select` may share the process, and fails on descriptors above 1,023.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most = most
        self._files: OrderedDict[tuple[int, int], HoldsDescriptors] = OrderedDict()
        self._n_descriptors = 0
        # Reentrant: Python may collect a reader, which releases its files, while this thread is in here.
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, key: tuple[int, int], open_file: Callable[[], File]) -> File:
        """The file of a reader, opened if it is not open yet.

        Where the system allows no further open file, others are closed first.

        Args:
            key: Number of the reader, and of the file.
            open_file: Opens it.

        Raises:
            OSError: If the file cannot be opened, or the system allows no open file at all.
        """
        with self._lock:
            file = cast("File | None", self._files.get(key))
            if file is not None:
                self._files.move_to_end(key)
                return file
            while file is None:
                try:
                    file = open_file()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                        raise
                    self._most = self._n_descriptors // 2
                    self._close_oldest()
            self._files[key] = file
            self._n_descriptors += _cost(file)
            self._close_oldest(but=1)
            return file

    def release(self, number: int) -> None:
        """Close the files of a reader."""
        with self._lock:
            for key in [key for key in list(self._files) if key[0] == number]:
                self._forget(key)

    def _close_oldest(self, *, but: int = 0) -> None:
        """Close files until the rest is within the budget, or only `but` are left."""
        most = _allowed_descriptors() if self._most is None else min(self._most, _allowed_descriptors())
        while self._n_descriptors > most and len(self._files) > but:
            self._forget(next(iter(self._files)))

    def _forget(self, key: tuple[int, int]) -> None:
        """A thread may still be reading from the file: its descriptors close with the last reference."""
        file = self._files.pop(key, None)
        if file is not None:
            self._n_descriptors -= _cost(file)


def _cost(file: HoldsDescriptors) -> int:
    """Descriptors that a file counts as; a remote one has none, but takes memory, and counts, too."""
    return max(1, file.n_descriptors)


def descriptor_limit() -> int | None:
    """Descriptors that the system allows this process now; None if it sets or tells no limit."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if allowed == resource.RLIM_INFINITY else allowed


def _allowed_descriptors() -> int:
    """Descriptors that readers may hold: half of what the system allows this process now."""
    allowed = descriptor_limit()
    if allowed is None:
        return _MOST_DESCRIPTORS
    return max(_LEAST_DESCRIPTORS, min(_MOST_DESCRIPTORS, (allowed - _RESERVED_DESCRIPTORS) // 2))


_of_process = OpenFiles()


def get_open_files() -> OpenFiles:
    """The open files of this process; a forked child has its own."""
    return _of_process


def _start_afresh() -> None:
    """In a forked child: let go of the parent's descriptors, and of its lock, which another thread may have held."""
    global _of_process
    _of_process = OpenFiles()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
