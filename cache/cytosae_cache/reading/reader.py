"""Reading images of a store into memory that the caller owns, in parallel and checked."""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import ChecksumError, StoreCorruptError
from cytosae_cache.format.codec import decode_into, make_codec
from cytosae_cache.format.quantize import dequantize
from cytosae_cache.format.shard import MISSING, as_bytes, checksum, read_index, shard_name
from cytosae_cache.reading.permutation import IntArray, ReadRange, coalesce_reads
from cytosae_cache.store import ActivationStore

_PAGE_BYTES = 4096
_FILL = {"b": -128}
"""What stands for a missing image, by the stored type; NaN where there is such a number."""
_OPEN_FILES = 128
_RUN_IMAGES = 16


def aligned_buffer(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
    """Uninitialised C-contiguous memory that begins at a page, so that a disk can write straight into it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + _PAGE_BYTES, dtype=np.uint8)
    start = -int(memory.ctypes.data) % _PAGE_BYTES
    return memory[start : start + n_bytes].view(dtype).reshape(shape)


class StoreReader:
    """Reads rows of a complete store straight into slots of a batch; use as a context manager or `close` it.

    Threads of this process do the work, not worker processes: a process would copy every image once more.

    Args:
        store: A complete store.
        n_threads: Threads that read at once; by default what suits the kind of folder.
        verify: Whether each image's CRC-32C is checked as it is read.
        direct: Whether to read past the page cache where that is possible, for stores larger than memory. Raw images
            of a multiple of 512 bytes come straight from the disk into memory that `aligned_buffer` made.
    """

    def __init__(
        self, store: ActivationStore, *, n_threads: int | None = None, verify: bool = True, direct: bool = False
    ) -> None:
        self.store = store
        # Past the page cache nothing reads ahead: more requests at once keep the disk busy.
        usual = store.storage.n_threads * (2 if direct else 1)
        self.n_threads = max(1, usual if n_threads is None else n_threads)
        self._direct = direct
        self._checksums = store.image_checksums if verify else None
        self._channels = store.channels
        self._scratch = threading.local()
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="store-reader")
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._lock = threading.Lock()

    def read_rows(self, rows: IntArray, out: npt.NDArray[Any]) -> None:
        """Fill a batch with the given rows.

        Args:
            rows: Row numbers in the order wanted, shape `(n,)`.
            out: C-contiguous memory of the store's dtype, shape `(n, n_tokens, d_model)`; row `rows[i]` goes to
                `out[i]`. Rows of unreadable images come as NaN.

        Raises:
            ValueError: If `out` does not fit or a row is out of range.
            StoreCorruptError: If a file is missing, cut off, or an image fails its checksum.
        """
        store = self.store
        shape = (len(rows), *store.spec.image_shape)
        if out.shape != shape or out.dtype != store.dtype or not out.flags.c_contiguous:
            raise ValueError(f"need C-contiguous {store.dtype} of shape {shape}, found {out.dtype} of {out.shape}")
        if len(rows) and not 0 <= rows.min() <= rows.max() < store.n_images:
            raise ValueError(f"rows must lie in 0..{store.n_images - 1}, found {rows.min()}..{rows.max()}")
        runs = coalesce_reads(rows, store.shard_images, max_run=_RUN_IMAGES)
        # One task a thread, not one a run: handing over a task costs as much as reading a small image.
        parts = [runs[number :: self.n_threads] for number in range(min(self.n_threads, len(runs)))]
        tasks = [self._pool.submit(self._read_runs, part, out) for part in parts[1:]]
        try:
            self._read_runs(parts[0] if parts else [], out)
        finally:
            # Also after an error: nothing may write into the caller's memory once this has returned.
            wait(tasks)
        for task in tasks:
            task.result()

    def read(self, rows: IntArray) -> npt.NDArray[Any]:
        """The given rows in new memory, shape `(n, n_tokens, d_model)`."""
        rows = np.asarray(rows, dtype=np.int64)
        out = aligned_buffer((len(rows), *self.store.spec.image_shape), self.store.dtype)
        self.read_rows(rows, out)
        return out

    def close(self) -> None:
        """Close files and threads."""
        self._pool.shutdown()
        with self._lock:
            self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_runs(self, runs: Sequence[ReadRange], out: npt.NDArray[Any]) -> None:
        """One thread's share."""
        for run in runs:
            self._read_run(run, out)

    def _read_run(self, run: ReadRange, out: npt.NDArray[Any]) -> None:
        """One run of neighbours, read and checked."""
        target = out[run.slot : run.slot + run.n_images]
        first = run.shard * self.store.shard_images + run.first
        records = target if self._channels is None else self._make_records(len(target))
        present = self._file(run.shard).read(run.first, records)
        if self._checksums is not None:
            self._check(first, records)
        if self._channels is not None:
            for record, image, there in zip(records, target, present, strict=True):
                if there:
                    dequantize(record, self._channels, image, self._scratch.wide)
                else:
                    image[...] = np.nan

    def _make_records(self, n_images: int) -> npt.NDArray[np.int8]:
        """This thread's memory for records, shape `(n_images, n_tokens, d_model + 4)`, and for one image as float32."""
        spec = self.store.spec
        if not hasattr(self._scratch, "records"):
            self._scratch.records = aligned_buffer((_RUN_IMAGES, *spec.record_shape), np.dtype(np.int8))
            self._scratch.wide = np.empty(spec.image_shape, dtype=np.float32)
        records: npt.NDArray[np.int8] = self._scratch.records[:n_images]
        return records

    def _check(self, first: int, records: npt.NDArray[Any]) -> None:
        """Compare checksums of consecutive rows."""
        assert self._checksums is not None
        for offset, image in enumerate(records):
            if checksum(as_bytes(image)) != self._checksums[first + offset]:
                row = first + offset
                raise ChecksumError(
                    f"row {row} ('{self.store.images.path[row]}') of store '{self.store.path}' fails its checksum: "
                    "its bytes changed on disk. Find all damage with: cytosae-cache verify "
                    f"'{self.store.path}'; repair by building again with --overwrite"
                )

    def _file(self, shard: int) -> "_ShardFile":
        """The open file of a shard; the least recently used is closed when there are too many."""
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                file = _ShardFile(self.store, shard, direct=self._direct)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                # A thread may still be reading from it: the descriptor closes when the last one lets go.
                self._files.popitem(last=False)
            return file


class _ShardFile:
    """An open shard file and where its images lie."""

    def __init__(self, store: ActivationStore, shard: int, *, direct: bool) -> None:
        self._where = f"{store.path}/{shard_name(shard)}"
        self._codec = make_codec(store.compression, np.dtype(store.spec.store_dtype).itemsize)
        try:
            self._file = store.storage.open(shard_name(shard), direct=direct)
        except FileNotFoundError as error:
            raise StoreCorruptError(
                f"shard file '{self._where}' is missing. Repair by building again with --overwrite"
            ) from error
        index = read_index(self._file, store.shard_images, self._where)
        self._offsets, self._lengths = index[:, 0], index[:, 1]
        n_images, size = len(store.shard_rows(shard)), store.spec.record_bytes
        offsets, lengths = self._offsets[:n_images], self._lengths[:n_images]
        if self._codec is None and np.any((lengths != size) & (offsets != MISSING)):
            raise StoreCorruptError(f"shard '{self._where}' holds images of another size than {size} bytes")
        # As ours always are: image i at byte i * size, so that neighbours are one read.
        self._is_plain = self._codec is None and np.array_equal(offsets, np.arange(n_images, dtype=np.uint64) * size)

    def read(self, first: int, target: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Fill consecutive images: one read where raw ones lie one after another. Returns which there are."""
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
