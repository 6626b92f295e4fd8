"""Creating a store and writing it shard by shard, durably and in the background, resumable at any time."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import NotFiniteError, StoreCorruptError, StoreError
from cytosae_cache.format.codec import make_codec
from cytosae_cache.format.columns import encode_hierarchy
from cytosae_cache.format.contents import CONTENTS_COLUMNS, digest_contents
from cytosae_cache.format.layout import COLUMNS_FOLDER, MAX_COLUMNS, ImageTable, StoreLayout
from cytosae_cache.format.marks import (
    PROGRESS_FOLDER,
    ShardMark,
    make_tables,
    mark_name,
    read_mark,
    remove_marks,
    write_mark,
)
from cytosae_cache.format.metadata import Provenance, hash_tables, write_attributes
from cytosae_cache.format.moments import Widen, image_sums, widen
from cytosae_cache.format.quantize import Channels, dequantize, measure_channels, quantize
from cytosae_cache.format.shard import as_bytes, checksum, digest_file, digest_parts, digest_raw, make_index, shard_name
from cytosae_cache.format.spec import Compression, StoreSpec
from cytosae_cache.format.texts import to_texts
from cytosae_cache.storage.base import Location, StorageBackend, map_requests, waiting_for_lock
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore

_QUEUED_SHARDS = 1
_LOOK_S = 0.2
"""How often a caller that waits looks whether writing has failed."""

_OUR_FOLDERS = ("activations/", "channels/", "images/", "moments/", "shards/", f"{PROGRESS_FOLDER}/")


def create_store(
    location: Location,
    spec: StoreSpec,
    images: ImageTable,
    provenance: Provenance,
    *,
    shard_images: int,
    compression: Compression = "none",
    columns: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
) -> ActivationStore:
    """Create an empty, unfinished store: metadata and the table of images, no activations.

    Args:
        location: Folder or URL to create; may contain what a killed build left, but nothing else.
        spec: What identifies the store.
        images: One entry per row.
        provenance: Where the store comes from.
        shard_images: Images per shard file; at least 1.
        compression: Lossless codec of every image.
        columns: What else is known about the images, by name: int64, float64 or numpy's variable-width text.

    Raises:
        ValueError: If `shard_images` is below 1, the table's columns differ in length, or there are too many of them.
        StoreError: If the folder contains other files.
    """
    lengths = [*map(len, images), *map(len, columns.values())]
    if len(columns) > MAX_COLUMNS:
        raise ValueError(f"a store takes at most {MAX_COLUMNS} further columns of images, found {len(columns)}")
    if shard_images < 1 or len(set(lengths)) != 1:
        raise ValueError(
            f"shard_images must be 1 or more and the columns of images equally long, found {shard_images} and {lengths}"
        )
    storage = open_storage(location)
    clear_leftovers(storage)
    tables: dict[str, npt.NDArray[Any]] = {
        f"images/{name}": to_texts(column) for name, column in zip(images._fields, images, strict=True)
    }
    if columns:
        tables[f"{COLUMNS_FOLDER}/names"] = to_texts(columns)
        tables |= {f"{COLUMNS_FOLDER}/{number}": column for number, column in enumerate(columns.values())}
    activations = (spec, len(images.path), shard_images, compression)
    files = encode_hierarchy(tables, activations=activations)
    for name, data in files.items():
        storage.write(name, [data])
    storage.sync(files)
    # Written last: without it the folder is not a store, so a build that was killed before starts from scratch.
    write_attributes(storage, spec, provenance, complete=False, files=hash_tables(storage))
    return ActivationStore(location)


def clear_leftovers(storage: StorageBackend) -> None:
    """Remove what a build left that was killed before it had created the store.

    Raises:
        StoreError: If the storage contains other files.
    """
    storage.remove_partials()
    names = storage.names()
    others = [name for name in names if not name.startswith(_OUR_FOLDERS)]
    if others:
        raise StoreError(
            f"'{storage}' is neither empty nor an unfinished store (found '{others[0]}'). Choose another place"
        )
    storage.remove(names)


@dataclass(frozen=True)
class ShardData:
    """A computed shard on its way to disk."""

    shard: int
    """Number of the shard."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)` in the store's `dtype`; rows of unreadable images are NaN."""
    sha256: Sequence[bytes | None]
    """SHA-256 of each image file; None if it could not be read."""
    reason: Sequence[str]
    """Why an image could not be read; '' for a valid one."""
    source_bytes: Sequence[int] = ()
    """Length of each image file, 0 if it could not be read; empty if there are no files."""


