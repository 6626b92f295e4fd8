"""Choosing the storage backend for a path or URL."""

from pathlib import Path

from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.local import LocalStorage
from cytosae_cache.storage.remote import RemoteStorage


def open_storage(location: Location) -> StorageBackend:
    """The storage at a path or URL; nothing is read or created.

    Args:
        location: A path, a `file://` URL, or any other URL that fsspec knows.

    Raises:
        StoreError: If the URL's protocol is unknown or its library is not installed.
    """
    text = str(location)
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    if isinstance(location, str) and "://" in location:
        return RemoteStorage(location)
    return LocalStorage(Path(location))
