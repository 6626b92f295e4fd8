"""Errors of the disk: recognised whatever library wrote, and explained in one message that names the place."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cytosae_cache.errors import StoreError, WriteError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_ALLOWED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_PLACE = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EINVAL}
WRITING_ONLY = {*_FULL, errno.EFBIG, errno.EROFS}
"""Errors that only writing can have."""

_NOT_OF_DISKS = (ConnectionError, ChildProcessError, BlockingIOError, InterruptedError)


@contextlib.contextmanager
def writing(place: Path, name: str = "") -> Iterator[None]:
    """Explain an error of the disk that occurs while something is written.

    Args:
        place: What is written: a file or folder, with everything beside it whose name begins like its name.
        name: What the message calls it; by default the place.

    Raises:
        WriteError: If the disk is full, read-only or fails. Other errors, and those of other places, pass.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = find_disk_error(error, place)
        if code is None:
            raise
        raise WriteError(explain(f"'{name or place}'", place, code), code, place) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the file in errors of reading it; those of an open file do not.

    Raises:
        OSError: With `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def find_disk_error(error: BaseException, place: Path) -> int | None:
    """The `errno` of the disk behind an error of writing; None for other errors, and for errors of other places.

    Args:
        error: The error. torch raises a `RuntimeError` in place of the disk's, which is then its context.
        place: As for `writing`.
    """
    if isinstance(error, StoreError) or not (isinstance(error, OSError) or type(error) is RuntimeError):
        return None
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, OSError) and cause.errno):
        cause = None if isinstance(cause, OSError) else cause.__cause__ or cause.__context__
    if not isinstance(cause, OSError) or isinstance(cause, _NOT_OF_DISKS) or not _concerns(cause, place):
        return None
    return cause.errno


def explain(what: str, place: Path, code: int, *, kept: str = "", again: str = "run the command again") -> str:
    """What is wrong with the disk, and what to do.

    Args:
        what: What cannot be written.
        place: Where that is, for its free space.
        code: The `errno`.
        kept: What is there nevertheless, such as `Finished work is kept`.
        again: What to do at last.
    """
    reason = f"{what} cannot be written: {os.strerror(code)}"
    if code in _NOT_ALLOWED:
        return f"{reason}. Make the folder writable, or use another --root_dir or --out"
    if code in _NO_PLACE:
        return f"{reason}. Use another --root_dir or --out"
    step = "check the disk"
    if code in _FULL:
        reason, step = f"{reason} ({_describe_free(place)} free)", "free some space"
    elif code == errno.EFBIG:
        step = "raise the limit on the size of files (ulimit -f)"
    sentence = f"{step}, then {again}"
    return f"{reason}. {kept}: {sentence}" if kept else f"{reason}. {sentence[0].upper()}{sentence[1:]}"


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in [path, *path.absolute().parents] if place.exists())


def format_bytes(n_bytes: float) -> str:
    """A size as text, in powers of 1000: `16.4 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "bytes" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def _describe_free(place: Path) -> str:
    """Free space at a place; of a disk that is gone there is none."""
    try:
        return format_bytes(shutil.disk_usage(existing_folder(place)).free)
    except OSError:
        return "0 bytes"


def _concerns(error: OSError, place: Path) -> bool:
    """Whether an error concerns a place; errors of writing to an open file do not name one."""
    if not isinstance(error.filename, str | bytes | os.PathLike):
        return True
    named, here = Path(os.fsdecode(error.filename)).absolute(), place.absolute()
    return str(named).startswith(str(here)) or here.is_relative_to(named)
