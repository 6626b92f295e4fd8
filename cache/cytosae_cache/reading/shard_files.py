"""The shard files of a store: opened where needed, their indexes read once."""

import itertools
import shlex
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.codec import decode_into, make_codec
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.shard import MISSING, ShardIndex, as_bytes, read_index, shard_name
from cytosae_cache.reading.open_files import get_open_files
from cytosae_cache.storage.base import ReadableFile

_FILL = {"b": -128}
"""Fill value of a missing image by stored dtype; NaN for all others."""

_numbers = itertools.count()


class ShardFiles:
    """Reads stored images of a store by shard and position; any thread may read.

    Descriptors are those of the process (`OpenFiles`) and may be closed at any time. What an index states is kept: 17
    bytes per shard, and a `ShardIndex` for shards that are not plain.

    Args:
        store: A complete store.
        direct: Whether to bypass the page cache where the file system supports it.
        verified: Whether the caller compares checksums. If not, a file that changed since it was opened first is
            refused.
    """

    def __init__(self, store: StoreLayout, *, direct: bool, verified: bool) -> None:
        self._store, self._direct, self._verified = store, direct, verified
        self._codec = make_codec(store.compression, np.dtype(store.spec.store_dtype).itemsize)
        # Where each request takes its time, recorded lengths say where the indexes are; checksums prove it.
        self._n_bytes = store.shard_bytes if store.storage.is_remote else None
        self._is_known = np.zeros(store.n_shards, dtype=bool)
        self._stamps = np.zeros((store.n_shards, 2), dtype=np.int64)
        self._indexes: dict[int, ShardIndex] = {}  # of shards that are not plain
        number = self._number = next(_numbers)
        # Also without `close`: files must not stay open when nothing refers to the reader any more.
        self._release = weakref.finalize(self, lambda: get_open_files().release(number))

    def read(self, shard: int, first: int, target: npt.NDArray[Any]) -> list[int]:
        """Fill consecutive images, with one read if they are raw and contiguous.

        Args:
            shard: Number of the shard.
            first: First image, counted from the start of the shard.
            target: C-contiguous memory of `n` stored images.

        Returns:
            Slots of `target` whose images are missing; they are filled with the fill value.

        Raises:
            StoreCorruptError: If the file is missing, truncated, changed, or an image cannot be decoded.
        """
        opened = get_open_files().get((self._number, shard), lambda: self._open(shard))
        index = opened.index
        if index is None:
            with opened.lock:  # once, however many threads read from the shard
                index = opened.index = opened.index or self._read_index(shard, opened.file)
        missing: list[int] = []
        if index.is_plain:
            view = as_bytes(target)
            opened.file.read_at(first * (len(view) // len(target)), view)
            return missing
        for slot, image in enumerate(target):
            place = index.find(first + slot)
            if place is None:
                missing.append(slot)
                image[...] = _FILL.get(image.dtype.char, np.nan)
            elif self._codec is None:
                opened.file.read_at(place[0], as_bytes(image))
            else:
                data = memoryview(bytearray(place[1]))
                opened.file.read_at(place[0], data)
                decode_into(self._codec, data, as_bytes(image), f"image {first + slot} of shard '{self._where(shard)}'")
        return missing

    def close(self) -> None:
        """Close the files."""
        self._release()

    def _where(self, shard: int) -> str:
        return f"{self._store.path}/{shard_name(shard)}"

    def _open(self, shard: int) -> "_OpenShard":
        """Open a shard's file, with its index if that is known and the file is still the same."""
        try:
            n_bytes = None if self._n_bytes is None else int(self._n_bytes[shard])
            file = self._store.storage.open(shard_name(shard), direct=self._direct, n_bytes=n_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._missing(shard) from error
        if not self._is_known[shard]:
            return _OpenShard(file, None)
        if file.stamp == tuple(self._stamps[shard].tolist()):
            return _OpenShard(file, self._indexes.get(shard, _PLAIN))
        if not self._verified:
            raise StoreCorruptError(
                f"shard file '{self._where(shard)}' was changed or replaced while it was being read, and checksums are "
                f"not compared. Check the store with: cytosae-cache verify {shlex.quote(str(self._store.path))}; then "
                "run the command again"
            )
        return _OpenShard(file, None)

    def _read_index(self, shard: int, file: ReadableFile) -> ShardIndex:
        """Read a shard's index and remember it."""
        store, where = self._store, self._where(shard)
        try:
            table = read_index(file, store.shard_images, where)[: len(store.shard_rows(shard))]
        except FileNotFoundError as error:  # where opening a file requests nothing
            raise self._missing(shard) from error
        size = store.spec.record_bytes
        if self._codec is None and np.any((table[:, 1] != size) & (table[:, 0] != MISSING)):
            raise StoreCorruptError(
                f"the index of shard '{where}' lists images of another size than the expected {size:,} bytes"
            )
        index = ShardIndex(table, None if self._codec else size)
        if index.is_plain:
            self._indexes.pop(shard, None)
            index = _PLAIN
        else:
            self._indexes[shard] = index
        self._stamps[shard], self._is_known[shard] = file.stamp, True
        return index

    def _missing(self, shard: int) -> StoreCorruptError:
        return StoreCorruptError(
            f"shard file '{self._where(shard)}' is missing. Repair it by rebuilding with --overwrite"
        )


class _OpenShard:
    """An open shard file, and the index that was read from it or from the same file before."""

    __slots__ = ("file", "index", "lock", "n_descriptors")

    def __init__(self, file: ReadableFile, index: ShardIndex | None) -> None:
        self.file, self.index, self.n_descriptors = file, index, file.n_descriptors
        self.lock = threading.Lock()


_PLAIN = ShardIndex(np.empty((0, 2), dtype=np.uint64), 0)
"""The index of all plain shards."""
