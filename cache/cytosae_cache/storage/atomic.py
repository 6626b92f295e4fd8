"""Atomic files on this machine: a file appears only once it is complete, even after a crash or a power cut."""

import contextlib
import ctypes
import glob
import hashlib
import os
import platform
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cytosae_cache.storage.disk import writing

TEMPORARY_SUFFIX = ".partial"
"""Suffix of a file that is still being written."""

_AT_FDCWD, _RENAME_EXCHANGE, _SYNC_FILE_RANGE_WRITE = -100, 2, 2


@contextlib.contextmanager
def replacing(
    path: Path,
    *,
    sync: bool = True,
    temporary: Path | None = None,
    put: Callable[[Path, Path], object] = Path.replace,
) -> Iterator[int]:
    """Open a temporary file that atomically replaces `path` at the end of the `with` block.

    Args:
        path: The file.
        sync: Whether to flush the bytes to disk before the file gets its name. Only `sync_folder` makes that durable.
        temporary: The temporary file, by default one that is named after this process.
        put: Gives the temporary file its name.

    Yields:
        File descriptor, open for writing.

    Raises:
        WriteError: If the disk is full, read-only or fails; the file is unchanged.
    """
    temporary = temporary or temporary_name(path)
    with writing(path):
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            try:
                yield file
                if sync:
                    os.fsync(file)
            finally:
                os.close(file)
            put(temporary, path)
        except BaseException:
            discard(temporary)
            raise


