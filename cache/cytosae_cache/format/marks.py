"""Completion marks: what a build records about every finished shard until the whole store is complete."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

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


def write_mark(storage: StorageBackend, shard: int, mark: ShardMark) -> None:
    """Write the mark of a shard whose file is complete, with a digest of its own."""
    record = canonical_json(vars(mark))
    ending = canonical_json({"digest": _digest(shard, record)})[1:]
    # Not synced: if a power cut loses or truncates a mark, its shard merely counts as missing.
    storage.write(mark_name(shard), [record[:-1], b",", ending])


def _digest(shard: int, record: bytes) -> str:
    """SHA-256 of a mark as canonical JSON, so that no changed digit becomes part of a store."""
    return hashlib.sha256(b"[%d,%b]" % (shard, record)).hexdigest()


def remove_marks(storage: StorageBackend) -> None:
    """Remove all marks, once the store is complete."""
    storage.remove(storage.names(f"{PROGRESS_FOLDER}/"))


def make_tables(marks: Sequence[ShardMark], d_model: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays that are known only after the build, by their place in the store.

    Args:
        marks: The marks of all shards, in order.
        d_model: Channels.
    """
    reasons = [reason for mark in marks for reason in mark.reason]
    digests = b"".join(bytes.fromhex(digest or "00" * 32) for mark in marks for digest in mark.sha256)
    return {
        "images/valid": np.array([not reason for reason in reasons], dtype=bool),
        "images/reason": np.array(reasons, dtype=np.dtypes.StringDType()),
        "images/sha256": np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32),
        "images/n_bytes": np.array([value for mark in marks for value in mark.source_bytes], dtype=np.uint64),
        "images/crc32c": np.array([value for mark in marks for value in mark.image_crc32c], dtype=np.uint32),
        "moments/count": np.array([mark.count for mark in marks], dtype=np.int64),
        "moments/sum": np.array([mark.sum for mark in marks], dtype=np.float64).reshape(-1, d_model),
        "moments/sum_sq": np.array([mark.sum_sq for mark in marks], dtype=np.float64).reshape(-1, d_model),
        "shards/n_bytes": np.array([mark.n_bytes for mark in marks], dtype=np.uint64),
        "shards/crc32c": np.array([mark.crc32c for mark in marks], dtype=np.uint32),
    }
