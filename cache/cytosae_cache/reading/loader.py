"""Batches read ahead of the computation: shuffled for training, in row order for one-pass statistics."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.reading.sampler import BatchOf, Group, Sampler, Shuffle

PREFETCHED = 3
"""Batches in memory at once: one in use, the others filled or being filled."""

Plan = TypeVar("Plan")
Item = TypeVar("Item")
MakeBuffer = Callable[[tuple[int, ...], np.dtype[np.generic]], npt.NDArray[Any]]


class Batch(NamedTuple):
    """Images, or tokens of many images, for one training step."""

    rows: IntArray
    """Row numbers, counted through all stores one after another: of each image, shape `(n,)`, or where tokens are
    mixed of each token, shape `(n, n_tokens)`."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; reused memory, valid until the next batch is asked for."""
    samples_seen: int
    """Images' worth served when this batch has been used, over all epochs: where to resume."""


class RowBlock(NamedTuple):
    """Consecutive rows for a statistic."""

    first: int
    """Row number of the first."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; zeros for unreadable images; valid until the next block is asked for."""
    valid: npt.NDArray[np.bool_]
    """Whether each row counts, shape `(n,)`."""


class Prefetcher(Generic[Plan, Item]):
    """Fills reused buffers in a background thread, in the order of the plans.

    Args:
        plans: What to read.
        fill: Reads one plan into a buffer and returns what the consumer gets.
        make_buffer: Makes a buffer, called `depth` times.
        depth: Buffers in rotation.
    """

    def __init__(
        self,
        plans: Iterable[Plan],
        fill: Callable[[Plan, npt.NDArray[Any]], Item],
        make_buffer: Callable[[], npt.NDArray[Any]],
        *,
        depth: int = PREFETCHED,
    ) -> None:
        self._plans, self._fill, self._make_buffer, self._depth = plans, fill, make_buffer, max(2, depth)
        self.waited_s = 0.0
        """Seconds that the consumer waited for data."""

    def __iter__(self) -> Generator[Item, None, None]:
        """What `fill` returned for each plan; its buffer is reused once the next is asked for."""
        free: queue.Queue[npt.NDArray[Any] | None] = queue.Queue()
        ready: queue.Queue[tuple[Item, npt.NDArray[Any]] | BaseException | None] = queue.Queue()
        for _ in range(self._depth):
            free.put(self._make_buffer())

        def run() -> None:
            try:
                for plan in self._plans:
                    buffer = free.get()
                    if buffer is None:
                        return
                    ready.put((self._fill(plan, buffer), buffer))
                ready.put(None)
            except BaseException as error:  # noqa: BLE001 - raised in the consumer
                ready.put(error)

        thread = threading.Thread(target=run, name="read-ahead", daemon=True)
        thread.start()
        try:
            while (filled := self._wait(ready)) is not None:
                if isinstance(filled, BaseException):
                    raise filled
                yield filled[0]
                free.put(filled[1])
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    free.get_nowait()
            free.put(None)
            thread.join()

    def _wait(self, ready: "queue.Queue[Any]") -> Any:  # noqa: ANN401 - whatever was queued
        start = time.perf_counter()
        filled = ready.get()
        self.waited_s += time.perf_counter() - start
        return filled


