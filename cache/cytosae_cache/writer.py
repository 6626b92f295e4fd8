"""Writing a store shard by shard, durably, in the background, and going on after an interruption."""

import contextlib
import json
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError
from cytosae_cache.format.codec import make_codec
from cytosae_cache.format.moments import Widen, image_sums, widen
from cytosae_cache.format.quantize import dequantize, measure_channels, quantize
from cytosae_cache.format.shard import as_bytes, checksum, digest_file, digest_parts, make_index, shard_name
from cytosae_cache.store import PROGRESS_FOLDER, ActivationStore

_QUEUED_SHARDS = 1


class NotFiniteError(StoreError):
    """Activations hold NaN or infinity, or values beyond the store's type."""


@dataclass(frozen=True)
class ShardMark:
    """The completion mark of a shard: what the file must be, and what the tables will say of its images."""

    n_bytes: int
    """Length of the file."""
    crc32c: int
    """Checksum of the file."""
    image_crc32c: list[int]
    """Checksum of each image's bytes."""
    sha256: list[str]
    """SHA-256 of each source file, 64 hex digits, '' where it could not be read."""
    source_bytes: list[int]
    """Length of each source file, 0 where it could not be read."""
    reason: list[str]
    """Why an image could not be read, '' for a valid one."""
    count: int
    """Valid tokens."""
    sum: list[float]
    """Sum over valid tokens a channel."""
    sum_sq: list[float]
    """Sum of squares over valid tokens a channel."""


@dataclass(frozen=True)
class ShardData:
    """A computed shard on its way to disk."""

    shard: int
    """Number of the shard."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)` in the store's `dtype`; rows of unreadable images hold NaN."""
    sha256: Sequence[bytes | None]
    """SHA-256 of each source file."""
    reason: Sequence[str]
    """Why an image could not be read, '' for a valid one."""
    source_bytes: Sequence[int] = ()
    """Length of each source file, 0 where it could not be read; may be left out if there are no files."""


