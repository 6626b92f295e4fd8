"""A store's files in a folder on this machine."""

import contextlib
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.storage.atomic import (
    TEMPORARY_SUFFIX,
    may_be_written,
    put_if_new,
    replacing,
    start_flush,
    sync_file,
    sync_folder,
    write_all,
    writer_name,
)
from cytosae_cache.storage.base import StorageBackend, is_litter
from cytosae_cache.storage.disk import reading
from cytosae_cache.storage.inside import check_inside, open_inside
from cytosae_cache.storage.lock import locked

_DIRECT_ALIGNMENT = 512
"""Reads that bypass the page cache must start, end and be stored at multiples of this many bytes."""

_FLUSH_BYTES = 32 << 20
"""The disk begins with a file that will be synced whenever so many bytes were written."""

_SYNC_THREADS, _SYNCED_TOGETHER = 8, 4096
"""Files that are synced at once, and those whose folders are gathered first."""


class LocalStorage(StorageBackend):
    """A folder on this machine.

    Args:
        path: The folder.
    """

    n_threads = 4
    is_remote = False
    checks_content = True

    def __init__(self, path: Path) -> None:
        self.location = self.path = path

    def check_links(self) -> None:
        """Check that no link leads out of the folder; looks at every file."""
        root, folders = os.path.realpath(self.path), [os.fspath(self.path)]
        while folders:
            # A build may be running: files that it renames or removes between listing and looking are not an error.
            with contextlib.suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        if not Path(os.path.realpath(entry.path)).is_relative_to(root):
                            raise StoreCorruptError(
                                f"'{entry.path}' is a link that leads out of the store; it is not followed"
                            )
                    elif entry.is_dir():
                        folders.append(entry.path)
                    elif not entry.is_file() and os.path.lexists(entry.path):
                        raise StoreCorruptError(f"'{entry.path}' is neither a file nor a folder")

    def read(self, name: str, *, max_bytes: int | None = None) -> bytes:
        """Read a whole file."""
        path = self._inside(name)
        if not path.is_file():  # opening a pipe would block forever
            if path.exists() and not path.is_dir():
                raise StoreCorruptError(f"'{path}' is neither a file nor a folder")
            raise FileNotFoundError(path)
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise StoreCorruptError(f"'{path}' is larger than any metadata of this format may be ({max_bytes:,} bytes)")
        with reading(path):
            return path.read_bytes()

    def size(self, name: str) -> int | None:
        """Length of a file in bytes; None if it does not exist."""
        path = self._inside(name)
        return path.stat().st_size if path.is_file() else None

    def names(self, prefix: str = "", *, with_litter: bool = False) -> list[str]:
        """Names of all files that start with `prefix`, sorted."""
        start = self.path / prefix.rpartition("/")[0]
        files = (path.relative_to(self.path).as_posix() for path in start.rglob("*") if not path.is_dir())
        return sorted(name for name in files if name.startswith(prefix) and (with_litter or not is_litter(name)))

    def open(self, name: str, *, direct: bool = False, n_bytes: int | None = None) -> "LocalFile":
        """Open a file for reads at any offset; its length is that of the open file."""
        return LocalFile(self.path / name, open_inside(self.path, name), direct=direct)

    def write(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> None:
        """Write a file atomically, replacing an existing one of the same name."""
        self._put(name, parts, sync=sync, put=Path.replace)

    def create(self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool = False) -> bool:
        """Write a file atomically unless there is one of that name; returns whether it was written."""
        done: list[bool] = []
        self._put(name, parts, sync=sync, put=lambda temporary, path: done.append(put_if_new(temporary, path)))
        return done[0]

    def _put(
        self, name: str, parts: Sequence[memoryview | bytes], *, sync: bool, put: Callable[[Path, Path], object]
    ) -> None:
        """Write a file under a name of this writer's own, and give it its name."""
        path = self._inside(name, folder=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=sync, temporary=writer_name(path), put=put) as file:
            written = flushed = 0
            for piece in _iter_pieces(parts):
                write_all(file, piece)
                written += len(piece)
                if sync and written - flushed >= _FLUSH_BYTES:
                    start_flush(file, flushed, written - flushed)
                    flushed = written

    def remove(self, names: Iterable[str]) -> None:
        """Remove files, and folders that become empty."""
        folders: set[Path] = set()
        for name in names:
            path = self.path / name
            if path.parent not in folders:
                self._inside(name, folder=True)
                folders.add(path.parent)
            path.unlink(missing_ok=True)
        for folder in sorted(folders, reverse=True):  # those inside others first
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()

    def sync(self, names: Iterable[str], *, contents: bool = True) -> None:
        """Sync files and the folders that they are in, up to the one that contains this folder."""
        left = iter(names)
        # At once: the disk carries out requests that arrive together with one flush.
        with ThreadPoolExecutor(_SYNC_THREADS, thread_name_prefix="sync") as pool:
            while some := list(itertools.islice(left, _SYNCED_TOGETHER)):
                if contents:
                    list(pool.map(sync_file, (self.path / name for name in some)))
                folders = {folder for name in some for folder in PurePosixPath(name).parents}
                list(pool.map(sync_folder, (self.path / folder for folder in folders)))
        sync_folder(self.path.parent)

    def remove_partials(self, *, of_everyone: bool = False) -> None:
        """Remove the partial files that killed writers left."""
        for stray in self.path.rglob(f"*{TEMPORARY_SUFFIX}"):
            if of_everyone or not may_be_written(stray):
                stray.unlink(missing_ok=True)

    def delete(self) -> None:
        """Delete the folder with everything in it, its metadata first: half of it never passes for a store."""
        real = Path(os.path.realpath(self.path))
        if real.exists():
            (real / "zarr.json").unlink(missing_ok=True)
            shutil.rmtree(real)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the exclusive right to write here, by a lock on a file beside the folder."""
        with locked(self.path.with_name(f"{self.path.name}.lock"), str(self)):
            yield

    def _inside(self, name: str, *, folder: bool = False) -> Path:
        """Path of a file, checked to lie inside the folder; if `folder`, only its folder is: the file may be new."""
        check_inside(self.path, name.rpartition("/")[0] if folder else name)
        return self.path / name


def _iter_pieces(parts: Iterable[memoryview | bytes]) -> Iterator[memoryview]:
    """The same bytes in pieces of at most `_FLUSH_BYTES`."""
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _FLUSH_BYTES):
            yield view[start : start + _FLUSH_BYTES]


class LocalFile:
    """An open file on this machine.

    Args:
        path: The file, for messages.
        file: Its descriptor, open for reading, which closes with this object.
        direct: Whether to bypass the page cache where the file system supports it and the request is aligned.
    """

    def __init__(self, path: Path, file: int, *, direct: bool = False) -> None:
        self._path, self._file, self._direct = path, file, -1
        status = os.fstat(file)
        self.n_bytes, self.stamp = status.st_size, (status.st_size, status.st_mtime_ns)
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # not supported by the file system, such as tmpfs
                # The same file again, whatever has its name by now.
                self._direct = os.open(f"/proc/self/fd/{file}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self.n_descriptors = 1 if self._direct < 0 else 2

    def read_at(self, offset: int, view: memoryview) -> None:
        """Fill memory with the bytes that start at `offset`."""
        if self._direct >= 0 and offset % _DIRECT_ALIGNMENT == 0 and is_aligned(view):
            try:
                done = os.preadv(self._direct, [view], offset)
                offset, view = offset + done, view[done:]
            except OSError as error:
                if error.errno != errno.EINVAL:  # the device has larger blocks: read through the page cache
                    error.filename = str(self._path)
                    raise
        while view:
            try:
                count = os.preadv(self._file, [view], offset)
            except OSError as error:  # an error of an open file does not name it
                error.filename = str(self._path)
                raise
            if not count:
                raise StoreCorruptError(f"'{self._path}' ends before byte {offset}: it was truncated")
            view = view[count:]
            offset += count

    def __del__(self) -> None:
        for file in (getattr(self, "_file", -1), getattr(self, "_direct", -1)):
            if file >= 0:
                os.close(file)


def is_aligned(view: memoryview) -> bool:
    """Whether memory is aligned for reads that bypass the page cache."""
    array = np.frombuffer(view, dtype=np.uint8)
    return array.nbytes % _DIRECT_ALIGNMENT == 0 and int(array.ctypes.data) % _DIRECT_ALIGNMENT == 0