class ShuffledLoader:
    """Batches in a new order every epoch, from one store or several as one, read ahead of the training step.

    The order is a pure function of the stores' layout, the options and the samples_seen
    (`cytosae_cache.reading.sampler`), so a stream begun at `samples_seen` gives exactly the batches that would have
    come.
    Where it allows, every image is read straight into its slot of a batch. Otherwise a group of images is read while
    the one before it is served: two groups are in memory, however large the stores are.

    Args:
        images: What is streamed.
        batch_images: Images a batch, or images' worth of tokens; at least 1.
        seed: Seed of the order.
        samples_seen: Images' worth already served, over all epochs.
        stop: Position at which to stop.
        shuffle: `global` for a uniform permutation of all images, `windowed` for whole shards in random order, some
            of them mixed at a time.
        batch_of: `images` for whole images, `tokens` for tokens drawn from many.
        in_memory: Read all images once, now, and serve the same batches from memory.
        make_buffer: Makes the memory of a batch from its shape and dtype, for example pinned memory.

    Raises:
        ValueError: If `batch_images` is below 1.
    """

    def __init__(
        self,
        images: ConcatReader,
        *,
        batch_images: int,
        seed: int,
        samples_seen: int = 0,
        stop: int,
        shuffle: Shuffle = "global",
        batch_of: BatchOf = "images",
        in_memory: bool = False,
        make_buffer: MakeBuffer = aligned_buffer,
    ) -> None:
        self._images = images
        n_tokens = images.image_shape[0]
        self._sampling = Sampler(images.layout, n_tokens, batch_images, seed, shuffle, batch_of)
        self._samples_seen, self._stop, self._make_buffer = samples_seen, stop, make_buffer
        self._ahead: Prefetcher[Any, Batch] | None = None
        self._memory = images.read_all() if in_memory else None

    @property
    def n_images(self) -> int:
        """Valid images: the length of an epoch."""
        return len(self._images)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._ahead.waited_s if self._ahead is not None else 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the stream's samples_seen to its stop."""
        if self._memory is not None:
            return self._read_ahead(self._batches(), self._gather)
        if self._sampling.direct:
            return self._read_ahead(self._batches(), self._read)
        return self._mixed()

    def _read_ahead(
        self, plans: Iterable[tuple[int, Plan]], fill: Callable[[Plan, npt.NDArray[Any]], IntArray]
    ) -> Generator[Batch, None, None]:
        """Batches from plans that each come with the images' worth it serves; `fill` returns the rows it put in."""
        samples_seen = self._samples_seen

        def fill_batch(plan: tuple[int, Plan], buffer: npt.NDArray[Any]) -> Batch:
            nonlocal samples_seen
            n_images, what = plan
            rows = fill(what, buffer[:n_images])
            samples_seen += n_images
            return Batch(rows, buffer[:n_images], samples_seen)

        shape = (self._sampling.batch_images, *self._images.image_shape)
        self._ahead = Prefetcher(plans, fill_batch, lambda: self._make_buffer(shape, self._images.dtype))
        return iter(self._ahead)

    def _batches(self) -> Iterator[tuple[int, IntArray]]:
        """Images' worth and part numbers of each batch."""
        for parts in self._sampling.iter_batches(samples_seen=self._samples_seen, stop=self._stop):
            yield len(parts) // self._sampling.parts_per_row, parts

    def _read(self, images: IntArray, out: npt.NDArray[Any]) -> IntArray:
        """Read whole images straight into their slots."""
        self._images.read(images, out)
        return self._images.rows[images]

    def _gather(self, parts: IntArray, out: npt.NDArray[Any]) -> IntArray:
        """Copy parts of the images in memory."""
        assert self._memory is not None
        n_parts = self._sampling.parts_per_row
        gather(self._memory, parts, out, n_parts)
        rows = self._images.rows[parts // n_parts]
        return rows if n_parts == 1 else rows.reshape(out.shape[:2])

    def _mixed(self) -> Iterator[Batch]:
        """Batches drawn from groups, the next of which is read meanwhile."""
        sampling, images = self._sampling, self._images
        shape = (sampling.max_group_rows, *images.image_shape)

        def read_group(group: Group, buffer: npt.NDArray[Any]) -> tuple[Group, npt.NDArray[Any]]:
            images.read(group.rows, buffer[: len(group.rows)])
            return group, buffer

        plans = sampling.iter_groups(samples_seen=self._samples_seen, stop=self._stop)
        groups = iter(Prefetcher(plans, read_group, lambda: aligned_buffer(shape, images.dtype), depth=2))
        mixer = _Mixer(groups, sampling.parts_per_row)

        def fill(n_images: int, out: npt.NDArray[Any]) -> IntArray:
            return images.rows[mixer.fill(out)]

        size = sampling.batch_images
        sizes = (min(size, self._stop - at) for at in range(self._samples_seen, self._stop, size))
        batches = self._read_ahead(((n_images, n_images) for n_images in sizes), fill)
        # The batches first: their thread waits for the groups'.
        with contextlib.closing(groups), contextlib.closing(batches):
            yield from batches


class _Mixer:
    """Serves the parts of groups, one group after another."""

    def __init__(self, groups: Iterator[tuple[Group, npt.NDArray[Any]]], parts_per_row: int) -> None:
        self._groups, self._parts_per_row = groups, parts_per_row
        self._group = Group(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        self._buffer: npt.NDArray[Any] = np.empty(0)
        self._served = 0

    def fill(self, out: npt.NDArray[Any]) -> IntArray:
        """Fill a batch with the next parts; returns the image of each, shape `(n,)` or `(n, n_tokens)`."""
        n_parts = self._parts_per_row
        slots = out.reshape(len(out) * n_parts, *out.shape[1:] if n_parts == 1 else out.shape[2:])
        rows = np.empty(len(slots), dtype=np.int64)
        filled = 0
        while filled < len(slots):
            if self._served == len(self._group.order):
                self._group, self._buffer = next(self._groups)
                self._served = 0
            parts = self._group.order[self._served :][: len(slots) - filled]
            gather(self._buffer, parts, slots[filled : filled + len(parts)], n_parts)
            rows[filled : filled + len(parts)] = self._group.rows[parts // n_parts]
            self._served += len(parts)
            filled += len(parts)
        return rows if n_parts == 1 else rows.reshape(out.shape[:2])


def gather(images: npt.NDArray[Any], parts: IntArray, out: npt.NDArray[Any], parts_per_row: int) -> None:
    """Copy images or tokens to where they are wanted: `out` in its own shape, part by part, becomes `images[parts]`.

    Args:
        images: C-contiguous, shape `(n, n_tokens, d_model)`.
        parts: Part numbers, `image * parts_per_row + token`, shape `(m,)`.
        out: C-contiguous memory of the same dtype, of `m` parts.
        parts_per_row: 1 for whole images, `n_tokens` for tokens.
    """
    source = images.reshape(len(images) * parts_per_row, -1)
    # Not the default mode: it makes a second copy, so as to leave `out` alone if a number is out of range.
    np.take(source, parts, axis=0, out=out.reshape(len(parts), -1), mode="clip")


def iter_row_blocks(
    reader: StoreReader, *, block_rows: int, start: int = 0, stop: int | None = None
) -> Iterator[RowBlock]:
    """Rows of a store in order, in blocks that start at multiples of `block_rows`.

    Args:
        reader: Where to read.
        block_rows: Rows a block; at least 1.
        start: First row wanted.
        stop: Row at which to stop; the store's end by default.

    Yields:
        Blocks of `block_rows` rows, the first and last shorter where `start` and `stop` cut them.
    """
    store = reader.store
    stop = store.n_images if stop is None else min(stop, store.n_images)
    first = range((start // block_rows) * block_rows, stop, block_rows)
    plans = (range(max(start, at), min(at + block_rows, stop)) for at in first)

    def fill(rows: range, buffer: npt.NDArray[Any]) -> RowBlock:
        activations = buffer[: len(rows)]
        reader.read_rows(np.arange(rows.start, rows.stop, dtype=np.int64), activations)
        valid = store.valid[rows.start : rows.stop]
        activations[~valid] = 0
        return RowBlock(rows.start, activations, valid)

    shape = (block_rows, *store.spec.image_shape)
    yield from Prefetcher(plans, fill, lambda: aligned_buffer(shape, store.dtype))
