"""Creating a store: its metadata and the table of images, before the first shard."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy.typing as npt

from cytosae_cache.errors import StoreError
from cytosae_cache.format.columns import encode_hierarchy
from cytosae_cache.format.layout import COLUMNS_FOLDER, MAX_COLUMNS, ImageTable
from cytosae_cache.format.marks import PROGRESS_FOLDER
from cytosae_cache.format.metadata import Provenance, hash_tables, write_attributes
from cytosae_cache.format.spec import Compression, StoreSpec
from cytosae_cache.format.texts import to_texts
from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore

_OUR_FOLDERS = ("activations/", "channels/", "images/", "moments/", "shards/", f"{PROGRESS_FOLDER}/")


def create_store(
    location: Location,
    spec: StoreSpec,
    images: ImageTable,
    provenance: Provenance,
    *,
    shard_images: int,
    compression: Compression = "none",
    columns: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> ActivationStore:
    """Create an empty, unfinished store: metadata and the table of images, no activations.

    Args:
        location: Folder or URL to create; may contain what a killed build left, but nothing else.
        spec: What identifies the store.
        images: One entry per row.
        provenance: Where the store comes from.
        shard_images: Images per shard file; at least 1.
        compression: Lossless codec of every image.
        columns: What else is known about the images, by name: int64, float64 or numpy's variable-width text.

    Raises:
        ValueError: If `shard_images` is below 1, the table's columns differ in length, or there are too many of them.
        StoreError: If the folder contains other files.
    """
    lengths = [*map(len, images), *map(len, columns.values())]
    if len(columns) > MAX_COLUMNS:
        raise ValueError(f"a store takes at most {MAX_COLUMNS} further columns of images, found {len(columns)}")
    if shard_images < 1 or len(set(lengths)) != 1:
        raise ValueError(
            f"shard_images must be 1 or more and the columns of images equally long, found {shard_images} and {lengths}"
        )
    storage = open_storage(location)
    clear_leftovers(storage)
    tables: dict[str, npt.NDArray[Any]] = {
        f"images/{name}": to_texts(column) for name, column in zip(images._fields, images, strict=True)
    }
    if columns:
        tables[f"{COLUMNS_FOLDER}/names"] = to_texts(columns)
        tables |= {f"{COLUMNS_FOLDER}/{number}": column for number, column in enumerate(columns.values())}
    activations = (spec, len(images.path), shard_images, compression)
    files = encode_hierarchy(tables, activations=activations)
    for name, data in files.items():
        storage.write(name, [data])
    storage.sync(files)
    # Written last: without it the folder is not a store, so a build that was killed before starts from scratch.
    write_attributes(storage, spec, provenance, complete=False, files=hash_tables(storage))
    return ActivationStore(location)


def clear_leftovers(storage: StorageBackend) -> None:
    """Remove what a build left that was killed before it had created the store.

    Raises:
        StoreError: If the storage contains other files.
    """
    storage.remove_partials()
    names = storage.names()
    others = [name for name in names if not name.startswith(_OUR_FOLDERS)]
    if others:
        raise StoreError(
            f"'{storage}' is neither empty nor an unfinished store (found '{others[0]}'). Choose another place"
        )
    storage.remove(names)
