"""Completion marks: what a build records about every finished shard until the whole store is complete."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.spec import canonical_json
from cytosae_cache.storage.base import StorageBackend

PROGRESS_FOLDER = "progress"
"""Folder of the marks; removed once the store is complete."""


@dataclass(frozen=True)
class ShardMark:
    """The completion mark of a shard: what its file must be, and what the tables will say about its images."""

    n_bytes: int
    """Length of the shard file."""
    crc32c: int
    """Checksum of the shard file."""
    image_crc32c: list[int]
    """Checksum of each image's stored bytes."""
    sha256: list[str]
    """SHA-256 of each image file, 64 hex digits; '' if it could not be read."""
    source_bytes: list[int]
    """Length of each image file; 0 if it could not be read."""
    reason: list[str]
    """Why an image could not be read; '' for a valid one."""
    count: int
    """Valid tokens."""
    sum: list[float]
    """Sum per channel over valid tokens."""
    sum_sq: list[float]
    """Sum of squares per channel over valid tokens."""
    channels: str = ""
    """Digest of the decoding parameters that an int8 shard was written with; '' for other types."""


def mark_name(shard: int) -> str:
    """File of a shard's completion mark."""
    return f"{PROGRESS_FOLDER}/{shard}.json"


def read_mark(storage: StorageBackend, shard: int) -> ShardMark | None:
    """The mark of a shard; None if it is missing, unreadable or not as it was written."""
    try:
        record = json.loads(storage.read(mark_name(shard)))
        if record.pop("digest") != _digest(shard, canonical_json(record)) or set(record) != {
            field.name for field in fields(ShardMark)
        }:
            return None
        return ShardMark(**record)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def write_mark(storage: StorageBackend, shard: int, mark: ShardMark, *, only_new: bool = False) -> None:
    """Write the mark of a shard whose file is complete, with a digest of its own.

    Args:
        storage: Where it goes.
        shard: Number of the shard.
        mark: The mark.
        only_new: Leave the mark that is there, if there is one.
    """
    record = canonical_json(vars(mark))
    ending = canonical_json({"digest": _digest(shard, record)})[1:]
    # Not synced: if a power cut loses or truncates a mark, its shard merely counts as missing.
    write = storage.create if only_new else storage.write
    write(mark_name(shard), [record[:-1], b",", ending])


def _digest(shard: int, record: bytes) -> str:
    """SHA-256 of a mark as canonical JSON, so that no changed digit becomes part of a store."""
    return hashlib.sha256(b"[%d,%b]" % (shard, record)).hexdigest()


def remove_marks(storage: StorageBackend) -> None:
    """Remove all marks, once the store is complete."""
    storage.remove(storage.names(f"{PROGRESS_FOLDER}/"))


def make_tables(
    marks: Iterable[ShardMark], *, n_images: int, shard_images: int, d_model: int
) -> dict[str, npt.NDArray[Any]]:
    """The arrays that are known only after the build, by their place in the store.

    Each mark is copied into them and let go, so memory is that of the arrays.

    Args:
        marks: The marks of all shards, in order.
        n_images: Images of all shards.
        shard_images: Images of a full shard.
        d_model: Channels.

    Raises:
        StoreCorruptError: If a mark does not describe as many images and channels as its shard has.
    """
    n_shards = -(-n_images // shard_images)
    tables: dict[str, npt.NDArray[Any]] = {
        "images/valid": np.empty(n_images, dtype=bool),
        "images/reason": np.empty(n_images, dtype=np.dtypes.StringDType()),
        "images/sha256": np.zeros((n_images, 32), dtype=np.uint8),
        "images/n_bytes": np.empty(n_images, dtype=np.uint64),
        "images/crc32c": np.empty(n_images, dtype=np.uint32),
        "moments/count": np.empty(n_shards, dtype=np.int64),
        "moments/sum": np.empty((n_shards, d_model)),
        "moments/sum_sq": np.empty((n_shards, d_model)),
        "shards/n_bytes": np.empty(n_shards, dtype=np.uint64),
        "shards/crc32c": np.empty(n_shards, dtype=np.uint32),
    }
    for shard, mark in enumerate(marks):
        rows = slice(shard * shard_images, min((shard + 1) * shard_images, n_images))
        columns: list[list[Any]] = [mark.reason, mark.sha256, mark.source_bytes, mark.image_crc32c]
        lengths = {len(column) for column in columns}, {len(mark.sum), len(mark.sum_sq)}
        if lengths != ({rows.stop - rows.start}, {d_model}):
            raise StoreCorruptError(
                f"'{mark_name(shard)}' describes {len(mark.reason):,} images and {len(mark.sum):,} channels, expected "
                f"{rows.stop - rows.start:,} and {d_model:,}. Delete it and run the command again"
            )
        digests = b"".join(bytes.fromhex(digest or "00" * 32) for digest in mark.sha256)
        tables["images/valid"][rows] = [not reason for reason in mark.reason]
        tables["images/reason"][rows] = mark.reason
        tables["images/sha256"][rows] = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32)
        tables["images/n_bytes"][rows] = mark.source_bytes
        tables["images/crc32c"][rows] = mark.image_crc32c
        tables["moments/count"][shard] = mark.count
        tables["moments/sum"][shard] = mark.sum
        tables["moments/sum_sq"][shard] = mark.sum_sq
        tables["shards/n_bytes"][shard] = mark.n_bytes
        tables["shards/crc32c"][shard] = mark.crc32c
    return tables
