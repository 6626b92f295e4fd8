"""Reading images of a store into memory that the caller owns, in parallel and checked."""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.order import IntArray, Run, plan_runs
from cytosae_cache.shard import MISSING, as_bytes, checksum, read_index, shard_path
from cytosae_cache.store import ActivationStore

DEFAULT_THREADS = 4
"""Threads a reader. In-process threads, not worker processes: a process would copy every image once more."""

_OPEN_FILES = 128
_RUN_IMAGES = 16


class StoreReader:
    """Reads rows of a complete store straight into slots of a batch; use as a context manager or `close` it.

    Args:
        store: A complete store.
        n_threads: Threads that read at once.
        verify: Whether each image's CRC-32C is checked as it is read.
    """

    def __init__(self, store: ActivationStore, *, n_threads: int = DEFAULT_THREADS, verify: bool = True) -> None:
        self.store = store
        self.n_threads = max(1, n_threads)
        self._checksums = store.image_checksums if verify else None
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="store-reader")
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._lock = threading.Lock()
        self._array = None if store.compression == "none" else store.zarr_array()

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
        runs = plan_runs(rows, store.shard_images, max_run=_RUN_IMAGES)
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
        out = np.empty((len(rows), *self.store.spec.image_shape), dtype=self.store.dtype)
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

    def _read_runs(self, runs: Sequence[Run], out: npt.NDArray[Any]) -> None:
        """One thread's share."""
        for run in runs:
            self._read_run(run, out)

    def _read_run(self, run: Run, out: npt.NDArray[Any]) -> None:
        """One run of neighbours, read and checked."""
        target = out[run.slot : run.slot + run.n_images]
        first = run.shard * self.store.shard_images + run.first
        if self._array is not None:
            self._read_encoded(first, target)
        else:
            self._file(run.shard).read(run.first, target)
        if self._checksums is None:
            return
        for offset, image in enumerate(target):
            if checksum(as_bytes(image)) != self._checksums[first + offset]:
                row = first + offset
                raise StoreCorruptError(
                    f"row {row} ('{self.store.images.path[row]}') of store '{self.store.path}' fails its checksum: "
                    "its bytes changed on disk. Find all damage with: cytosae-cache verify "
                    f"'{self.store.path}'; repair by building again with --overwrite"
                )

    def _read_encoded(self, first: int, target: npt.NDArray[Any]) -> None:
        """Rows through zarr-python's codecs."""
        assert self._array is not None
        try:
            target[...] = np.asarray(self._array[first : first + len(target)])
        except (ValueError, RuntimeError, OSError) as error:
            raise StoreCorruptError(
                f"rows from {first} of store '{self.store.path}' cannot be decoded: {error}"
            ) from error

    def _file(self, shard: int) -> "_ShardFile":
        """The open file of a shard; the least recently used is closed when there are too many."""
        with self._lock:
            file = self._files.pop(shard, None)
            if file is None:
                file = _ShardFile(self.store, shard)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                # A thread may still be reading from it: the descriptor closes when the last one lets go.
                self._files.popitem(last=False)
            return file


class _ShardFile:
    """An open shard file and where its images lie."""

    def __init__(self, store: ActivationStore, shard: int) -> None:
        self.path = shard_path(store.path / "activations", shard)
        try:
            self._file = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except FileNotFoundError as error:
            raise StoreCorruptError(
                f"shard file '{self.path}' is missing. Repair by building again with --overwrite"
            ) from error
        index = read_index(self._file, os.fstat(self._file).st_size, store.shard_images, self.path)
        self._offsets = index[:, 0]
        lengths = index[: len(store.shard_rows(shard)), 1]
        if np.any((lengths != store.image_bytes) & (self._offsets[: len(lengths)] != MISSING)):
            raise StoreCorruptError(f"shard '{self.path}' holds images of another size than {store.image_bytes} bytes")

    def read(self, first: int, target: npt.NDArray[Any]) -> None:
        """Fill consecutive images: one read where they lie one after another, as ours always do."""
        offsets = self._offsets[first : first + len(target)]
        step = np.uint64(target[0].nbytes)
        if np.all(offsets != MISSING) and np.all(np.diff(offsets) == step):
            self._read_at(int(offsets[0]), as_bytes(target))
            return
        for offset, image in zip(offsets, target, strict=True):
            if offset == MISSING:
                image[...] = np.nan
            else:
                self._read_at(int(offset), as_bytes(image))

    def _read_at(self, offset: int, view: memoryview) -> None:
        while view:
            count = os.preadv(self._file, [view], offset)
            if not count:
                raise StoreCorruptError(f"shard file '{self.path}' ends before byte {offset}: it was cut off")
            view = view[count:]
            offset += count

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)
