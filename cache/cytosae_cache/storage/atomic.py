"""Atomic files on this machine: a file appears only once it is complete, even after a crash or a power cut."""

import contextlib
import ctypes
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
"""Suffix of a file that is still being written."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replacing(path: Path, *, sync_data: bool = True, sync_name: bool = True) -> Iterator[int]:
    """Open a temporary file that atomically replaces `path` at the end of the `with` block.

    Args:
        path: The file.
        sync_data: Whether to flush the bytes to disk before the file gets its name.
        sync_name: Whether to flush the name to disk at the end.

    Yields:
        File descriptor, open for writing.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            yield file
            if sync_data:
                os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


def write_all(file: int, data: memoryview | bytes) -> None:
    """Write every byte: `os.write` may write fewer than requested (Linux stops at 2 GiB)."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file atomically, and by default durably."""
    with replacing(path, sync_data=durable, sync_name=durable) as file:
        write_all(file, data)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable. Windows has no such call and does not need one."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def replacing_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Replace `path` with a file or folder that the caller, or another library, writes to a temporary path beside it.

    `path` is unchanged until the end of the `with` block. Partial files of killed processes are removed. A file is
    replaced atomically; a folder is first moved aside, and the next call moves it back if this process is killed at
    that instant.

    Args:
        path: The file or folder.
        durable: Whether to flush all bytes to disk before they get the name.

    Yields:
        Temporary path to write to.
    """
    _remove_strays(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    aside = path.with_name(f"{path.name}-old.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if durable:
            _sync_tree(temporary)
        if path.is_dir():
            path.rename(aside)
        try:
            temporary.replace(path)
        except OSError:
            if aside.exists():
                aside.rename(path)
            raise
    except BaseException:
        _remove(temporary)
        raise
    sync_folder(path.parent)
    _remove(aside)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; returns whether the system can."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def _remove_strays(path: Path) -> None:
    """Remove temporary files and folders of `path` whose process has ended, and our own."""
    for stray in path.parent.glob(f"{glob.escape(path.name)}*.*{TEMPORARY_SUFFIX}"):
        number = stray.name.removesuffix(TEMPORARY_SUFFIX).rpartition(".")[2]
        ours = stray.name in (f"{path.name}.{number}{TEMPORARY_SUFFIX}", f"{path.name}-old.{number}{TEMPORARY_SUFFIX}")
        if ours and number.isdecimal() and not _is_another_process(int(number)):
            if stray.name.startswith(f"{path.name}-old.") and not path.exists():
                stray.rename(path)
            else:
                _remove(stray)


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


def _sync_tree(path: Path) -> None:
    """Flush a file, or all files of a folder, to disk."""
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    for item in files:
        with item.open("r+b") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
