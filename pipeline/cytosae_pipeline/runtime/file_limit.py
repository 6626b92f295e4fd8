"""How many files this process may have open, and how many worker processes that allows."""

from pathlib import Path

from cytosae_cache.reading.open_files import descriptor_limit

_WANTED_FILES = 8192
_RESERVED_FILES = 24
"""Descriptors for the store, the images, libraries and the terminal."""


def raise_file_limit() -> None:
    """Let this process open as many files as the system permits it; macOS begins with 256."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED_FILES if hard == resource.RLIM_INFINITY else min(hard, _WANTED_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError):  # a lower limit of the system itself
            return


def affordable_workers(n_workers: int) -> int:
    """Worker processes for which there are descriptors; at least 1 if any are wanted.

    Args:
        n_workers: Those that are wanted.
    """
    return min(n_workers, max(1, free_files()))


def free_files() -> int:
    """Files that this process can open, beside a reserve for the store, libraries and the terminal."""
    allowed = descriptor_limit()
    if allowed is None:
        return _WANTED_FILES
    folder = Path("/dev/fd")
    n_open = sum(1 for _ in folder.iterdir()) if folder.is_dir() else _RESERVED_FILES
    return max(0, allowed - n_open - _RESERVED_FILES)
