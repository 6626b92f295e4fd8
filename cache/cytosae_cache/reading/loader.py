"""Batches prefetched while the caller computes: shuffled for training, in row order for one-pass statistics."""

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.prefetch import Plan, Prefetcher
from cytosae_cache.reading.reader import RowReader, aligned_buffer
from cytosae_cache.reading.sampler import BatchOf, RowGroup, Sampler, Shuffle

MakeBuffer = Callable[[tuple[int, ...], np.dtype[np.generic]], npt.NDArray[Any]]


class Batch(NamedTuple):
    """Images, or tokens of many images, for one training step."""

    rows: IntArray
    """Row numbers, counted through all stores: one per image, shape `(n,)`, or one per token if tokens are mixed, shape
    `(n, n_tokens)`."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; reused memory, valid until the next batch is requested."""
    samples_seen: int
    """Samples served including this batch, in images, over all epochs: where to resume."""


class RowBlock(NamedTuple):
    """Consecutive rows for one-pass statistics."""

    first: int
    """Number of the first row."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)`; zeros for unreadable images; reused memory, valid until the next request."""
    valid: npt.NDArray[np.bool_]
    """Whether each row counts, shape `(n,)`."""


class ShuffledLoader:
    """Batches in a new order every epoch, from one or several stores, prefetched while the caller trains.

    The order is a pure function of the stores' layout, the options and the position
    (`cytosae_cache.reading.sampler`), so a loader that starts at `samples_seen` gives exactly the batches that an
    unbroken one gives from there on. If the order allows it, every image is read straight into its slot of a batch.
    Otherwise a row group is read while the previous one is served: two groups are in memory, however large the stores
    are.

    Args:
        images: The images to serve.
        batch_images: Images per batch, or as many tokens as that many images have; at least 1.
        seed: Seed of the order.
        samples_seen: Position at which to start: samples already served, in images, over all epochs.
        stop: Position at which to stop, counted in the same way.
        shuffle: `global` for a uniform permutation of all images, `windowed` for whole shards in random order, several
            mixed at a time.
        batch_of: `images` for whole images, `tokens` for tokens drawn from many images.
        in_memory: Whether to read all images now, and serve the same batches from memory.
        make_buffer: Makes the memory of a batch from its shape and dtype, for example pinned memory.
        part: Which part of every batch to serve, and into how many equal parts it is cut, for several processes that
            train together: part 0 of 1 is all of it. Sizes and positions are those of the whole batches.

    Raises:
        ValueError: If `batch_images` is below 1, or `shuffle` or `batch_of` is unknown.
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
        part: tuple[int, int] = (0, 1),
    ) -> None:
        self._images, self._part = images, part
        n_tokens = images.image_shape[0]
        self._sampler = Sampler(images.layout, n_tokens, batch_images, seed, shuffle, batch_of)
        self._samples_seen, self._stop, self._make_buffer = samples_seen, stop, make_buffer
        self._prefetcher: Prefetcher[Any, Batch] | None = None
        self._memory = images.read_all() if in_memory else None

    @property
    def n_images(self) -> int:
        """Images per epoch."""
        return len(self._images)

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for data so far."""
        return self._prefetcher.waited_s if self._prefetcher is not None else 0.0

    def __iter__(self) -> Iterator[Batch]:
        """Batches from `samples_seen` to `stop`."""
        if self._memory is not None:
            return self._prefetch(self._iter_plans(), self._gather)
        if self._sampler.needs_groups:
            return self._iter_mixed()
        return self._prefetch(self._iter_plans(), self._read)

    def _prefetch(
        self, plans: Iterable[tuple[int, Plan]], fill: Callable[[Plan, npt.NDArray[Any]], IntArray]
    ) -> Generator[Batch, None, None]:
        """Prefetch one batch per pair `(n_images, plan)`; `fill` carries out the plan and returns the row numbers."""
        samples_seen = self._samples_seen

        def fill_batch(plan: tuple[int, Plan], buffer: npt.NDArray[Any]) -> Batch:
            nonlocal samples_seen
            n_images, content = plan
            own = buffer[: len(range(n_images)[self._own(n_images)])]
            rows = fill(content, own)
            samples_seen += n_images
            return Batch(rows, own, samples_seen)

        most = min(self._sampler.batch_images, max(self._stop - self._samples_seen, 1))
        shape = (-(-most // self._part[1]), *self._images.image_shape)
        self._prefetcher = Prefetcher(plans, fill_batch, lambda: self._make_buffer(shape, self._images.dtype))
        return iter(self._prefetcher)

    def _iter_plans(self) -> Iterator[tuple[int, IntArray]]:
        """The pairs `(n_images, own part numbers)` of all batches."""
        n_parts = self._sampler.parts_per_row
        for parts in self._sampler.iter_batches(samples_seen=self._samples_seen, stop=self._stop):
            n_images = len(parts) // n_parts
            own = self._own(n_images)
            yield n_images, parts[own.start * n_parts : own.stop * n_parts]

    def _own(self, n_images: int) -> slice:
        """Which images of a batch are served."""
        number, n = self._part
        return slice(n_images * number // n, n_images * (number + 1) // n)

    def _read(self, images: IntArray, out: npt.NDArray[Any]) -> IntArray:
        """Read whole images straight into their slots."""
        self._images.read(images, out)
        return self._images.rows[images]

    def _gather(self, parts: IntArray, out: npt.NDArray[Any]) -> IntArray:
        """Copy parts of the images that are in memory."""
        assert self._memory is not None
        n_parts = self._sampler.parts_per_row
        gather(self._memory, parts, out, n_parts)
        rows = self._images.rows[parts // n_parts]
        return rows if n_parts == 1 else rows.reshape(out.shape[:2])

    def _iter_mixed(self) -> Iterator[Batch]:
        """Batches drawn from row groups; the next group is read meanwhile."""
        sampler, images = self._sampler, self._images
        shape = (sampler.max_group_rows, *images.image_shape)

        def read_group(group: RowGroup, buffer: npt.NDArray[Any]) -> tuple[RowGroup, npt.NDArray[Any]]:
            images.read(group.rows, buffer[: len(group.rows)])
            return group, buffer

        plans = sampler.iter_groups(samples_seen=self._samples_seen, stop=self._stop)
        groups = iter(Prefetcher(plans, read_group, lambda: aligned_buffer(shape, images.dtype), depth=2))
        mixer = _Mixer(groups, sampler.parts_per_row)

        def fill(n_images: int, out: npt.NDArray[Any]) -> IntArray:
            own = self._own(n_images)
            mixer.skip(own.start)
            rows = images.rows[mixer.fill(out)]
            mixer.skip(n_images - own.stop)
            return rows

        size = sampler.batch_images
        sizes = (min(size, self._stop - at) for at in range(self._samples_seen, self._stop, size))
        batches = self._prefetch(((n_images, n_images) for n_images in sizes), fill)
        # Batches close first: their thread waits for the one that reads groups.
        with contextlib.closing(groups), contextlib.closing(batches):
            yield from batches


class _Mixer:
    """Serves the parts of row groups, one group after another."""

    def __init__(self, groups: Iterator[tuple[RowGroup, npt.NDArray[Any]]], parts_per_row: int) -> None:
        self._groups, self._parts_per_row = groups, parts_per_row
        self._group = RowGroup(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
        self._buffer: npt.NDArray[Any] = np.empty(0)
        self._served = 0

    def skip(self, n_images: int) -> None:
        """Leave out the parts of as many images as other processes serve."""
        left = n_images * self._parts_per_row
        while left:
            self._next_group_if_served()
            n = min(left, len(self._group.order) - self._served)
            self._served += n
            left -= n

    def _next_group_if_served(self) -> None:
        if self._served == len(self._group.order):
            self._group, self._buffer = next(self._groups)
            self._served = 0

    def fill(self, out: npt.NDArray[Any]) -> IntArray:
        """Fill a batch with the next parts; returns the image number of each, shape `(n,)` or `(n, n_tokens)`."""
        n_parts = self._parts_per_row
        slots = out.reshape(len(out) * n_parts, *out.shape[1:] if n_parts == 1 else out.shape[2:])
        rows = np.empty(len(slots), dtype=np.int64)
        filled = 0
        while filled < len(slots):
            self._next_group_if_served()
            parts = self._group.order[self._served :][: len(slots) - filled]
            gather(self._buffer, parts, slots[filled : filled + len(parts)], n_parts)
            rows[filled : filled + len(parts)] = self._group.rows[parts // n_parts]
            self._served += len(parts)
            filled += len(parts)
        return rows if n_parts == 1 else rows.reshape(out.shape[:2])


def gather(images: npt.NDArray[Any], parts: IntArray, out: npt.NDArray[Any], parts_per_row: int) -> None:
    """Copy images or tokens: seen as an array of parts, `out` becomes `images[parts]`.

    Args:
        images: C-contiguous, shape `(n, n_tokens, d_model)`.
        parts: Part numbers, `image * parts_per_row + token`, shape `(m,)`.
        out: C-contiguous memory for `m` parts, of the same dtype.
        parts_per_row: 1 for whole images, `n_tokens` for tokens.
    """
    source = images.reshape(len(images) * parts_per_row, -1)
    # Not the default mode, which makes a second copy so that `out` is unchanged if an index is out of range.
    np.take(source, parts, axis=0, out=out.reshape(len(parts), source.shape[1]), mode="clip")


def iter_row_blocks(
    reader: RowReader, *, block_rows: int, start: int = 0, stop: int | None = None
) -> Iterator[RowBlock]:
    """Read rows of a store in order, in blocks that start at multiples of `block_rows`.

    Args:
        reader: Reader of the store.
        block_rows: Rows per block; at least 1.
        start: First row.
        stop: Row at which to stop; default the end of the store.

    Yields:
        Blocks of `block_rows` rows; the first and last one are shorter where `start` and `stop` cut them.
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