class StoreWriter:
    """Writes shards in a background thread; use as a context manager.

    A shard's file is whole before its mark is written, so a killed build leaves whole shards, and `missing_shards` of
    the next one tells which are still to do.

    Args:
        store: The unfinished store.
        widen: A faster way to convert numbers to float64, if there is one; any exact one gives the same store.
    """

    def __init__(self, store: ActivationStore, *, widen: Widen = widen) -> None:
        self.store = store
        self._storage, self._widen = store.storage, widen
        self._codec = make_codec(store.compression, np.dtype(store.spec.store_dtype).itemsize)
        self._queue: queue.Queue[ShardData | None] = queue.Queue(maxsize=_QUEUED_SHARDS)
        self._failure: BaseException | None = None
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="shard-sums")
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def missing_shards(self) -> list[int]:
        """Shards that are not there as their mark says, in order; their marks and stray files are removed."""
        missing = [shard for shard in range(self.store.n_shards) if not self._verify(shard)]
        self._storage.remove(_mark_name(shard) for shard in missing)
        self._storage.remove_partials()
        return missing

    def recorded_sources(self, shard: int) -> list[bytes | None]:
        """SHA-256 of the source files that a finished shard was made from, None where one could not be read.

        Raises:
            StoreError: If the shard is not finished.
        """
        mark = self._read_mark(shard)
        if mark is None:
            raise StoreError(f"shard {shard} of store '{self.store.path}' is not finished")
        return [bytes.fromhex(digest) or None for digest in mark.sha256]

    def discard(self, shard: int) -> None:
        """Take a finished shard for missing from now on."""
        self._storage.remove([_mark_name(shard)])

    def submit(self, data: ShardData) -> None:
        """Queue a shard for writing; waits while the disk is behind. The caller gives the array away.

        Raises:
            OSError: If an earlier shard could not be written.
            NotFiniteError: If an earlier shard holds NaN or infinity.
        """
        while True:
            self._raise_failure()
            with contextlib.suppress(queue.Full):
                self._queue.put(data, timeout=0.2)
                return

    def finish(self) -> None:
        """Wait for the last shard, write the tables and mark the store complete.

        Raises:
            OSError: If a shard or table could not be written.
            StoreError: If a shard is missing.
        """
        self._stop()
        self._raise_failure()
        marks = [self._read_mark(shard) for shard in range(self.store.n_shards)]
        if None in marks:
            raise StoreError(f"shard {marks.index(None)} of store '{self.store.path}' was never written")
        self.store.finish(_make_tables([mark for mark in marks if mark is not None], self.store.d_model))
        self._storage.remove(self._storage.names(f"{PROGRESS_FOLDER}/"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, also after an error or Ctrl-C: finished work is kept."""
        self._stop()
        if kind is None:
            self._raise_failure()

    def _stop(self) -> None:
        """Let the thread write what is queued, then end it."""
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=0.2)
                self._thread.join()
        self._summing.shutdown()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        """Body of the thread."""
        while (data := self._queue.get()) is not None:
            try:
                self._write(data)
            except BaseException as error:  # noqa: BLE001 - handed to the caller at its next call
                self._failure = error
                return

    def _write(self, data: ShardData) -> None:
        """One shard: checks, file, mark."""
        # The sums take about as long as the disk: they run beside it. Without a mark the file counts for nothing.
        records, values = self._make_records(data)
        summary = self._summing.submit(_summarise, data, records, values, self.store, self._widen)
        parts = self._encode(records)
        digest = self._summing.submit(digest_parts, parts)
        self._storage.write(shard_name(data.shard), parts, sync=True)
        n_bytes, crc = digest.result()
        mark = ShardMark(n_bytes=n_bytes, crc32c=crc, **summary.result())
        # Not synced: a mark that a power cut takes away or cuts off only makes its shard count as missing.
        self._storage.write(_mark_name(data.shard), [json.dumps(asdict(mark)).encode()])

    def _make_records(self, data: ShardData) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """What is stored of a shard, and the activations that will be read from it."""
        spec, images = self.store.spec, data.activations
        if spec.store_dtype != "int8":
            return images, images
        if self.store.channels is None:
            # Always the first shard: a resumed build without them has no finished shard either.
            sample = images[[not reason for reason in data.reason]]
            if not np.isfinite(sample).all():
                return images, images  # the summary will name the image
            self.store.set_channels(measure_channels(sample))
        assert self.store.channels is not None
        records = np.empty((len(images), *spec.record_shape), dtype=np.int8)
        wide = np.empty(spec.image_shape, dtype=np.float32)
        for image, record in zip(images, records, strict=True):
            quantize(image, self.store.channels, record)
            # In place: nobody else has the array any more, and the sums are those of what will be read.
            dequantize(record, self.store.channels, image, wide)
        return records, images

    def _encode(self, records: npt.NDArray[Any]) -> list[memoryview | bytes]:
        """The bytes of the shard file, in parts."""
        store = self.store
        if self._codec is None:
            return [as_bytes(records), make_index([store.spec.record_bytes] * len(records), store.shard_images)]
        encoded = [self._codec.encode(record) for record in records]
        return [*encoded, make_index([len(image) for image in encoded], store.shard_images)]

    def _read_mark(self, shard: int) -> ShardMark | None:
        """The mark of a shard; None if there is none that can be read."""
        try:
            return ShardMark(**json.loads(self._storage.read(_mark_name(shard))))
        except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
            return None

    def _verify(self, shard: int) -> bool:
        """Whether the shard's file is what its mark says."""
        mark, name = self._read_mark(shard), shard_name(shard)
        if mark is None or self._storage.size(name) != mark.n_bytes:
            return False
        return not self._storage.checks_content or digest_file(self._storage.open(name)).crc32c == mark.crc32c


def _mark_name(shard: int) -> str:
    """File of a shard's completion mark."""
    return f"{PROGRESS_FOLDER}/{shard}.json"


def _summarise(
    data: ShardData, records: npt.NDArray[Any], values: npt.NDArray[Any], store: ActivationStore, widen: Widen
) -> dict[str, Any]:
    """Everything of a mark that follows from the shard's contents."""
    valid = np.array([not reason for reason in data.reason], dtype=bool)
    total, total_sq = (np.zeros(store.d_model) for _ in range(2))
    wide = np.empty(store.spec.image_shape)
    for slot in np.flatnonzero(valid):
        sums, squares = image_sums(values[slot], wide, widen)
        if not np.isfinite(squares).all():
            row = store.shard_rows(data.shard)[slot]
            raise NotFiniteError(
                f"activations of image '{store.images.path[row]}' (row {row}) hold NaN or infinity in {store.dtype}. "
                "Try --store-dtype float32 or --precision fp32; if it persists, the weights do not fit the images"
            )
        total += sums
        total_sq += squares
    return {
        "image_crc32c": [checksum(as_bytes(record)) for record in records],
        "sha256": [digest.hex() if digest is not None else "" for digest in data.sha256],
        "source_bytes": list(data.source_bytes) or [0] * len(data.reason),
        "reason": list(data.reason),
        "count": int(valid.sum()) * store.n_tokens,
        "sum": total.tolist(),
        "sum_sq": total_sq.tolist(),
    }


def _make_tables(marks: Sequence[ShardMark], d_model: int) -> dict[str, npt.NDArray[Any]]:
    """The arrays known only after the build, by their place in the store."""
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
