"""Where the files of one store lie: a folder of this machine, or a place that a URL names (remote.py).

Names are POSIX paths relative to the folder. A file is there whole or not at all.
"""

import contextlib
import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cytosae_cache.errors import StoreBusyError, StoreCorruptError
from cytosae_cache.storage.atomic import TEMPORARY_SUFFIX, replacing, sync_folder, write_all

Location = Path | str
"""A path of this machine, or a URL that fsspec knows such as `s3://bucket/store.zarr`."""

_DIRECT_ALIGNMENT = 512
"""Reads past the page cache must begin, end and land at multiples of this many bytes."""


class ReadableFile(Protocol):
    """An open file of a folder; its descriptor closes with the object."""

    n_bytes: int
    """Length."""

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill memory with the bytes from `offset` on.

        Raises:
            StoreCorruptError: If the file ends before.
        """


class StorageBackend(ABC):
    """The files of one store."""

    location: Location
    """Where it is, for people and for opening it again."""
    n_threads: int
    """Threads that read best at once."""
    checks_content: bool
    """Whether a resumed build reads finished shards again; else their length decides."""

    def __str__(self) -> str:
        return str(self.location)

    @abstractmethod
    def scan(self) -> int:
        """Bytes of the files below `activations`, once it is sure that nothing leads out of the folder.

        Raises:
            StoreCorruptError: If there is a link that leads out, a pipe, a socket or a device.
        """

    @abstractmethod
    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file's bytes.

        Raises:
            FileNotFoundError: If there is no such file.
            StoreCorruptError: If it is longer than `max_bytes`, or a link that leads out of the folder.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """A file's length; None if there is no such file."""

    @abstractmethod
    def names(self, prefix: str = "") -> list[str]:
        """All files whose name begins with `prefix`, sorted."""

    @abstractmethod
    def open(self, name: str, *, direct: bool = False) -> ReadableFile:
        """Open a file for reading at any place.

        Args:
            name: The file.
            direct: Whether to read past the page cache where the file system can do that.

        Raises:
            FileNotFoundError: If there is no such file.
        """

    @abstractmethod
    def write(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> None:
        """Write a file, replacing one of the same name in one step.

        Args:
            name: The file; folders are made.
            parts: Its bytes in order; nothing is copied.
            sync: Whether its bytes are on disk before it gets its name. The name itself is made durable by `sync`.

        Raises:
            OSError: If the disk is full or the folder cannot be written; nothing half-written stays.
        """

    @abstractmethod
    def remove(self, names: Iterable[str]) -> None:
        """Remove files; those that are not there are passed over."""

    @abstractmethod
    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""

    @abstractmethod
    def remove_partials(self) -> None:
        """Remove what a killed writer left half-written."""

    @abstractmethod
    def delete(self) -> None:
        """Remove the folder and everything in it."""

    @abstractmethod
    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Hold the right to write here; a crashed process does not keep it.

        Raises:
            StoreBusyError: If another process holds it.
        """


def open_storage(location: Location) -> StorageBackend:
    """The folder at a path or URL; nothing is looked up or made."""
    text = str(location)
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    if isinstance(location, str) and "://" in location:
        from cytosae_cache.storage.remote import RemoteStorage

        return RemoteStorage(location)
    return LocalStorage(Path(location))


class LocalStorage(StorageBackend):
    """A folder of this machine.

    Args:
        path: The folder.
    """

    n_threads = 4
    checks_content = True

    def __init__(self, path: Path) -> None:
        self.location = self.path = path

    def scan(self) -> int:
        """Bytes of the files below `activations`, once it is sure that nothing leads out of the folder."""
        root, n_bytes, folders = os.path.realpath(self.path), 0, [self.path]
        while folders:
            folder = folders.pop()
            counted = folder.is_relative_to(self.path / "activations")
            # What is gone by the time it is looked at was renamed or removed by a build that goes on meanwhile.
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                            raise StoreCorruptError(
                                f"'{entry.path}' is a link that leads out of the store: not followed"
                            )
                    elif entry.is_dir():
                        folders.append(Path(entry.path))
                    elif not entry.is_file() and os.path.lexists(entry.path):
                        raise StoreCorruptError(f"'{entry.path}' is neither a file nor a folder")
                    elif counted:
                        with contextlib.suppress(FileNotFoundError):
                            n_bytes += entry.stat().st_size
        return n_bytes

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file's bytes."""
        path = self._inside(name)
        if not path.is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError(path)
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise StoreCorruptError(f"'{path}' is larger than any metadata of this format ({max_bytes} bytes)")
        return path.read_bytes()

    def size(self, name: str) -> int | None:
        """A file's length; None if there is no such file."""
        path = self._inside(name)
        return path.stat().st_size if path.is_file() else None

    def names(self, prefix: str = "") -> list[str]:
        """All files whose name begins with `prefix`, sorted."""
        start = self.path / prefix.rpartition("/")[0]
        files = (path.relative_to(self.path).as_posix() for path in start.rglob("*") if not path.is_dir())
        return sorted(name for name in files if name.startswith(prefix))

    def open(self, name: str, *, direct: bool = False) -> "LocalFile":
        """Open a file for reading at any place."""
        return LocalFile(self._inside(name), direct=direct)

    def write(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> None:
        """Write a file, replacing one of the same name in one step."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync_data=sync, sync_name=False) as file:
            for part in parts:
                write_all(file, part)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files and folders that are empty then."""
        for name in names:
            path = self.path / name
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                path.parent.rmdir()

    def sync(self) -> None:
        """Sync the small files and all folders; shards are synced as they are written."""
        for folder, _, files in os.walk(self.path):
            if "/activations/c/" not in f"{Path(folder).as_posix()}/":
                for name in files:
                    with (Path(folder) / name).open("rb+") as file:
                        os.fsync(file.fileno())
            sync_folder(Path(folder))
        sync_folder(self.path.parent)

    def remove_partials(self) -> None:
        """Remove what a killed writer left half-written."""
        for stray in self.path.rglob(f"*{TEMPORARY_SUFFIX}"):
            stray.unlink(missing_ok=True)

    def delete(self) -> None:
        """Remove the folder and everything in it."""
        if self.path.exists():
            shutil.rmtree(self.path)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the right to write here, by a lock on a file beside the folder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as file:
            try:
                import fcntl
            except ImportError:  # Windows has no such locks; two builds at once are the user's care there
                yield
                return
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreBusyError(
                    f"another process is building '{self}' now. Wait for it to end, then type the command again"
                ) from None
            yield

    def _inside(self, name: str) -> Path:
        """The file's path, if it does not lead out of the folder."""
        path = self.path / name
        try:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
            inside = path.resolve().is_relative_to(self.path.resolve())
        except (OSError, ValueError) as error:
            raise StoreCorruptError(f"store '{self}' names a file that cannot be one: {name[:99]!r}") from error
        if not inside:
            raise StoreCorruptError(f"'{path}' leads out of the store: not followed")
        return path


class LocalFile:
    """An open file of this machine.

    Args:
        path: The file.
        direct: Whether to read past the page cache where the file system can and the request is aligned.

    Raises:
        FileNotFoundError: If there is no such file.
    """

    def __init__(self, path: Path, *, direct: bool = False) -> None:
        self._path, self._direct = path, -1
        self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        self.n_bytes = os.fstat(self._file).st_size
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # a file system without it, such as tmpfs
                self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill memory with the bytes from `offset` on."""
        if self._direct >= 0 and offset % _DIRECT_ALIGNMENT == 0 and is_aligned(view):
            try:
                done = os.preadv(self._direct, [view], offset)
                offset, view = offset + done, view[done:]
            except OSError as error:
                if error.errno != errno.EINVAL:  # a device with larger blocks: read through the page cache
                    raise
        while view:
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise StoreCorruptError(f"'{self._path}' ends before byte {offset}: it was cut off")
            view = view[count:]
            offset += count

    def __del__(self) -> None:
        for file in (getattr(self, "_file", -1), getattr(self, "_direct", -1)):
            if file >= 0:
                os.close(file)


def is_aligned(view: memoryview) -> bool:
    """Whether memory can be filled past the page cache."""
    array = np.frombuffer(view, dtype=np.uint8)
    return array.nbytes % _DIRECT_ALIGNMENT == 0 and int(array.ctypes.data) % _DIRECT_ALIGNMENT == 0