def put_if_new(temporary: Path, path: Path) -> bool:
    """Give a temporary file its name, unless there is something of that name; of several processes, one succeeds.

    Returns:
        Whether it has the name now; if not, it is gone.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        discard(temporary)
        return False
    except OSError:  # no hard links, or the file was swept away: then all is done, and the name is taken
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            discard(temporary)
            return False
        temporary.replace(path)
        return True
    discard(temporary)
    return True


def write_all(file: int, data: memoryview | bytes) -> None:
    """Write every byte: `os.write` may write fewer than requested (Linux stops at 2 GiB)."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def start_flush(file: int, offset: int, n_bytes: int) -> None:
    """Let the disk begin with bytes that were just written, so that syncing them later takes less time.

    Elsewhere than on Linux nothing happens. Not `posix_fadvise`, which begins, too, but then waits for all processors.
    """
    if (begin := _find_function("sync_file_range")) is not None:
        range_and_flags = (ctypes.c_int64(offset), ctypes.c_int64(n_bytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
        begin(ctypes.c_int(file), *range_and_flags)  # an error of the disk is reported by the sync


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file atomically, and by default durably, as `replacing_path`.

    Raises:
        WriteError: If the disk is full, read-only or fails; the file is unchanged.
    """
    with replacing_path(path, durable=durable) as temporary:
        temporary.write_bytes(data)


def create_file(path: Path, data: bytes, *, mode: int = 0o666) -> bool:
    """Create a small file atomically and durably, unless something has its name; return whether it was created.

    Args:
        path: The file.
        data: Its bytes.
        mode: Its permissions, before the umask.

    Raises:
        WriteError: If the disk is full, read-only or fails.
    """
    if os.path.lexists(path):  # before anything is written: the folder may be read-only by now
        return False
    temporary = temporary_name(path)
    with writing(path):
        remove_strays(path)
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            try:
                write_all(file, data)
                os.fsync(file)
            finally:
                os.close(file)
            if not put_if_new(temporary, path):
                return False
        finally:
            discard(temporary)
        sync_folder(path.parent)
    return True


def make_folder(path: Path) -> None:
    """Create a folder, and the folders above it, if they are missing.

    Raises:
        WriteError: If that is not possible.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable. Windows has no such call and does not need one."""
    if os.name == "nt":
        return
    sync_file(folder)


@contextlib.contextmanager
def replacing_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Replace `path` with a file or folder that the caller, or another library, writes to a temporary path beside it.

    `path` is unchanged until the end of the `with` block, and then replaced in one step. Partial files of killed
    processes are removed. Where the system cannot exchange two folders, a folder is first moved aside; the next call
    moves it back if this process is killed at that instant.

    Args:
        path: The file or folder.
        durable: Whether to flush all bytes to disk before they get the name.

    Yields:
        Temporary path to write to.

    Raises:
        WriteError: If the disk is full, read-only or fails; `path` is unchanged.
    """
    temporary = temporary_name(path)
    with writing(path):
        remove_strays(path)
        try:
            yield temporary
            if durable:
                sync_tree(temporary)
            _put_in_place(temporary, path, durable=durable)
        except BaseException:
            discard(temporary)
            raise
    discard(temporary)
    discard(aside_name(path))


def _put_in_place(temporary: Path, path: Path, *, durable: bool) -> None:
    """Give the temporary its name; what had it before gets that of the temporary, or of the path moved aside."""
    was_there = os.path.lexists(path)
    keep_mode(path, temporary)
    exchanged = was_there and exchange(temporary, path)
    if not exchanged:
        aside = aside_name(path)
        if path.is_dir():
            path.rename(aside)
        try:
            temporary.replace(path)
        except OSError:
            if aside.exists():
                aside.rename(path)
            raise
    try:
        if durable:
            sync_folder(path.parent)
    except OSError:  # taken back: what the same command finds when it is run again is what it found before
        if exchanged:
            exchange(temporary, path)
        elif not was_there:
            path.rename(temporary)
        raise


def keep_mode(path: Path, temporary: Path) -> None:
    """Give what replaces a file or folder its permissions: what the user closed to others stays closed."""
    with contextlib.suppress(OSError):
        shutil.copymode(path, temporary)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns whether the system can."""
    rename = _find_function("renameat2")
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _find_function(name: str) -> Any:  # noqa: ANN401 - a function of the C library
    """A function of the C library that Python does not offer; None elsewhere than on Linux, and where it is missing."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None) if sys.platform == "linux" else None


def temporary_name(path: Path, pid: int | None = None) -> Path:
    """Where a process, by default this one, writes what will replace `path`."""
    return path.with_name(f"{path.name}.{os.getpid() if pid is None else pid}{TEMPORARY_SUFFIX}")


def writer_name(path: Path) -> Path:
    """A name that no other process, on this or another machine, uses to write what will be `path`."""
    return path.with_name(f"{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")


def may_be_written(temporary: Path) -> bool:
    """Whether a file that `writer_name` named may belong to a process that is still there, on whatever machine."""
    host, _, rest = temporary.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2].partition("-")
    number = rest.partition("-")[0]
    if not number.isdecimal():  # of another kind
        return False
    return host != _host() or int(number) == os.getpid() or _is_another_process(int(number))


def _host() -> str:
    """This machine, in eight characters that any file system takes."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def aside_name(path: Path, pid: int | None = None) -> Path:
    """Where a process, by default this one, moves `path` while it is replaced."""
    return path.with_name(f"{path.name}-old.{os.getpid() if pid is None else pid}{TEMPORARY_SUFFIX}")


def remove_strays(path: Path) -> None:
    """Remove temporary files and folders of `path` whose process has ended, and our own, where that is possible."""
    for stray in path.parent.glob(f"{glob.escape(path.name)}*.*{TEMPORARY_SUFFIX}"):
        number = stray.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]
        ours = stray.name in (f"{path.name}.{number}{TEMPORARY_SUFFIX}", f"{path.name}-old.{number}{TEMPORARY_SUFFIX}")
        if ours and number.isdecimal() and not _is_another_process(int(number)):
            if stray.name.startswith(f"{path.name}-old.") and not os.path.lexists(path):
                stray.rename(path)
            else:
                discard(stray)


def _is_another_process(number: int) -> bool:
    """Whether a process with this number, other than this one, may be running."""
    if number == os.getpid():
        return False
    if os.name == "nt":  # on Windows, signal 0 would terminate it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def sync_tree(path: Path) -> None:
    """Flush a file, or all files and folders of a folder, to disk."""
    for item in [path] if path.is_file() else [*path.rglob("*"), path]:
        if item.is_file() or (item.is_dir() and os.name != "nt"):
            sync_file(item)


def sync_file(path: Path) -> None:
    """Flush one file or folder to disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove a temporary file or folder; where the disk refuses, the next run does it."""
    with contextlib.suppress(OSError):
        remove(path)
