"""Reading images of a store into the caller's memory, in parallel and verified."""

import math
import shlex
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import ChecksumError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.quantize import dequantize
from cytosae_cache.format.shard import as_bytes, checksum
from cytosae_cache.reading.permutation import IntArray, ReadRange, coalesce_reads
from cytosae_cache.reading.shard_files import ShardFiles

_PAGE_BYTES = 4096
_MAX_READ_IMAGES = 16
_CHECKED_BYTES = 1 << 21
"""Bytes that are read together where checksums follow: they are still in the processor's cache."""


def aligned_buffer(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Uninitialised C-contiguous memory that starts at a page boundary, so that a disk can write straight into it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + _PAGE_BYTES, dtype=np.uint8)
    start = -int(memory.ctypes.data) % _PAGE_BYTES
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


class RowReader(ABC):
    """Reads rows of a store, or of several that are joined; use as a context manager, or `close` it."""

    store: StoreLayout
    """The store."""

    @abstractmethod
    def read_rows(self, rows: IntArray, out: npt.NDArray[Any]) -> None:
        """Fill a batch with the given rows.

        Args:
            rows: Row numbers in the order of the batch, shape `(n,)`.
            out: C-contiguous memory of the store's dtype, shape `(n, n_tokens, d_model)`; row `rows[i]` goes to
                `out[i]`. Rows of unreadable images are filled with NaN.

        Raises:
            ValueError: If `out` has another shape or dtype, or a row is out of range.
            StoreCorruptError: If a file is missing or truncated, or an image fails its checksum.
        """

    @abstractmethod
    def close(self) -> None:
        """Close files and threads."""

    def read(self, rows: IntArray) -> npt.NDArray[Any]:
        """Read the given rows into new memory, shape `(n, n_tokens, d_model)`."""
        rows = np.asarray(rows, dtype=np.int64)
        out = aligned_buffer((len(rows), *self.store.spec.image_shape), self.store.dtype)
        self.read_rows(rows, out)
        return out

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_room(self, rows: IntArray, out: npt.NDArray[Any]) -> None:
        """Raise ValueError if rows do not exist or `out` is not the memory for them."""
        store = self.store
        shape = (len(rows), *store.spec.image_shape)
        if out.shape != shape or out.dtype != store.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {store.dtype} of shape {shape}, found {out.dtype} of shape {out.shape}"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < store.n_images:
            raise ValueError(f"rows must lie in 0..{store.n_images - 1}, found {rows.min()}..{rows.max()}")


class StoreReader(RowReader):
    """Reads rows of a complete store straight into slots of a batch; use as a context manager, or `close` it.

    Any thread may read. Threads of this process do the work, not worker processes, which would copy every image once
    more.

    Args:
        store: A complete store.
        n_threads: Threads that read concurrently; the default suits the kind of storage.
        verify: Whether to check each image's CRC-32C.
        direct: Whether to bypass the page cache where the file system supports it, for stores larger than memory. Raw
            images of a multiple of 512 bytes go straight from the disk into memory that `aligned_buffer` made.

    Raises:
        StoreIncompleteError: If the store is unfinished.
        StoreCorruptError: If its tables are missing or damaged.
    """

    def __init__(
        self, store: StoreLayout, *, n_threads: int | None = None, verify: bool = True, direct: bool = False
    ) -> None:
        store.require_complete()
        self.store = store
        # Without the page cache there is no read-ahead: more concurrent requests keep the disk busy.
        default = store.storage.n_threads * (2 if direct else 1)
        self.n_threads = max(1, default if n_threads is None else n_threads)
        self._files = ShardFiles(store, direct=direct, verified=verify)
        self._checksums = store.image_checksums if verify else None
        self._max_read_images = _MAX_READ_IMAGES
        # Disks without a page cache, and object stores, are faster with fewer and longer requests.
        if verify and not direct and not store.storage.is_remote:
            self._max_read_images = max(1, min(_MAX_READ_IMAGES, _CHECKED_BYTES // store.spec.record_bytes))
        self._channels = store.channels
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="store-reader")

    def read_rows(self, rows: IntArray, out: npt.NDArray[Any]) -> None:
        """See `RowReader`."""
        self._require_room(rows, out)
        reads = coalesce_reads(rows, self.store.shard_images, max_images=self._max_read_images)
        # One task per thread, not per read: submitting a task costs as much as reading a small image. The threads share
        # one iterator, so that none is idle while another has several reads left.
        pending = iter(reads)
        n_others = min(self.n_threads, len(reads)) - 1
        tasks = [self._pool.submit(self._read_pending, pending, out) for _ in range(n_others)]
        try:
            self._read_pending(pending, out)
        finally:
            # Also after an error: no thread may write into the caller's memory once this has returned.
            wait(tasks)
        for task in tasks:
            task.result()

    def close(self) -> None:
        """See `RowReader`."""
        self._pool.shutdown()
        self._files.close()

    def _read_pending(self, reads: Iterator[ReadRange], out: npt.NDArray[Any]) -> None:
        """Take reads until none is left."""
        for read in reads:
            self._read_range(read, out)

    def _read_range(self, read: ReadRange, out: npt.NDArray[Any]) -> None:
        """Read, verify and decode consecutive images."""
        target = out[read.slot : read.slot + read.n_images]
        first = read.shard * self.store.shard_images + read.first
        records = target if self._channels is None else self._make_records(len(target))
        missing = self._files.read(read.shard, read.first, records)
        if self._checksums is not None:
            self._check(first, records)
        if self._channels is not None:
            for slot, (record, image) in enumerate(zip(records, target, strict=True)):
                if slot in missing:
                    image[...] = np.nan
                else:
                    dequantize(record, self._channels, image, self._scratch.wide)

    def _make_records(self, n_images: int) -> npt.NDArray[np.int8]:
        """This thread's buffers: records, shape `(n_images, n_tokens, d_model + 4)`, and one image as float32."""
        spec = self.store.spec
        if not hasattr(self._scratch, "records"):
            self._scratch.records = aligned_buffer((_MAX_READ_IMAGES, *spec.record_shape), np.dtype(np.int8))
            self._scratch.wide = np.empty(spec.image_shape, dtype=np.float32)
        records: npt.NDArray[np.int8] = self._scratch.records[:n_images]
        return records

    def _check(self, first: int, records: npt.NDArray[Any]) -> None:
        """Compare the checksums of consecutive rows."""
        assert self._checksums is not None
        view = as_bytes(records)
        size = len(view) // len(records)
        expected = self._checksums[first : first + len(records)].tolist()
        for number, value in enumerate(expected):
            if checksum(view[number * size : (number + 1) * size]) != value:
                row = first + number
                raise ChecksumError(
                    f"row {row} ({self.store.images.path[row]!r}) of store '{self.store.path}' fails its checksum: "
                    "its bytes changed on disk. Find all damage with: cytosae-cache verify "
                    f"{shlex.quote(str(self.store.path))}; repair it by rebuilding with --overwrite"
                )
