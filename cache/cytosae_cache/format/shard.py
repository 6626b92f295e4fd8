"""One shard file: the bytes of its images one after another, then the Zarr sharding index.

The layout is that of Zarr v3's `sharding_indexed` codec with one image per inner chunk and the index at the end.
Uncompressed, image i starts at byte `i * image_bytes`; any Zarr reader finds it.
"""

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import crc32c as _crc32c
import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.storage.base import ReadableFile

MISSING = (1 << 64) - 1
"""Offset and length of a chunk that is missing from the shard."""

_CHECKSUM_BYTES = 4


class ShardDigest(NamedTuple):
    """Length and checksum of a written shard file."""

    n_bytes: int
    """Length of the file."""
    crc32c: int
    """Checksum of the whole file."""


def checksum(data: memoryview | bytes, value: int = 0) -> int:
    """CRC-32C of bytes, continuing from `value`; computed in hardware, with the GIL released."""
    return int(_crc32c.crc32c(data, value, gil_release_mode=1))


def as_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """The memory of a C-contiguous array as bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def shard_name(shard: int) -> str:
    """File of a shard, named after Zarr's default chunk keys."""
    return f"activations/c/{shard}/0/0"


def index_bytes(shard_images: int) -> int:
    """Length of the index of a shard, which has an entry for every image of a full one."""
    return 16 * shard_images + _CHECKSUM_BYTES


def make_index(lengths: Sequence[int], shard_images: int) -> bytes:
    """The index at the end of a shard whose images are contiguous.

    Args:
        lengths: Bytes of each image in the file.
        shard_images: Images in a full shard.

    Returns:
        `shard_images` pairs of little-endian uint64 (offset, length), missing images as all ones, and the CRC-32C.
    """
    index = np.full((shard_images, 2), MISSING, dtype="<u8")
    ends = np.cumsum(np.asarray(lengths, dtype=np.uint64), dtype=np.uint64)
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = ends - index[: len(lengths), 1]
    body = index.tobytes()
    return body + struct.pack("<I", checksum(body))


def read_index(file: ReadableFile, shard_images: int, where: str) -> npt.NDArray[np.uint64]:
    """Read and check the index of an open shard file.

    Args:
        file: The file.
        shard_images: Images in a full shard.
        where: Name of the file, for messages.

    Returns:
        Offsets and lengths, shape `(shard_images, 2)`.

    Raises:
        StoreCorruptError: If the file is too short, or the index fails its checksum or points outside the file.
    """
    size, n_bytes = index_bytes(shard_images), file.n_bytes
    if n_bytes < size:
        raise StoreCorruptError(f"shard '{where}' has {n_bytes} bytes, too few for its index of {size}")
    raw = bytearray(size)
    file.read_at(n_bytes - size, memoryview(raw))
    if checksum(memoryview(raw)[:-_CHECKSUM_BYTES]) != struct.unpack("<I", raw[-_CHECKSUM_BYTES:])[0]:
        raise StoreCorruptError(f"the index of shard '{where}' fails its checksum: the file was damaged or truncated")
    index = np.frombuffer(raw, dtype="<u8", count=2 * shard_images).reshape(shard_images, 2)
    present = index[:, 0] != MISSING
    offsets, lengths = index[present, 0], index[present, 1]
    if np.any(lengths > n_bytes) or np.any(offsets > np.uint64(n_bytes) - np.minimum(lengths, np.uint64(n_bytes))):
        raise StoreCorruptError(f"the index of shard '{where}' points outside the file")
    return index


class ShardIndex:
    """Where the images of a shard are, in as little memory as its layout allows.

    Takes nothing per image if they are raw and in order, as we write them, 4 bytes if they are encoded and contiguous
    (8 in files of 4 GB and more), and 16 otherwise.

    Args:
        index: Offsets and lengths of the images, shape `(n, 2)`.
        record_bytes: Length of every image if they are raw; None if they are encoded.
    """

    __slots__ = ("_ends", "_table", "is_plain")

    def __init__(self, index: npt.NDArray[np.uint64], record_bytes: int | None) -> None:
        offsets, lengths = index[:, 0], index[:, 1]
        ends = np.zeros(len(index) + 1, dtype=np.uint64)
        np.cumsum(lengths, out=ends[1:])  # of missing images it is nonsense, and differs
        contiguous = np.array_equal(offsets, ends[:-1])
        self.is_plain = record_bytes is not None and contiguous and bool((lengths == record_bytes).all())
        """Whether image i is at byte `i * record_bytes`, so that consecutive images are one read."""
        self._ends: npt.NDArray[np.unsignedinteger[Any]] | None = None
        self._table: npt.NDArray[np.uint64] | None = None
        if contiguous and not self.is_plain:
            self._ends = ends if ends[-1] >= 1 << 32 else ends.astype(np.uint32)
        elif not contiguous:
            self._table = index.copy()  # not a view: the rest of the index is not kept

    def find(self, image: int) -> tuple[int, int] | None:
        """Offset and length of an image of a shard that is not plain; None if it is missing."""
        if self._ends is not None:
            start, end = self._ends[image : image + 2].tolist()
            return start, end - start
        assert self._table is not None
        offset, length = self._table[image].tolist()
        return None if offset == MISSING else (offset, length)


def join_checksums(checksums: Iterable[int], n_bytes: int) -> int:
    """CRC-32C of consecutive pieces of equal length, from those of the pieces, without reading them again.

    Args:
        checksums: Of the pieces, in order.
        n_bytes: Bytes of each piece.
    """
    moved_bits = _move_bits(n_bytes)
    joined = 0
    for value in checksums:
        moved, bit = 0, 0
        while joined:
            if joined & 1:
                moved ^= moved_bits[bit]
            joined >>= 1
            bit += 1
        joined = moved ^ value
    return joined


@lru_cache(maxsize=16)
def _move_bits(n_bytes: int) -> tuple[int, ...]:
    """What each bit of a checksum becomes if `n_bytes` zeros follow: a checksum is linear over the field of two."""
    zeros = bytes(n_bytes)
    return tuple(checksum(zeros, 1 << bit) ^ checksum(zeros) for bit in range(32))


def digest_parts(parts: Sequence[memoryview | bytes]) -> ShardDigest:
    """Length and checksum of the file that consists of these parts."""
    crc = 0
    for part in parts:
        crc = checksum(part, crc)
    return ShardDigest(sum(len(part) for part in parts), crc)


def digest_raw(checksums: Sequence[int], record_bytes: int, index: bytes) -> ShardDigest:
    """Length and checksum of the file of raw images, from their checksums.

    Args:
        checksums: CRC-32C of each image.
        record_bytes: Bytes of each image.
        index: The index that follows them.
    """
    return ShardDigest(
        len(checksums) * record_bytes + len(index), checksum(index, join_checksums(checksums, record_bytes))
    )


def digest_file(file: ReadableFile, buffer_bytes: int = 1 << 22) -> ShardDigest:
    """Length and checksum of a file on disk."""
    crc, buffer = 0, memoryview(bytearray(buffer_bytes))
    for start in range(0, file.n_bytes, buffer_bytes):
        part = buffer[: min(buffer_bytes, file.n_bytes - start)]
        file.read_at(start, part)
        crc = checksum(part, crc)
    return ShardDigest(file.n_bytes, crc)
