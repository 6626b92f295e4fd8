"""What a training stream serves, in which order: pure planning on integers, independent of where data is kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np

from cytosae_cache.reading.permutation import (
    IntArray,
    RowGroups,
    epoch_groups,
    epoch_windows,
    group_order,
    iter_batches,
    rebatch,
)

Shuffle = Literal["global", "windowed"]
BatchOf = Literal["images", "tokens"]

WINDOW_SHARDS = 8
"""Shards per window of the windowed shuffle. Part of the order: another number gives other batches."""

GROUP_BATCHES = 8
"""Size of a row group, in batches, when tokens are mixed under the global shuffle. Part of the order, too."""


class RowLayout(NamedTuple):
    """Shard and store bounds of the rows of one or several stores. Only rows that may be served are counted."""

    shard_bounds: IntArray
    """First row of every shard, then the number of rows, shape `(n_shards + 1,)`."""
    store_bounds: IntArray
    """First row of every store, then the number of rows, shape `(n_stores + 1,)`."""


class RowGroup(NamedTuple):
    """Rows that are in memory together, and the order in which their parts are served."""

    rows: IntArray
    """Increasing row numbers, shape `(n,)`: the order in which they are read and stored in memory."""
    order: IntArray
    """Distinct part numbers from `range(n * parts_per_row)`, in the order in which they are served."""


@dataclass(frozen=True)
class Sampler:
    """The order of a training run's batches: a pure function of its fields and a position.

    A *part* is the unit that is shuffled: an image or a token. A batch contains `batch_images * parts_per_row` parts.
    Batches cross the borders of row groups and epochs, so a position is one number: the samples seen, in images. It is
    all that is needed to resume. Every epoch serves every part once.

    Raises:
        ValueError: If there is no row, `batch_images` or `window_shards` is below 1, or a choice is unknown.
    """

    layout: RowLayout
    """Shard and store bounds of the rows."""
    n_tokens: int
    """Tokens per image."""
    batch_images: int
    """Images per batch; with tokens, a batch contains as many tokens as that many images have."""
    seed: int
    """Seed of the order."""
    shuffle: Shuffle = "global"
    """`global`: a uniform permutation of all images. `windowed`: shards in random order, several mixed at a time."""
    batch_of: BatchOf = "images"
    """`images`: a batch contains whole images. `tokens`: it contains tokens drawn from many images."""
    window_shards: int = WINDOW_SHARDS
    """Shards per window of the windowed shuffle."""

    def __post_init__(self) -> None:
        """Check ranges and choices."""
        if min(self.n_rows, self.batch_images, self.window_shards) < 1:
            raise ValueError(
                "rows, batch_images and window_shards must be 1 or more, found "
                f"{self.n_rows}, {self.batch_images} and {self.window_shards}"
            )
        for name, value, known in (
            ("shuffle", self.shuffle, get_args(Shuffle)),
            ("batch_of", self.batch_of, get_args(BatchOf)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, found {value!r}")

    @property
    def n_rows(self) -> int:
        """Rows per epoch."""
        return int(self.layout.shard_bounds[-1])

    @property
    def parts_per_row(self) -> int:
        """Parts per image."""
        return self.n_tokens if self.batch_of == "tokens" else 1

    @property
    def needs_groups(self) -> bool:
        """Whether row groups must be mixed in memory; if not, every image can be read straight into its batch."""
        return self.shuffle == "windowed" or self.batch_of == "tokens"

    @property
    def max_group_rows(self) -> int:
        """Rows of the largest row group in any epoch."""
        if self.shuffle == "windowed":
            return int(np.sort(np.diff(self.layout.shard_bounds))[-self.window_shards :].sum())
        return min(self.n_rows, GROUP_BATCHES * self.batch_images)

    def epoch_groups(self, epoch: int) -> RowGroups:
        """Increasing rows of each row group of an epoch; all groups together contain every row once."""
        if self.shuffle == "windowed":
            bounds, window = self.layout.shard_bounds, self.window_shards
            return epoch_windows(bounds, window_shards=window, seed=self.seed, epoch=epoch)
        return epoch_groups(self.n_rows, max_rows=self.max_group_rows, seed=self.seed, epoch=epoch)

    def iter_groups(self, *, samples_seen: int, stop: int) -> Iterator[RowGroup]:
        """Row groups between two positions; the first and last one serve only the parts between them.

        Args:
            samples_seen: Position at which to start: samples already served, in images, over all epochs.
            stop: Position at which to stop, counted in the same way.
        """
        parts = self.parts_per_row
        while samples_seen < stop:
            epoch, at = divmod(samples_seen, self.n_rows)
            last, groups = min(at + stop - samples_seen, self.n_rows), self.epoch_groups(epoch)
            for number in range(groups.number_at(at), groups.number_at(last - 1) + 1):
                rows, first = groups[number], int(groups.starts[number])
                start, end = max(at - first, 0), min(len(rows), last - first)
                order = group_order(len(rows) * parts, seed=self.seed, epoch=epoch, group=number)
                yield RowGroup(rows, order[start * parts : end * parts])
            samples_seen += self.n_rows - at

    def iter_batches(self, *, samples_seen: int, stop: int) -> Iterator[IntArray]:
        """Part numbers of each batch, `row * parts_per_row + token`: the reference for every faster path.

        Args:
            samples_seen: Position at which to start: samples already served, in images, over all epochs.
            stop: Position at which to stop, counted in the same way.

        Yields:
            Shape `(batch_images * parts_per_row,)`; the last one may be shorter.
        """
        if not self.needs_groups:
            batches = iter_batches(
                self.n_rows, batch_rows=self.batch_images, seed=self.seed, samples_seen=samples_seen, stop=stop
            )
            yield from (self._by_store(rows) for rows in batches)
            return
        parts = self.parts_per_row
        pieces = (
            group.rows[group.order // parts] * parts + group.order % parts
            for group in self.iter_groups(samples_seen=samples_seen, stop=stop)
        )
        yield from rebatch(pieces, self.batch_images * parts)

    def _by_store(self, rows: IntArray) -> IntArray:
        """Reorder a batch so that the images of each store are contiguous: each store then fills its slots at once."""
        if len(self.layout.store_bounds) == 2:
            return rows
        return rows[np.argsort(np.searchsorted(self.layout.store_bounds, rows, side="right"), kind="stable")]
