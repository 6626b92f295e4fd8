"""Batches read ahead of the computation: shuffled for training, in row order for one-pass statistics."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.order import IntArray, iter_batches
from cytosae_cache.reader import StoreReader

READ_AHEAD = 3
"""Batches in memory at once: one in use, the others filled or being filled."""

Plan = TypeVar("Plan")


class Batch(NamedTuple):
    """Images for one training step."""

    rows: IntArray
    """Row numbers, counted through all stores one after another, shape `(n,)`."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; reused memory, valid until the next batch is asked for."""
    position: int
    """Images served when this batch has been used, over all epochs: where to resume."""


class RowBlock(NamedTuple):
    """Consecutive rows for a statistic."""

    first: int
    """Row number of the first."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; zeros for unreadable images; valid until the next block is asked for."""
    valid: npt.NDArray[np.bool_]
    """Whether each row counts, shape `(n,)`."""


class ReadAhead(Generic[Plan]):
    """Fills reused buffers in a background thread, in the order of the plans.

    Args:
        plans: What to read.
        fill: Reads one plan into a buffer.
        make_buffer: Makes a buffer, called `depth` times.
        depth: Buffers in rotation.
    """

    def __init__(
        self,
        plans: Iterable[Plan],
        fill: Callable[[Plan, npt.NDArray[Any]], None],
        make_buffer: Callable[[], npt.NDArray[Any]],
        *,
        depth: int = READ_AHEAD,
    ) -> None:
        self._plans, self._fill, self._make_buffer, self._depth = plans, fill, make_buffer, max(2, depth)
        self.waited_s = 0.0
        """Seconds that the consumer waited for data."""

    def __iter__(self) -> Iterator[tuple[Plan, npt.NDArray[Any]]]:
        """Plans with their filled buffers; a buffer is reused once the next is asked for."""
        free: queue.Queue[npt.NDArray[Any] | None] = queue.Queue()
        ready: queue.Queue[tuple[Plan, npt.NDArray[Any]] | BaseException | None] = queue.Queue()
        for _ in range(self._depth):
            free.put(self._make_buffer())

        def run() -> None:
            try:
                for plan in self._plans:
                    buffer = free.get()
                    if buffer is None:
                        return
                    self._fill(plan, buffer)
                    ready.put((plan, buffer))
                ready.put(None)
            except BaseException as error:  # noqa: BLE001 - raised in the consumer
                ready.put(error)

        thread = threading.Thread(target=run, name="read-ahead", daemon=True)
        thread.start()
        try:
            while (item := self._wait(ready)) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
                free.put(item[1])
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    free.get_nowait()
            free.put(None)
            thread.join()

    def _wait(self, ready: "queue.Queue[Any]") -> Any:  # noqa: ANN401 - whatever was queued
        start = time.perf_counter()
        item = ready.get()
        self.waited_s += time.perf_counter() - start
        return item


class TrainingStream:
    """Batches of whole images in a new uniform order every epoch, from one store or several as one.

    The order is a pure function of the number of valid images, the seed and the position, so a stream begun at
    `position` gives exactly the batches that would have come.

    Args:
        readers: Readers of stores with equal shapes and dtypes.
        batch_images: Images a batch; at least 1.
        seed: Seed of the order.
        position: Images already served, over all epochs.
        stop: Position at which to stop.

    Raises:
        StoreError: If no image is valid.
        StoreMismatchError: If the stores' shapes or dtypes differ.
    """

    def __init__(
        self, readers: Sequence[StoreReader], *, batch_images: int, seed: int, position: int = 0, stop: int
    ) -> None:
        first = readers[0].store
        for reader in readers[1:]:
            if reader.store.spec != first.spec:
                raise StoreMismatchError(
                    f"stores '{first.path}' and '{reader.store.path}' cannot be streamed as one: "
                    + "; ".join(first.spec.differences(reader.store.spec))
                )
        self._readers = readers
        self._offsets = np.cumsum([0, *(reader.store.n_images for reader in readers)])
        self._valid = np.concatenate(
            [reader.store.valid_rows + offset for reader, offset in zip(readers, self._offsets, strict=False)]
        )
        if not len(self._valid):
            raise StoreError(f"no image of store '{first.path}' could be read, so there is nothing to train on")
        self._batch_images, self._seed, self._position, self._stop = batch_images, seed, position, stop
        self._ahead: ReadAhead[IntArray] | None = None

    @property
    def n_images(self) -> int:
        """Valid images: the length of an epoch."""
        return len(self._valid)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._ahead.waited_s if self._ahead is not None else 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the stream's position to its stop."""
        plans = iter_batches(
            self.n_images, batch_rows=self._batch_images, seed=self._seed, position=self._position, stop=self._stop
        )
        store, position = self._readers[0].store, self._position
        shape = (self._batch_images, *store.spec.image_shape)
        self._ahead = ReadAhead(plans, self._fill, lambda: np.empty(shape, dtype=store.dtype))
        for order, buffer in self._ahead:
            position += len(order)
            yield Batch(self._valid[order], buffer[: len(order)], position)

    def _fill(self, order: IntArray, buffer: npt.NDArray[Any]) -> None:
        rows = self._valid[order]
        if len(self._readers) == 1:
            self._readers[0].read_rows(rows, buffer[: len(rows)])
            return
        for number, reader in enumerate(self._readers):
            slots = np.flatnonzero((rows >= self._offsets[number]) & (rows < self._offsets[number + 1]))
            if len(slots):
                buffer[slots] = reader.read(rows[slots] - self._offsets[number])


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

    def fill(rows: range, buffer: npt.NDArray[Any]) -> None:
        reader.read_rows(np.arange(rows.start, rows.stop, dtype=np.int64), buffer[: len(rows)])

    shape = (block_rows, *store.spec.image_shape)
    for rows, buffer in ReadAhead(plans, fill, lambda: np.empty(shape, dtype=store.dtype)):
        valid = store.valid[rows.start : rows.stop]
        activations = buffer[: len(rows)]
        activations[~valid] = 0
        yield RowBlock(rows.start, activations, valid)
