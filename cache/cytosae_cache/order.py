"""Which rows, in which order, from which files: pure functions on integers, no I/O."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


class Run(NamedTuple):
    """Consecutive images of one shard that go to consecutive slots of a batch."""

    shard: int
    """Number of the shard file."""
    first: int
    """First image, counted from the start of the shard."""
    n_images: int
    """Images in the run."""
    slot: int
    """Place of the first image in the batch."""


def epoch_order(n_rows: int, *, seed: int, epoch: int) -> IntArray:
    """Order in which one epoch visits the rows: a uniform permutation, the same on every machine.

    Sorting raw 64-bit Philox numbers keeps the order independent of numpy's version, which its `permutation` does
    not promise (NEP 19 freezes bit streams, not distributions).

    Args:
        n_rows: Rows to visit; 0 or more.
        seed: Fixed for the whole run; 0 or more.
        epoch: Counted from 0; each epoch has its own order.

    Returns:
        A permutation of `range(n_rows)`, shape `(n_rows,)`.

    Raises:
        ValueError: If an argument is negative.
    """
    if min(n_rows, seed, epoch) < 0:
        raise ValueError(f"n_rows, seed and epoch must be 0 or more, found {n_rows}, {seed} and {epoch}")
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n_rows)
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)


def iter_batches(n_rows: int, *, batch_rows: int, seed: int, position: int, stop: int) -> Iterator[IntArray]:
    """Rows of the batches from one position of an endless run of epochs to another.

    Batches cross the border between epochs, so all have `batch_rows` rows except a shorter last one. A pure function
    of its arguments: starting at a later position gives the tail of an unbroken run.

    Args:
        n_rows: Rows in an epoch; at least 1.
        batch_rows: Rows in a batch; at least 1.
        seed: Seed of the run.
        position: Rows already visited, over all epochs.
        stop: Position at which to stop.

    Yields:
        Row numbers, shape `(batch_rows,)`.

    Raises:
        ValueError: If `n_rows` or `batch_rows` is below 1.
    """
    if n_rows < 1 or batch_rows < 1:
        raise ValueError(f"n_rows and batch_rows must be 1 or more, found {n_rows} and {batch_rows}")
    epoch, order = -1, np.empty(0, dtype=np.int64)
    while position < stop:
        wanted = min(batch_rows, stop - position)
        parts: list[IntArray] = []
        while wanted:
            if position // n_rows != epoch:
                epoch = position // n_rows
                order = epoch_order(n_rows, seed=seed, epoch=epoch)
            part = order[position % n_rows :][:wanted]
            parts.append(part)
            position += len(part)
            wanted -= len(part)
        yield parts[0] if len(parts) == 1 else np.concatenate(parts)


def spread_rows(n_rows: int, n_wanted: int) -> IntArray:
    """Rows spread evenly over a store: the middles of `n_wanted` equal stretches, all rows if there are fewer.

    Returns:
        Increasing row numbers, shape `(min(n_rows, n_wanted),)`.
    """
    n_wanted = min(n_rows, n_wanted)
    return ((2 * np.arange(n_wanted, dtype=np.int64) + 1) * n_rows) // (2 * max(n_wanted, 1))


def plan_runs(rows: IntArray, shard_images: int, max_run: int | None = None) -> list[Run]:
    """Reads that fill a batch with the given rows, neighbours joined into one read.

    Args:
        rows: Row numbers in the order of the batch, shape `(n,)`.
        shard_images: Images a shard.
        max_run: Longest run wanted, so that several threads can share a long one.

    Returns:
        Runs in the order of their slots; together they fill slots `0..n-1` once each.
    """
    if not len(rows):
        return []
    rows = np.asarray(rows, dtype=np.int64)
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(rows // shard_images) != 0)) + 1
    starts = np.concatenate([[0], breaks])
    ends = np.concatenate([breaks, [len(rows)]])
    longest = max_run or len(rows)
    return [
        Run(int(rows[at] // shard_images), int(rows[at] % shard_images), int(min(longest, end - at)), int(at))
        for start, end in zip(starts, ends, strict=True)
        for at in range(start, end, longest)
    ]
