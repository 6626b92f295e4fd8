"""One image file on disk: its stamp when it was listed, and its bytes if it is still that file."""

import errno
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from cytosae_pipeline.errors import UserError

MAX_FILE_BYTES = 1 << 30
"""Larger files are refused without reading them."""

CHANGED = "changed while the build was running"
"""Beginning of the reason for a file that is no longer the one that was listed."""

VANISHED = "vanished while the build was running"
"""Reason for a file that existed when it was listed."""

_STAMPING_THREADS, _STAMPED_TOGETHER = 16, 256

_RETRY_DELAYS_S = (0.1, 0.5, 2.0)
_PERMANENT = frozenset(
    {
        errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG,
        errno.EINVAL, errno.ENXIO, errno.ENODEV, errno.EILSEQ, errno.EOVERFLOW,
    }
)  # fmt: skip


class FileStamp(NamedTuple):
    """What distinguishes a file from another one of the same name, without reading it."""

    n_bytes: int
    """Length."""
    mtime_ns: int
    """Time of the last modification, in nanoseconds."""


class UnusableFileError(ValueError):
    """A file cannot be used as it is; the message is a short reason without its path."""


class SourceError(UserError):
    """A file cannot be read at the moment, though perhaps later."""


def stamp_file(path: Path | str) -> FileStamp | None:
    """The stamp of a regular file, links followed; None if there is none.

    Raises:
        OSError: If the disk fails, so that it is unknown whether there is a file.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - a path as text is several times as fast
    except OSError as error:
        if _is_transient(error):
            raise
        return None
    return _stamp(status) if stat.S_ISREG(status.st_mode) else None


def stamp_files(root: Path, names: Sequence[str]) -> list[FileStamp | None]:
    """`stamp_file` of many files, several at once: on a network folder each takes a while.

    Args:
        root: Folder that the names start from.
        names: The files.

    Raises:
        OSError: If the disk fails, so that it is unknown whether there is a file.
    """
    start = f"{root}/"
    parts = [names[first : first + _STAMPED_TOGETHER] for first in range(0, len(names), _STAMPED_TOGETHER)]
    with ThreadPoolExecutor(_STAMPING_THREADS, thread_name_prefix="stamps") as pool:
        found = pool.map(lambda part: [stamp_file(start + name) for name in part], parts)
        return [stamp for part in found for stamp in part]


def read_file(path: Path, seen: FileStamp | None, name: str) -> bytes:
    """The bytes of a file that did not change while it was read. Transient errors are retried a few times.

    Args:
        path: The file.
        seen: Its stamp when it was listed; None to skip the comparison.
        name: Name of the file in messages.

    Raises:
        UnusableFileError: If it is missing, not a regular file, too large, unreadable, or not the file that was listed.
        SourceError: If the disk fails repeatedly.
    """
    for delay_s in (*_RETRY_DELAYS_S, None):
        try:
            return _read(path, seen)
        except FileNotFoundError as error:
            raise UnusableFileError(VANISHED if seen is not None else "file not found") from error
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if not _is_transient(error):
                raise UnusableFileError(f"cannot be read: {reason}") from error
            if delay_s is None:
                raise SourceError(
                    f"image '{name}' cannot be read at the moment: {reason} ({len(_RETRY_DELAYS_S) + 1} attempts). "
                    "Finished work is kept: run the command again to resume. To exclude the "
                    "image permanently, put an empty file in its place"
                ) from error
            time.sleep(delay_s)
    raise AssertionError("the last attempt returns or raises")


def _read(path: Path, seen: FileStamp | None) -> bytes:
    """One attempt."""
    # Not blocking: opening a pipe would wait forever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    file = os.open(path, flags)
    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode):
            raise UnusableFileError("cannot be read: not a file")
        if seen is not None:
            _compare(seen, _stamp(before))
        if before.st_size > MAX_FILE_BYTES:
            raise UnusableFileError(f"the file is larger than {MAX_FILE_BYTES} bytes")
        # One byte more than its size, so that a growing file is noticed and never fills memory.
        parts, left = [], before.st_size + 1
        while left and (part := os.read(file, left)):
            parts.append(part)
            left -= len(part)
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        _compare(_stamp(before), _stamp(os.fstat(file)))
    finally:
        os.close(file)
    if len(data) != before.st_size:
        _compare(_stamp(before), FileStamp(len(data), before.st_mtime_ns))
    return data


def _compare(then: FileStamp, now: FileStamp) -> None:
    """Refuse a file that changed."""
    if now.n_bytes != then.n_bytes:
        raise UnusableFileError(f"{CHANGED}: {then.n_bytes:,} bytes when it was listed, {now.n_bytes:,} now")
    if now.mtime_ns != then.mtime_ns:
        raise UnusableFileError(f"{CHANGED}: it was written to after it was listed")


def _stamp(status: os.stat_result) -> FileStamp:
    return FileStamp(status.st_size, status.st_mtime_ns)


def _is_transient(error: OSError) -> bool:
    """Whether an error may be gone at the next attempt: every error that is not about the file itself."""
    return error.errno is not None and error.errno not in _PERMANENT
