"""One shard file: the bytes of its images one after another, then the Zarr sharding index.

The layout is that of Zarr v3's `sharding_indexed` codec with inner codec `bytes`, one image an inner chunk and the
index at the end: image i lies at byte `i * image_bytes`, and any Zarr reader finds it.
"""

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import crc32c as _crc32c
import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError

MISSING = (1 << 64) - 1
"""Offset and length of a chunk that the shard does not hold."""

TEMPORARY_SUFFIX = ".partial"
"""Ending of a file that is still being written."""

_CHECKSUM_BYTES = 4


class ShardDigest(NamedTuple):
    """What is recorded of a written shard file."""

    n_bytes: int
    """Length of the file."""
    crc32c: int
    """Checksum of the whole file."""


def checksum(data: memoryview | bytes, value: int = 0) -> int:
    """CRC-32C of bytes, continuing from `value`; computed in hardware with the GIL released."""
    return int(_crc32c.crc32c(data, value, gil_release_mode=1))


def as_bytes(array: npt.NDArray[np.generic]) -> memoryview:
    """The memory of a C-contiguous array as bytes, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def shard_path(activations: Path, shard: int) -> Path:
    """File of a shard inside the `activations` array's folder, as Zarr's default chunk keys name it."""
    return activations / "c" / str(shard) / "0" / "0"


def make_index(n_images: int, shard_images: int, image_bytes: int) -> bytes:
    """The index at the end of a shard whose images lie one after another.

    Returns:
        `shard_images` pairs of little-endian uint64 (offset, length), absent images as all ones, and the CRC-32C.
    """
    index = np.full((shard_images, 2), MISSING, dtype="<u8")
    index[:n_images, 0] = np.arange(n_images, dtype=np.uint64) * np.uint64(image_bytes)
    index[:n_images, 1] = image_bytes
    body = index.tobytes()
    return body + struct.pack("<I", checksum(body))


def read_index(file: int, n_bytes: int, shard_images: int, where: Path) -> npt.NDArray[np.uint64]:
    """Read and check the index of an open shard file.

    Args:
        file: File descriptor.
        n_bytes: Length of the file.
        shard_images: Images a full shard.
        where: The file's path, for messages.

    Returns:
        Offsets and lengths, shape `(shard_images, 2)`.

    Raises:
        StoreCorruptError: If the file is too short, the index fails its checksum or points outside the file.
    """
    size = 16 * shard_images + _CHECKSUM_BYTES
    raw = os.pread(file, size, max(n_bytes - size, 0))
    if len(raw) != size:
        raise StoreCorruptError(f"shard '{where}' has {n_bytes} bytes, too few for its index of {size}")
    if checksum(raw[:-_CHECKSUM_BYTES]) != struct.unpack("<I", raw[-_CHECKSUM_BYTES:])[0]:
        raise StoreCorruptError(f"the index of shard '{where}' fails its checksum: the file was damaged or cut off")
    index = np.frombuffer(raw[:-_CHECKSUM_BYTES], dtype="<u8").reshape(shard_images, 2)
    present = index[:, 0] != MISSING
    offsets, lengths = index[present, 0], index[present, 1]
    if np.any(lengths > n_bytes) or np.any(offsets > np.uint64(n_bytes) - np.minimum(lengths, np.uint64(n_bytes))):
        raise StoreCorruptError(f"the index of shard '{where}' points outside the file")
    return index


def write_shard(path: Path, parts: Sequence[memoryview | bytes]) -> ShardDigest:
    """Write a shard so that it is there whole or not at all, also after a power cut.

    The bytes go to a temporary name in the same folder, are synced to disk and renamed. Its name is made durable only
    when the store is finished: should a power cut take it away before, the shard counts as missing.

    Args:
        path: Final name; its folders are made.
        parts: The file's bytes in order: images, then the index. Nothing is copied.

    Returns:
        Length and checksum of the file.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    crc = 0
    with replacing(path, sync_name=False) as file:
        for part in parts:
            write_all(file, part)
            crc = checksum(part, crc)
    return ShardDigest(sum(len(part) for part in parts), crc)


@contextlib.contextmanager
def replacing(path: Path, *, sync_data: bool = True, sync_name: bool = True) -> Iterator[int]:
    """A new file descriptor whose bytes take the place of `path` at the end, in one step.

    Args:
        path: The file.
        sync_data: Whether the bytes are on disk before they get the name.
        sync_name: Whether the name is on disk at the end.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
    try:
        try:
            yield file
            if sync_data:
                os.fsync(file)
        finally:
            os.close(file)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync_name:
        sync_folder(path.parent)


def write_all(file: int, data: memoryview | bytes) -> None:
    """Write every byte: `os.write` may take fewer than it is given (Linux stops at 2 GiB)."""
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a small file whole or not at all, durably unless told otherwise."""
    with replacing(path, sync_data=durable, sync_name=durable) as file:
        write_all(file, data)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable. Windows has no such call and needs none."""
    if os.name == "nt":
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def file_digest(path: Path, buffer_bytes: int = 1 << 22) -> ShardDigest:
    """Length and checksum of a file as it lies on disk."""
    crc, n_bytes = 0, 0
    buffer = bytearray(buffer_bytes)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc = checksum(view[:count], crc)
            n_bytes += count
    return ShardDigest(n_bytes, crc)
