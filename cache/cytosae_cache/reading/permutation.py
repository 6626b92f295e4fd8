"""Which rows, in which order, from which files: pure functions on integers, no I/O."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.keyed_order import KeyedOrder

IntArray = npt.NDArray[np.int64]

KEYED_ROWS = 1 << 24
"""Rows from which on an epoch's order takes no memory. Part of the order: another number gives other orders."""

_PART_ROWS = 1 << 16


class ReadRange(NamedTuple):
    """Consecutive images of one shard that go to consecutive slots of a batch."""

    shard: int
    """Number of the shard file."""
    first: int
    """First image, counted from the start of the shard."""
    n_images: int
    """Number of images."""
    slot: int
    """Slot of the first image in the batch."""


class EpochOrder:
    """Order in which one epoch visits the rows, any slice of it alone; the same on every machine.

    Below `KEYED_ROWS` rows, a uniform permutation: sorting raw 64-bit Philox numbers makes it independent of numpy's
    version, which `Generator.permutation` does not guarantee (NEP 19 freezes bit streams, not distributions). From
    there on that would take gigabytes, so the order is computed where it is asked for (`KeyedOrder`).

    Args:
        n_rows: Rows to visit; 0 or more.
        seed: Fixed for the whole run; 0 or more.
        epoch: Counted from 0; each epoch has its own order.

    Raises:
        ValueError: If an argument is negative.
    """

    def __init__(self, n_rows: int, *, seed: int, epoch: int) -> None:
        if min(n_rows, seed, epoch) < 0:
            raise ValueError(f"n_rows, seed and epoch must be 0 or more, found {n_rows}, {seed} and {epoch}")
        self._n_rows = n_rows
        if n_rows < KEYED_ROWS:
            self._rows: IntArray | KeyedOrder = _permutation(n_rows, seed, epoch)
        else:
            self._rows = KeyedOrder(n_rows, seed, epoch)

    def __len__(self) -> int:
        return self._n_rows

    def part(self, start: int, stop: int) -> IntArray:
        """The rows visited from position `start` to `stop`, or the end of the epoch."""
        if isinstance(self._rows, KeyedOrder):
            return self._rows(start, min(stop, self._n_rows))
        return self._rows[start:stop]

    def iter_parts(self, start: int, stop: int) -> Iterator[IntArray]:
        """The same in parts of a size that memory does not notice."""
        for at in range(start, min(stop, self._n_rows), _PART_ROWS):
            yield self.part(at, min(at + _PART_ROWS, stop))


def epoch_order(n_rows: int, *, seed: int, epoch: int) -> IntArray:
    """The whole order of an epoch at once (`EpochOrder`), shape `(n_rows,)`."""
    return EpochOrder(n_rows, seed=seed, epoch=epoch).part(0, n_rows)


def group_order(n_parts: int, *, seed: int, epoch: int, group: int) -> IntArray:
    """Order in which an epoch serves the parts of one row group: a uniform permutation, the same on every machine.

    Args:
        n_parts: Images or tokens in the group.
        seed: Fixed for the whole run; 0 or more.
        epoch: Counted from 0.
        group: Number of the group in its epoch, counted from 0.

    Returns:
        A permutation of `range(n_parts)`, shape `(n_parts,)`.
    """
    # From 1: a seed sequence is padded with zeros, so a third word of 0 would repeat the order of the epoch.
    return _permutation(n_parts, seed, epoch, group + 1)


