"""Files of this machine that are there whole or not at all, also after a crash or a power cut."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

TEMPORARY_SUFFIX = ".partial"
"""Ending of a file that is still being written."""


@contextlib.contextmanager
def replacing(path: Path, *, sync_data: bool = True, sync_name: bool = True) -> Iterator[int]:
    """A new file descriptor whose bytes take the place of `path` at the end, in one step.

    Args:
        path: The file.
        sync_data: Whether the bytes are on disk before they get the name.
        sync_name: Whether the name is on disk at the end.
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
    """Write every byte: `os.write` may take fewer than it is given (Linux stops at 2 GiB)."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file whole or not at all, durably unless told otherwise."""
    with replacing(path, sync_data=durable, sync_name=durable) as file:
        write_all(file, data)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
