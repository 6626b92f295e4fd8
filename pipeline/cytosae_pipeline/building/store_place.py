"""The place of a store that is about to be written: its free space, what is there already, and errors of its disk."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cytosae_cache.errors import StoreError
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.storage.base import Location
from cytosae_cache.storage.disk import existing_folder, explain, find_disk_error
from cytosae_pipeline import __version__
from cytosae_pipeline.runtime.progress import format_bytes


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


def make_provenance(dataset: str, list_digest: str, device: str = "", batch_size: int = 0) -> Provenance:
    """The origin of a store that is created now, or at `SOURCE_DATE_EPOCH` if that is set.

    Args:
        dataset: Name of the data set.
        list_digest: Digest of its list of images.
        device: Kind of device that computes the activations; '' if none does.
        batch_size: Images per forward pass; 0 if there is none.
    """
    stamp = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    created = datetime.fromtimestamp(stamp, UTC).isoformat()
    return Provenance(dataset, list_digest, __version__, created, device, batch_size)


@contextlib.contextmanager
def disk_messages(store: Location) -> Iterator[None]:
    """Turn errors of the disk into messages that say where and what to do; those of remote storage already do.

    Args:
        store: Place of the store that is written inside the context.

    Raises:
        StoreError: If the disk is full, read-only or fails.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = None if isinstance(store, str) else find_disk_error(error, store)
        if code is None:
            raise
        kept, again = "Finished work is kept", "run the command again to resume"
        raise StoreError(explain(f"store '{store}'", Path(store), code, kept=kept, again=again)) from error
