"""The place of a store that is about to be written: its free space, what is there already, and errors of its disk."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cytosae_cache.errors import StoreError
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.storage.base import Location
from cytosae_pipeline import __version__
from cytosae_pipeline.runtime.progress import format_bytes


def existing_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in [path, *path.absolute().parents] if place.exists())


def free_bytes(store: Location) -> int | None:
    """Free disk at the place of a store; None for remote storage."""
    return None if isinstance(store, str) else shutil.disk_usage(existing_folder(store)).free


def require_space(store: Location, n_bytes: int, advice: str) -> None:
    """Refuse a store that is larger than the free disk.

    Args:
        store: Place of the store.
        n_bytes: Bytes of its activations, uncompressed.
        advice: What the user can do, a sentence for the message.

    Raises:
        StoreError: If it is larger; never for remote storage.
    """
    free = free_bytes(store)
    if free is not None and n_bytes > free:
        raise StoreError(
            f"the store needs {format_bytes(n_bytes)}, but only {format_bytes(free)} are free at '{store}'. {advice}"
        )


def make_provenance(dataset: str, list_digest: str, device: str = "") -> Provenance:
    """The origin of a store that is created now, or at `SOURCE_DATE_EPOCH` if that is set.

    Args:
        dataset: Name of the data set.
        list_digest: Digest of its list of images.
        device: Kind of device that computes the activations; '' if none does.
    """
    stamp = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    return Provenance(dataset, list_digest, __version__, datetime.fromtimestamp(stamp, UTC).isoformat(), device)


def resume_advice(*, overwrite: bool) -> str:
    """What to do after an error that left finished work.

    Args:
        overwrite: Whether the command was told to delete what is there.
    """
    return f"run the command again{' without --overwrite' if overwrite else ''} to resume"


@contextlib.contextmanager
def disk_messages(store: Location, *, overwrite: bool = False) -> Iterator[None]:
    """Turn errors of the disk into messages that say where and what to do; those of remote storage already do.

    Args:
        store: Place of the store that is written inside the context.
        overwrite: Whether the command was told to delete what is there, which must not be repeated to resume.

    Raises:
        StoreError: If the disk is full, read-only or fails.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError) or isinstance(store, str) or not _concerns(error, store):
            raise
        reason = error.strerror or type(error).__name__
        where = f"store '{store}' cannot be written: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"{where} ({format_bytes(free_bytes(store) or 0)} free). Finished work is kept: free some space, then "
                + resume_advice(overwrite=overwrite)
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreError(f"{where}. Make the folder writable, or use another --root_dir") from error
        raise StoreError(f"{where}. Finished work is kept: {resume_advice(overwrite=overwrite)}") from error


def _concerns(error: OSError, store: Path) -> bool:
    """Whether an error concerns the store's folder; errors of writing to an open file do not name one."""
    if not isinstance(error.filename, str):
        return True
    place = Path(error.filename).absolute()
    return place.is_relative_to(store.absolute().parent) or store.absolute().is_relative_to(place)
