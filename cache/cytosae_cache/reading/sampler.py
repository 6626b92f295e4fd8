"""What a training stream serves, in which order: pure planning on integers, whatever memory the numbers come from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from cytosae_cache.reading.permutation import (
    IntArray,
    epoch_order,
    epoch_windows,
    group_order,
    iter_batches,
    rebatch,
    split_evenly,
)

Shuffle = Literal["global", "windowed"]
BatchOf = Literal["images", "tokens"]

WINDOW_SHARDS = 8
"""Shards mixed at a time by the windowed shuffle. Part of the order: another number makes other batches."""

GROUP_BATCHES = 8
"""Batches' worth of images whose tokens are mixed under the true shuffle. Part of the order, too."""


class Layout(NamedTuple):
    """Where the rows of one store, or of several as one, lie. Only rows that may be served are counted."""

    shard_bounds: IntArray
    """First row of every shard, and the number of rows at the end, shape `(n_shards + 1,)`."""
    store_bounds: IntArray
    """The same for stores, shape `(n_stores + 1,)`."""


class Group(NamedTuple):
    """Rows that are in memory together, and what is served of them."""

    rows: IntArray
    """Increasing row numbers, shape `(n,)`: how they are read and lie in memory."""
    order: IntArray
    """Parts in the order in which they are served: numbers in `range(n * parts_per_row)`, none twice."""


@dataclass(frozen=True)
class Sampler:
    """The order of a training run's batches: a pure function of its fields and a samples_seen.

    A *part* is what is mixed: an image, or a token. A batch holds `batch_images * parts_per_row` parts and batches
    cross the borders of groups and epochs, so that the number of samples seen, counted in images, is all that is needed
    to resume. Every part is served once an epoch.

    Raises:
        ValueError: If there is no row or `batch_images` or `window_shards` is below 1.
    """

    layout: Layout
    """Where the rows lie."""
    n_tokens: int
    """Tokens an image."""
    batch_images: int
    """Images a batch, or images' worth of tokens."""
    seed: int
    """Seed of the order."""
    shuffle: Shuffle = "global"
    """`global`: a uniform permutation of all images. `windowed`: shards in random order, mixed some at a time."""
    batch_of: BatchOf = "images"
    """`images`: a batch holds whole images. `tokens`: its tokens are drawn from many."""
    window_shards: int = WINDOW_SHARDS
    """Shards mixed at a time by the windowed shuffle."""

    def __post_init__(self) -> None:
        """Check ranges."""
        if min(self.n_rows, self.batch_images, self.window_shards) < 1:
            raise ValueError(
                "rows, batch_images and window_shards must be 1 or more, found "
                f"{self.n_rows}, {self.batch_images} and {self.window_shards}"
            )

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return int(self.layout.shard_bounds[-1])

    @property
    def parts_per_row(self) -> int:
        """Parts that an image is served in."""
        return self.n_tokens if self.batch_of == "tokens" else 1

    @property
    def direct(self) -> bool:
        """Whether every image can be read straight into its batch, with nothing to mix in memory."""
        return self.shuffle == "global" and self.batch_of == "images"

    @property
    def max_group_rows(self) -> int:
        """Rows of the largest group that any epoch can have."""
        if self.shuffle == "windowed":
            return int(np.sort(np.diff(self.layout.shard_bounds))[-self.window_shards :].sum())
        return min(self.n_rows, GROUP_BATCHES * self.batch_images)

    def epoch_groups(self, epoch: int) -> list[IntArray]:
        """Rows of each group of an epoch, increasing; together every row once. The whole epoch if `direct`."""
        if self.shuffle == "windowed":
            bounds, window = self.layout.shard_bounds, self.window_shards
            return epoch_windows(bounds, window_shards=window, seed=self.seed, epoch=epoch)
        order = epoch_order(self.n_rows, seed=self.seed, epoch=epoch)
        return [np.sort(rows) for rows in split_evenly(order, self.max_group_rows)]

    def iter_groups(self, *, samples_seen: int, stop: int) -> Iterator[Group]:
        """Groups from one samples_seen to another; what the first and last serve is cut to the parts between.

        Args:
            samples_seen: Images' worth already served, over all epochs.
            stop: Position at which to stop.
        """
        parts = self.parts_per_row
        while samples_seen < stop:
            epoch, at = divmod(samples_seen, self.n_rows)
            first = 0
            for number, rows in enumerate(self.epoch_groups(epoch)):
                start, end = max(at - first, 0), min(len(rows), at - first + stop - samples_seen)
                first += len(rows)
                if start < end:
                    order = group_order(len(rows) * parts, seed=self.seed, epoch=epoch, group=number)
                    yield Group(rows, order[start * parts : end * parts])
            samples_seen += self.n_rows - at

    def iter_batches(self, *, samples_seen: int, stop: int) -> Iterator[IntArray]:
        """Part numbers of each batch: `row * parts_per_row + token`. The plain meaning of every faster path.

        Args:
            samples_seen: Images' worth already served, over all epochs.
            stop: Position at which to stop.

        Yields:
            Shape `(batch_images * parts_per_row,)`, the last one shorter.
        """
        if self.direct:
            batches = iter_batches(
                self.n_rows, batch_rows=self.batch_images, seed=self.seed, samples_seen=samples_seen, stop=stop
            )
            yield from (self._by_store(rows) for rows in batches)
            return
        parts = self.parts_per_row
        stretches = (
            group.rows[group.order // parts] * parts + group.order % parts
            for group in self.iter_groups(samples_seen=samples_seen, stop=stop)
        )
        yield from rebatch(stretches, self.batch_images * parts)

    def _by_store(self, rows: IntArray) -> IntArray:
        """A batch with the images of each store side by side, so that each store's go straight into their slots."""
        if len(self.layout.store_bounds) == 2:
            return rows
        return rows[np.argsort(np.searchsorted(self.layout.store_bounds, rows, side="right"), kind="stable")]
