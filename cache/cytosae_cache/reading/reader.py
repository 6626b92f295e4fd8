"""Reading images of a store into the caller's memory, in parallel and verified."""

import errno
import itertools
import math
import os
import shlex
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import ChecksumError, StoreCorruptError
from cytosae_cache.format.codec import decode_into, make_codec
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.quantize import dequantize
from cytosae_cache.format.shard import MISSING, as_bytes, checksum, read_index, shard_name
from cytosae_cache.reading.permutation import IntArray, ReadRange, coalesce_reads

_PAGE_BYTES = 4096
_FILL = {"b": -128}
"""Fill value of a missing image by stored dtype; NaN for all others."""
_OPEN_FILES = 128
"""Most shard files that a process has open."""
_RESERVED_FILES = 32
"""Descriptors that are left to everything else."""
_MAX_READ_IMAGES = 16


def aligned_buffer(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Uninitialised C-contiguous memory that starts at a page boundary, so that a disk can write straight into it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + _PAGE_BYTES, dtype=np.uint8)
    start = -int(memory.ctypes.data) % _PAGE_BYTES
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


class StoreReader:
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
        self._direct = direct
        self._checksums = store.image_checksums if verify else None
        self._channels = store.channels
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="store-reader")
        self._number = next(_numbers)
        # Also without `close`: files must not stay open when nothing refers to the reader any more.
        self._release = weakref.finalize(self, _release_files, self._number)

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
        store = self.store
        shape = (len(rows), *store.spec.image_shape)
        if out.shape != shape or out.dtype != store.dtype or not out.flags.c_contiguous:
            raise ValueError(
                f"out must be C-contiguous {store.dtype} of shape {shape}, found {out.dtype} of shape {out.shape}"
            )
        if len(rows) and not 0 <= rows.min() <= rows.max() < store.n_images:
            raise ValueError(f"rows must lie in 0..{store.n_images - 1}, found {rows.min()}..{rows.max()}")
        reads = coalesce_reads(rows, store.shard_images, max_images=_MAX_READ_IMAGES)
        # One task per thread, not per read: submitting a task costs as much as reading a small image.
        shares = [reads[number :: self.n_threads] for number in range(min(self.n_threads, len(reads)))]
        tasks = [self._pool.submit(self._read_share, share, out) for share in shares[1:]]
        try:
            self._read_share(shares[0] if shares else [], out)
        finally:
            # Also after an error: no thread may write into the caller's memory once this has returned.
            wait(tasks)
        for task in tasks:
            task.result()

    def read(self, rows: IntArray) -> npt.NDArray[Any]:
        """Read the given rows into new memory, shape `(n, n_tokens, d_model)`."""
        rows = np.asarray(rows, dtype=np.int64)
        out = aligned_buffer((len(rows), *self.store.spec.image_shape), self.store.dtype)
        self.read_rows(rows, out)
        return out

    def close(self) -> None:
        """Close files and threads."""
        self._pool.shutdown()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_share(self, reads: Sequence[ReadRange], out: npt.NDArray[Any]) -> None:
        """Do one thread's share of the reads."""
        for read in reads:
            self._read_range(read, out)

    def _read_range(self, read: ReadRange, out: npt.NDArray[Any]) -> None:
        """Read, verify and decode consecutive images."""
        target = out[read.slot : read.slot + read.n_images]
        first = read.shard * self.store.shard_images + read.first
        records = target if self._channels is None else self._make_records(len(target))
        present = self._file(read.shard).read(read.first, records)
        if self._checksums is not None:
            self._check(first, records)
        if self._channels is not None:
            for record, image, is_present in zip(records, target, present, strict=True):
                if is_present:
                    dequantize(record, self._channels, image, self._scratch.wide)
                else:
                    image[...] = np.nan

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
        for offset, image in enumerate(records):
            if checksum(as_bytes(image)) != self._checksums[first + offset]:
                row = first + offset
                raise ChecksumError(
                    f"row {row} ({self.store.images.path[row]!r}) of store '{self.store.path}' fails its checksum: "
                    "its bytes changed on disk. Find all damage with: cytosae-cache verify "
                    f"{shlex.quote(str(self.store.path))}; repair it by rebuilding with --overwrite"
                )

    def _file(self, shard: int) -> "_ShardFile":
        """The open file of a shard."""
        return _open_files().get((self._number, shard), lambda: _ShardFile(self.store, shard, direct=self._direct))