class StoreWriter:
    """Writes shards of an unfinished store in a background thread; use as a context manager.

    A shard's file is complete before its mark is written. A killed build therefore leaves complete shards, and
    `missing_shards` tells the next build which ones are still to do.

    The caller holds the storage's lock, or is one of several writers, which share the store: a shard then belongs to
    whoever creates its file first, and the others drop theirs. A file without a mark, which a killed writer left, is
    replaced under the lock, with its mark: a writer that is alive after all finds that mark and leaves it.

    Args:
        store: The unfinished store.
        widen: Converts numbers to float64; any exact conversion gives the same store, a faster one sooner.
        shared: Whether there may be other writers at the same time.

    Raises:
        StoreCorruptError: If a link leads out of the store.
    """

    def __init__(self, store: StoreLayout, *, widen: Widen = widen, shared: bool = False) -> None:
        store.storage.check_links()
        self.store, self._shared = store, shared
        self._storage, self._widen = store.storage, widen
        # Written before the first mark: without a mark they may be incomplete, and the first shard gives them again.
        self._channels = _read_channels(store) if store.n_finished_shards else None
        self._codec = make_codec(store.compression, np.dtype(store.spec.store_dtype).itemsize)
        # Not `queue.Queue`: Ctrl-C while the caller notifies the thread would lose the notification.
        self._queue: queue.SimpleQueue[ShardData | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(_QUEUED_SHARDS):
            self._room.put(None)
        self._failure: BaseException | None = None
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="shard-sums")
        self._thread = threading.Thread(target=self._run, name="shard-writer", daemon=True)
        self._thread.start()

    def missing_shards(self, among: Sequence[int] | None = None) -> list[int]:
        """Shards without a mark, or whose file does not match it, in order.

        Args:
            among: Shards to look at; all by default.
        """
        shards = range(self.store.n_shards) if among is None else among
        names = set(self._storage.names(f"{PROGRESS_FOLDER}/"))
        marked = [shard for shard in shards if mark_name(shard) in names]
        finished = zip(marked, map_requests(self._storage, self._is_finished, marked), strict=True)
        return sorted(set(shards) - {shard for shard, done in finished if done})

    def discard(self, missing: Iterable[int], finished: Iterable[int] = ()) -> None:
        """Make shards missing: remove their marks. Also removes the partial files that killed builds left.

        Call it for all missing shards before the first is submitted: a mark of an earlier build must never meet the new
        file of its shard.

        Args:
            missing: What `missing_shards` returned; another writer may have finished some of them since, and they stay.
            finished: Finished shards that are to be written again.
        """
        if self._shared:
            with waiting_for_lock(self._storage):
                damaged = [n for n in missing if read_mark(self._storage, n) is not None and not self._is_finished(n)]
                self._storage.remove(map(mark_name, [*damaged, *finished]))
            return
        names = {mark_name(shard) for shard in (*missing, *finished)}
        if len(names) == self.store.n_shards:
            self._channels = None  # the first shard gives them again
        self._storage.remove(sorted(names))
        self._storage.remove_partials()

    @property
    def needs_channels(self) -> bool:
        """Whether this is an int8 store whose first shard, which gives the decoding parameters, was not written yet."""
        if self.store.spec.store_dtype != "int8" or self._channels is not None:
            return False
        return _read_channels(StoreLayout(self.store.path)) is None

    def recorded_sources(self, shard: int) -> list[bytes | None]:
        """SHA-256 of the image files that a finished shard was made from; None for those that could not be read.

        Raises:
            StoreError: If the shard is not finished.
        """
        mark = read_mark(self._storage, shard)
        if mark is None:
            raise StoreError(f"shard {shard} of store '{self.store.path}' is not finished")
        return [bytes.fromhex(digest) or None for digest in mark.sha256]

    def submit(self, data: ShardData) -> None:
        """Queue a shard for writing; blocks while the disk is slower than the caller, who must not use the array again.

        Raises:
            OSError: If an earlier shard could not be written.
            NotFiniteError: If an earlier shard contains NaN or infinity.
        """
        while True:
            self._raise_failure()
            with contextlib.suppress(queue.Empty):
                self._room.get(timeout=_LOOK_S)
                break
        self._queue.put(data)

    def finish(self) -> ActivationStore:
        """Wait for the last shard, write the tables and mark the store complete.

        Returns:
            The complete store, opened.

        Raises:
            OSError: If a shard or table could not be written.
            StoreError: If a shard is missing.
        """
        self._stop()
        self._raise_failure()
        store, storage = self.store, self._storage
        tables = make_tables(
            self._iter_marks(), n_images=store.n_images, shard_images=store.shard_images, d_model=store.d_model
        )
        written: set[str] = set()
        for place, values in tables.items():
            # One after another: encoded, they take as much memory again.
            for name, data in encode_hierarchy({place: values}).items():
                if name not in written:
                    storage.write(name, [data])
                    written.add(name)
        storage.sync(written)
        storage.sync(map(shard_name, range(store.n_shards)), contents=False)  # their bytes were synced one by one
        files = hash_tables(storage)
        self._require_unchanged(files)
        channels = {} if self._channels is None else _channel_columns(self._channels)
        contents = digest_contents({**{name: tables[name] for name in CONTENTS_COLUMNS}, **channels})
        write_attributes(storage, store.spec, store.provenance, complete=True, files=files, contents=contents)
        remove_marks(storage)
        return ActivationStore.open(store.path)

    def finish_if_last(self) -> ActivationStore | None:
        """Wait for the last shard of this writer; if no other writer's is missing, complete the store, exactly once.

        Returns:
            The complete store, or None if shards of other writers are missing.

        Raises:
            OSError: As for `finish`.
            StoreError: As for `finish`.
        """
        self._stop()
        self._raise_failure()
        if not self._has_all_marks() and not StoreLayout(self.store.path).complete:
            return None
        with waiting_for_lock(self._storage):
            if StoreLayout(self.store.path).complete:
                return ActivationStore.open(self.store.path)
            if not self._has_all_marks() or self._unmark_damaged():
                return None
            self._channels = _read_channels(StoreLayout(self.store.path))
            finished = self.finish()
            self._storage.remove_partials(of_everyone=True)
            return finished

    def _unmark_damaged(self) -> bool:
        """Remove marks whose file was damaged or removed since, as far as its length shows; whether there were any."""
        shards = range(self.store.n_shards)
        sound = map_requests(self._storage, self._is_marked, shards)
        damaged = [shard for shard, is_sound in zip(shards, sound, strict=True) if not is_sound]
        self._storage.remove(map(mark_name, damaged))
        return bool(damaged)

    def _has_all_marks(self) -> bool:
        return len(self._storage.names(f"{PROGRESS_FOLDER}/")) >= self.store.n_shards

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what is queued, even after an error or Ctrl-C: finished work is kept."""
        self._stop()
        if kind is None:
            self._raise_failure()

    def _iter_marks(self) -> Iterator[ShardMark]:
        """The marks of all shards, in order.

        Raises:
            StoreError: If one is missing.
        """
        shards = range(self.store.n_shards)
        for shard, mark in enumerate(map_requests(self._storage, lambda n: read_mark(self._storage, n), shards)):
            if mark is None:
                raise StoreError(f"shard {shard} of store '{self.store.path}' was never written")
            yield mark

    def _require_unchanged(self, files: Mapping[str, str]) -> None:
        """Refuse to complete a store whose table of images was damaged since it was created.

        Raises:
            StoreCorruptError: If a file differs from its digest of then.
        """
        changed = next((name for name, digest in self.store.files.items() if files.get(name) != digest), None)
        if changed is not None:
            raise StoreCorruptError(
                f"'{self.store.path}/{changed}' was changed or damaged while the store was being built. Run the "
                "command again with --overwrite"
            )

    def _stop(self) -> None:
        """Let the thread write what is queued, then end it."""
        self._queue.put(None)
        self._thread.join()
        self._summing.shutdown()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        """The writing thread."""
        while (data := self._queue.get()) is not None:
            self._room.put(None)
            try:
                self._write(data)
            except BaseException as error:  # noqa: BLE001 - raised at the caller's next call
                self._failure = error
                return

    def _write(self, data: ShardData) -> None:
        """Check one shard, write its file, then its mark."""
        # The sums take about as long as the disk, so they run in parallel. Without a mark the file does not count.
        records, values = self._make_records(data)
        summary = self._summing.submit(_summarise, data, records, values, self.store, self._widen)
        parts = self._encode(records)
        encoded = None if self._codec is None else self._summing.submit(digest_parts, parts)
        write = self._storage.create if self._shared else self._storage.write
        is_ours = write(shard_name(data.shard), parts, sync=True) is not False
        fields = summary.result()
        if encoded is None:
            digest = digest_raw(fields["image_crc32c"], self.store.spec.record_bytes, bytes(parts[-1]))
        else:
            digest = encoded.result()
        mark = ShardMark(*digest, **fields, channels=_digest_channels(self._channels))
        if is_ours:
            write_mark(self._storage, data.shard, mark, only_new=self._shared)
        elif not self._is_marked(data.shard):
            with waiting_for_lock(self._storage):
                if not self._is_marked(data.shard) and not StoreLayout(self.store.path).complete:
                    self._storage.write(shard_name(data.shard), parts, sync=True)
                    write_mark(self._storage, data.shard, mark)

    def _is_marked(self, shard: int) -> bool:
        """Whether a writer has finished a shard."""
        mark = read_mark(self._storage, shard)
        return mark is not None and self._storage.size(shard_name(shard)) == mark.n_bytes

    def _make_records(self, data: ShardData) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """The stored form of a shard, and the activations that readers will decode from it."""
        spec, images = self.store.spec, data.activations
        if spec.store_dtype != "int8":
            return images, images
        if self._channels is None:
            sample = images[[not reason for reason in data.reason]]
            if not np.isfinite(sample).all():
                return images, images  # the summary will name the image
            self._channels = self._make_channels(data.shard, sample)
        records = np.empty((len(images), *spec.record_shape), dtype=np.int8)
        wide = np.empty(spec.image_shape, dtype=np.float32)
        for image, record in zip(images, records, strict=True):
            quantize(image, self._channels, record)
            # In place: the caller has given the array away, and sums must be those of what readers decode.
            dequantize(record, self._channels, image, wide)
        return records, images

    def _make_channels(self, shard: int, sample: npt.NDArray[Any]) -> Channels:
        """The decoding parameters of an int8 store: those of its first shard, whoever computed it first.

        A resumed build without them does not have a finished shard either.

        Raises:
            StoreError: If another writer should have computed the first shard before, and did not.
        """
        with waiting_for_lock(self._storage) if self._shared else contextlib.nullcontext():
            found = _read_channels(StoreLayout(self.store.path)) if self._shared else None
            if found is not None:
                return found
            if shard:
                raise StoreError(f"shard {shard} of int8 store '{self.store.path}' came before shard 0")
            channels = measure_channels(sample)
            self._write_channels(channels)
            return channels

    def _write_channels(self, channels: Channels) -> None:
        """Make the decoding parameters of an int8 store durable, before its first shard is written."""
        files = encode_hierarchy(_channel_columns(channels))
        for name, data in files.items():
            self._storage.write(name, [data])
        self._storage.sync(files)

    def _encode(self, records: npt.NDArray[Any]) -> list[memoryview | bytes]:
        """The bytes of a shard file, in parts."""
        store = self.store
        if self._codec is None:
            return [as_bytes(records), make_index([store.spec.record_bytes] * len(records), store.shard_images)]
        encoded = [self._codec.encode(record) for record in records]
        return [*encoded, make_index([len(image) for image in encoded], store.shard_images)]

    def _is_finished(self, shard: int) -> bool:
        """Whether the shard's file matches its mark."""
        mark, name = read_mark(self._storage, shard), shard_name(shard)
        if mark is None or self._storage.size(name) != mark.n_bytes:
            return False
        if mark.channels != _digest_channels(self._channels):
            return False
        return not self._storage.checks_content or digest_file(self._storage.open(name)).crc32c == mark.crc32c


