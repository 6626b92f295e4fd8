"""What a store needs from the place where its files are: the contract of every storage backend.

Names are POSIX paths relative to the store's root. Writing is atomic: a file appears only once it is complete.
"""

import contextlib
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from cytosae_cache.errors import StoreBusyError

Item = TypeVar("Item")
Result = TypeVar("Result")

_REQUESTED_TOGETHER = 1000
_PAUSES_S = 0.05, 0.5

Location = Path | str
"""A path on this machine, or a URL that fsspec knows, such as `s3://bucket/store.zarr`."""


_LITTER_NAMES = frozenset({".ds_store", ".localized", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_LITTER_STARTS = ("._", ".nfs", ".fuse_hidden", ".smbdelete")
_LITTER_FOLDERS = frozenset(
    {
        "__macosx", "@eadir", ".appledouble", ".temporaryitems", ".trashes", ".spotlight-v100", ".fseventsd",
        ".ipynb_checkpoints", ".snapshot", "$recycle.bin", "system volume information", "lost+found",
    }
)  # fmt: skip


def is_litter(name: str) -> bool:
    """Whether a file is one that operating systems, network folders and editors leave everywhere, such as .DS_Store.

    Args:
        name: POSIX path relative to the store's root.
    """
    *folders, file = name.casefold().split("/")
    return file in _LITTER_NAMES or file.startswith(_LITTER_STARTS) or not _LITTER_FOLDERS.isdisjoint(folders)


class ReadableFile(Protocol):
    """An open file of a store; its descriptor closes with the object."""

    n_descriptors: int
    """Descriptors of the operating system that it holds."""

    @property
    def n_bytes(self) -> int:
        """Length.

        Raises:
            FileNotFoundError: If the file does not exist.
        """

    @property
    def stamp(self) -> tuple[int, int]:
        """Length and time of the last change in nanoseconds: another file of the same name has other ones.

        Zeros where only a request would tell.
        """

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill memory with the bytes that start at `offset`.

        Raises:
            StoreCorruptError: If the file ends before the memory is full.
        """


class StorageBackend(ABC):
    """The files of one store."""

    location: Location
    """Where the files are: for messages, and for opening the same storage again."""
    n_threads: int
    """Number of concurrent reads that gives the best throughput."""
    is_remote: bool
    """Whether every question is a request over a network."""
    checks_content: bool
    """Whether a resumed build reads finished shards again; if not, it compares only their length."""

    def __str__(self) -> str:
        return str(self.location)

    @abstractmethod
    def check_links(self) -> None:
        """Check that no link leads out of the store; looks at every file.

        Reading, writing and removing a file check its own links. This is for what hands over the whole store.

        Raises:
            StoreCorruptError: If a link leads out of the store, or an entry is neither a file nor a folder.
        """

    @abstractmethod
    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole file.

        Raises:
            FileNotFoundError: If the file does not exist.
            StoreCorruptError: If it is longer than `max_bytes`, or a link that leads out of the store.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Length of a file in bytes; None if it does not exist."""

    @abstractmethod
    def names(self, prefix: str = "", *, with_litter: bool = False) -> list[str]:
        """Names of all files that start with `prefix`, sorted.

        Args:
            prefix: First characters of the names.
            with_litter: Also name the files that `is_litter` recognises.
        """

    @abstractmethod
    def open(self, name: str, *, direct: bool = False, n_bytes: int | None = None) -> ReadableFile:
        """Open a file for reads at any offset; quick, so that readers may wait for each other.

        Args:
            name: The file.
            direct: Whether to bypass the page cache where the file system supports it.
            n_bytes: Its length where that is known, which saves a request where only a request would tell.

        Raises:
            FileNotFoundError: If the file does not exist; where only a request would tell, by the file's `n_bytes`.
            StoreCorruptError: If it is a link that leads out of the store, or neither a file nor a link.
        """

    @abstractmethod
    def write(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> None:
        """Write a file atomically, replacing an existing one of the same name.

        Args:
            name: The file; missing folders are created.
            parts: Its bytes in order; nothing is copied.
            sync: Whether to flush the bytes to disk before the file gets its name. Only `sync()` makes the name itself
                durable.

        Raises:
            OSError: If the disk is full or the store is not writable; no partial file remains.
            StoreCorruptError: If a link leads out of the store.
        """

    @abstractmethod
    def create(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> bool:
        """Write a file atomically unless there is one of that name; of several writers, one wins.

        Args:
            name: The file; missing folders are created.
            parts: Its bytes in order.
            sync: As for `write`.

        Returns:
            Whether it was written.

        Raises:
            OSError: As `write`.
            StoreCorruptError: As `write`.
        """

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files; missing ones are ignored.

        Raises:
            StoreCorruptError: If a folder is a link that leads out of the store.
        """

    @abstractmethod
    def sync(self, names: Iterable[str], *, contents: bool = True) -> None:
        """Return once these files and their names would survive a power cut.

        Args:
            names: Files that were written.
            contents: Whether to flush their bytes, too; not needed for those that were written with `sync`.
        """

    @abstractmethod
    def remove_partials(self, *, of_everyone: bool = False) -> None:
        """Remove the partial files that killed writers left.

        Args:
            of_everyone: Remove those of writers that may be at work, too: nothing that they write is needed any more.
        """

    @abstractmethod
    def delete(self) -> None:
        """Delete the store with everything in it."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the exclusive right to write here; the lock of a crashed process is released.

        Raises:
            StoreBusyError: If another process holds the lock.
        """


@contextlib.contextmanager
def waiting_for_lock(storage: StorageBackend, patience_s: float = 600.0) -> Iterator[None]:
    """Hold the storage's lock, which others hold for a moment only.

    Args:
        storage: The storage.
        patience_s: How long to wait for them.

    Raises:
        StoreBusyError: If another process holds it for longer.
    """
    end = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(storage.lock())
                break
            except StoreBusyError:
                if time.monotonic() > end:
                    raise
                time.sleep(random.uniform(*_PAUSES_S))  # noqa: S311 - not cryptographic
        yield


def map_requests(
    storage: StorageBackend, function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Result]:
    """`function` of every item, in order; several at once where each is a request.

    Args:
        storage: What the function asks.
        function: The function; may be called by other threads.
        items: Its arguments.

    Yields:
        Its results; no more of them are in memory than one thousand.
    """
    if not storage.is_remote:
        yield from map(function, items)
        return
    left = iter(items)
    with ThreadPoolExecutor(storage.n_threads, thread_name_prefix="requests") as pool:
        while some := list(itertools.islice(left, _REQUESTED_TOGETHER)):
            yield from pool.map(function, some)