class OpenFiles:
    """The shard files that this process has open for all its readers; the least recently used are closed first.

    Args:
        most: Most files.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._files: OrderedDict[tuple[int, int], _ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._files)

    def get(self, key: tuple[int, int], make: "Callable[[], _ShardFile]") -> "_ShardFile":
        """The file of a reader's shard, opened if it is not open yet.

        Where the system allows no further open file, others are closed first.

        Raises:
            OSError: If the file cannot be opened, or the system allows no open file at all.
        """
        with self._lock:
            file = self._files.pop(key, None)
            while file is None:
                try:
                    file = make()
                except OSError as error:
                    if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
                        raise
                    half = len(self._files) // 2
                    self._close_oldest(half)
                    self.most = max(1, half)
            self._files[key] = file
            self._close_oldest(self.most)
            return file

    def release(self, number: int) -> None:
        """Close the files of a reader."""
        with self._lock:
            for key in [key for key in self._files if key[0] == number]:
                del self._files[key]

    def _close_oldest(self, most: int) -> None:
        while len(self._files) > most:
            # A thread may still be reading from it: the descriptor closes with the last reference.
            self._files.popitem(last=False)


_numbers = itertools.count()
_of_process: dict[int, OpenFiles] = {}


def _open_files() -> OpenFiles:
    """The open files of this process; a forked child has its own."""
    process = os.getpid()
    return _of_process.get(process) or _of_process.setdefault(process, OpenFiles(_most_files()))


def _release_files(number: int) -> None:
    """Close the files of a reader in this process."""
    if (files := _of_process.get(os.getpid())) is not None:
        files.release(number)


def _most_files() -> int:
    """How many shard files may be open: half of what the system allows, two descriptors each."""
    try:
        import resource
    except ImportError:  # Windows
        return _OPEN_FILES
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_FILES if allowed < 0 else max(4, min(_OPEN_FILES, (allowed - _RESERVED_FILES) // 4))


class _ShardFile:
    """An open shard file and the place of its images."""

    def __init__(self, store: StoreLayout, shard: int, *, direct: bool) -> None:
        self._where = f"{store.path}/{shard_name(shard)}"
        self._codec = make_codec(store.compression, np.dtype(store.spec.store_dtype).itemsize)
        try:
            self._file = store.storage.open(shard_name(shard), direct=direct)
        except FileNotFoundError as error:
            raise StoreCorruptError(
                f"shard file '{self._where}' is missing. Repair it by rebuilding with --overwrite"
            ) from error
        index = read_index(self._file, store.shard_images, self._where)
        self._offsets, self._lengths = index[:, 0], index[:, 1]
        n_images, size = len(store.shard_rows(shard)), store.spec.record_bytes
        offsets, lengths = self._offsets[:n_images], self._lengths[:n_images]
        if self._codec is None and np.any((lengths != size) & (offsets != MISSING)):
            raise StoreCorruptError(
                f"the index of shard '{self._where}' lists images of another size than the expected {size:,} bytes"
            )
        # As we write them: image i at byte i * size, so that consecutive images are one read.
        self._is_plain = self._codec is None and np.array_equal(offsets, np.arange(n_images, dtype=np.uint64) * size)

    def read(self, first: int, target: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Fill consecutive images, with one read if they are raw and contiguous; returns which are present."""
        present: npt.NDArray[np.bool_] = self._offsets[first : first + len(target)] != MISSING
        if self._is_plain:
            self._file.read_at(first * target[0].nbytes, as_bytes(target))
            return present
        for slot, image in enumerate(target, start=first):
            offset = int(self._offsets[slot])
            if offset == MISSING:
                image[...] = _FILL.get(image.dtype.char, np.nan)
            elif self._codec is None:
                self._file.read_at(offset, as_bytes(image))
            else:
                data = memoryview(bytearray(int(self._lengths[slot])))
                self._file.read_at(offset, data)
                decode_into(self._codec, data, as_bytes(image), f"image {slot} of shard '{self._where}'")
        return present