def _read_channels(store: StoreLayout) -> Channels | None:
    """Decoding parameters of an unfinished store; None if they are damaged: its shards then count as missing."""
    try:
        return store.channels
    except StoreCorruptError:
        return None


def _digest_channels(channels: Channels | None) -> str:
    """What marks record of the decoding parameters."""
    return "" if channels is None else digest_contents(_channel_columns(channels))


def _channel_columns(channels: Channels) -> dict[str, npt.NDArray[Any]]:
    """Decoding parameters by their place in the store."""
    return {f"channels/{name}": values for name, values in channels._asdict().items()}


def _summarise(
    data: ShardData, records: npt.NDArray[Any], values: npt.NDArray[Any], store: StoreLayout, widen: Widen
) -> dict[str, Any]:
    """The fields of a mark that follow from the shard's contents."""
    valid = np.array([not reason for reason in data.reason], dtype=bool)
    total, total_sq = (np.zeros(store.d_model) for _ in range(2))
    wide = np.empty(store.spec.image_shape)
    for slot in np.flatnonzero(valid):
        sums, squares = image_sums(values[slot], wide, widen)
        if not np.isfinite(squares).all():
            row = store.shard_rows(data.shard)[slot]
            raise NotFiniteError(
                f"image {store.images.path[row]!r} (row {row}) has activations of NaN or infinity in {store.dtype}. "
                "Try --store-dtype float32 or --precision fp32; if neither helps, the weights do not fit the images"
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