class RowGroups(Sequence[IntArray]):
    """Row groups of one epoch; the rows of each are computed when it is asked for.

    Args:
        starts: Position in the epoch at which each group starts, then the number of rows, shape `(n_groups + 1,)`.
        get_rows: Increasing rows of a group, by its number.
    """

    def __init__(self, starts: IntArray, get_rows: Callable[[int], IntArray]) -> None:
        self.starts, self._get_rows = starts, get_rows

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, number: int) -> IntArray: ...
    @overload
    def __getitem__(self, number: slice) -> list[IntArray]: ...
    def __getitem__(self, number: int | slice) -> IntArray | list[IntArray]:
        numbers = range(len(self))[number]
        return self._get_rows(numbers) if isinstance(numbers, int) else [self._get_rows(each) for each in numbers]

    def number_at(self, position: int) -> int:
        """Number of the group that serves a position of the epoch."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1


def epoch_windows(shard_bounds: IntArray, *, window_shards: int, seed: int, epoch: int) -> RowGroups:
    """Windows of one epoch: whole shards in uniform random order, several per window.

    Args:
        shard_bounds: First row of every shard, and the number of rows at the end, shape `(n_shards + 1,)`.
        window_shards: Maximum number of shards per window; at least 1. Window sizes differ by at most one shard.
        seed: Fixed for the whole run; 0 or more.
        epoch: Counted from 0.

    Returns:
        Increasing row numbers of each window; all windows together contain every row once.

    Raises:
        ValueError: If `window_shards` is below 1, or `seed` or `epoch` is negative.
    """
    if window_shards < 1:
        raise ValueError(f"window_shards must be 1 or more, found {window_shards}")
    shards = epoch_order(len(shard_bounds) - 1, seed=seed, epoch=epoch)
    bounds = split_evenly(len(shards), window_shards)
    sizes = np.concatenate([[0], np.diff(shard_bounds)[shards]])

    def get_rows(number: int) -> IntArray:
        window = np.sort(shards[bounds[number] : bounds[number + 1]])
        return np.concatenate([np.arange(shard_bounds[shard], shard_bounds[shard + 1]) for shard in window])

    return RowGroups(np.cumsum(sizes)[bounds], get_rows)


def epoch_groups(n_rows: int, *, max_rows: int, seed: int, epoch: int) -> RowGroups:
    """Consecutive parts of the order of an epoch, as few as possible; their lengths differ by at most one.

    Args:
        n_rows: Rows of the epoch.
        max_rows: Most rows of a group; at least 1.
        seed: Fixed for the whole run; 0 or more.
        epoch: Counted from 0.
    """
    order, bounds = EpochOrder(n_rows, seed=seed, epoch=epoch), split_evenly(n_rows, max_rows)
    return RowGroups(bounds, lambda number: np.sort(order.part(int(bounds[number]), int(bounds[number + 1]))))


def split_evenly(n: int, max_length: int) -> IntArray:
    """Bounds of as few pieces of at most `max_length` entries as possible; their lengths differ by at most one.

    Returns:
        Start of every piece, then `n`, shape `(n_pieces + 1,)`.
    """
    n_pieces = -(-n // max_length)
    if not n_pieces:
        return np.zeros(1, dtype=np.int64)
    length, n_longer = divmod(n, n_pieces)
    numbers = np.arange(n_pieces + 1, dtype=np.int64)
    return numbers * length + np.minimum(numbers, n_longer)


def rebatch(pieces: Iterable[IntArray], length: int) -> Iterator[IntArray]:
    """Regroup the same numbers into arrays of `length` entries; the last one may be shorter."""
    pending: list[IntArray] = []
    n_pending = 0
    for piece in pieces:
        while n_pending + len(piece) >= length:
            pending.append(piece[: length - n_pending])
            piece = piece[length - n_pending :]
            yield pending[0] if len(pending) == 1 else np.concatenate(pending)
            pending, n_pending = [], 0
        if len(piece):
            pending.append(piece)
            n_pending += len(piece)
    if pending:
        yield np.concatenate(pending)


def iter_batches(n_rows: int, *, batch_rows: int, seed: int, samples_seen: int, stop: int) -> Iterator[IntArray]:
    """Rows of the batches between two positions in an endless run of epochs.

    Batches cross the border between epochs, so all have `batch_rows` rows except a shorter last one. A pure function
    of its arguments: starting at a later position gives the tail of an unbroken run.

    Args:
        n_rows: Rows in an epoch; at least 1.
        batch_rows: Rows in a batch; at least 1.
        seed: Seed of the run.
        samples_seen: Position at which to start: rows already visited, over all epochs.
        stop: Position at which to stop, counted in the same way.

    Returns:
        An iterator of row numbers, shape `(batch_rows,)` each.

    Raises:
        ValueError: If `n_rows` or `batch_rows` is below 1.
    """
    if n_rows < 1 or batch_rows < 1:
        raise ValueError(f"n_rows and batch_rows must be 1 or more, found {n_rows} and {batch_rows}")
    return rebatch(_epochs(n_rows, seed=seed, samples_seen=samples_seen, stop=stop), batch_rows)


def _epochs(n_rows: int, *, seed: int, samples_seen: int, stop: int) -> Iterator[IntArray]:
    """The orders of the epochs between two positions, the first and last one cut."""
    while samples_seen < stop:
        epoch, at = divmod(samples_seen, n_rows)
        yield from EpochOrder(n_rows, seed=seed, epoch=epoch).iter_parts(at, at + stop - samples_seen)
        samples_seen += n_rows - at


def _permutation(n: int, *words: int) -> IntArray:
    """A uniform permutation of `range(n)`, determined by the words."""
    keys = np.random.Philox(np.random.SeedSequence(words)).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def spread_rows(n_rows: int, n_wanted: int) -> IntArray:
    """Rows spread evenly over a store: the centres of `n_wanted` equal intervals, or all rows if there are fewer.

    Returns:
        Increasing row numbers, shape `(min(n_rows, n_wanted),)`.
    """
    n_wanted = min(n_rows, n_wanted)
    return ((2 * np.arange(n_wanted, dtype=np.int64) + 1) * n_rows) // (2 * max(n_wanted, 1))


def coalesce_reads(rows: IntArray, shard_images: int, max_images: int | None = None) -> list[ReadRange]:
    """Reads that fill a batch with the given rows; consecutive images of a shard become one read.

    Args:
        rows: Row numbers in the order of the batch, shape `(n,)`.
        shard_images: Images per shard.
        max_images: Largest number of images per read, so that several threads can share a long one; default unlimited.

    Returns:
        Reads in the order of their slots; together they fill each of the slots `0..n-1` once.
    """
    if not len(rows):
        return []
    rows = np.asarray(rows, dtype=np.int64)
    shards, firsts = np.divmod(rows, shard_images)
    breaks = (np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1).tolist()
    most = max_images or len(rows)
    shard_of, first_of = shards.tolist(), firsts.tolist()  # plain integers: indexing numpy arrays is slower
    return [
        ReadRange(shard_of[at], first_of[at], min(most, end - at), at)
        for start, end in itertools.pairwise([0, *breaks, len(rows)])
        for at in range(start, end, most)
    ]
