"""A store as data sets of torch, for trainers of your own: images by number, or shuffled batches."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.concat import ConcatReader, check_same_spec
from cytosae_cache.reading.joined_reader import first_rows, read_through
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.reading.sampler import BatchOf, Shuffle
from cytosae_cache.storage.base import Location


class StoreImages(Dataset[torch.Tensor]):
    """The readable images of a store, by number; for `DataLoader` with any sampler and any number of workers.

    Item `i` is the activations of row `rows[i]`, shape `(T, D)`. A batch that a `DataLoader` asks for is read at once.
    Checksums are verified.

    Args:
        stores: A complete store, or several of the same encoder, or where they are.
        dtype: Type of the items, of torch or its name; the store's own if None.

    Raises:
        StoreNotFoundError: If there is no store.
        StoreIncompleteError: If its build has not finished.
        StoreCorruptError: If it is damaged.
        StoreMismatchError: If stores differ in their specs.
    """

    def __init__(
        self,
        stores: StoreLayout | Location | Sequence[StoreLayout | Location],
        *,
        dtype: torch.dtype | str | None = "float32",
    ) -> None:
        self._stores, self._dtype = _open_all(stores), _to_dtype(dtype)
        check_same_spec(self._stores)
        self._starts = first_rows(self._stores)
        valid = [store.valid_rows + first for store, first in zip(self._stores, self._starts, strict=False)]
        self.rows: npt.NDArray[np.int64] = np.concatenate(valid)
        """Row number of each item, counted through all stores, int64, shape `(n,)`."""
        self._readers: dict[int, list[StoreReader]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.__getitems__([number])[0]

    def __getitems__(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Several items with one read.

        Raises:
            IndexError: If a number is out of range.
        """
        # Threads do not survive a fork, so every process opens a reader of its own.
        process = os.getpid()
        readers = self._readers.get(process)
        if readers is None:
            readers = self._readers.setdefault(process, [StoreReader(store) for store in self._stores])
        first = self._stores[0]
        rows = self.rows[np.asarray(numbers, dtype=np.int64)]
        out = aligned_buffer((len(rows), *first.spec.image_shape), first.dtype)
        read_through(readers, self._starts, rows, out)
        return list(_to_tensor(out, self._dtype).unbind())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}


class StoreBatches(IterableDataset[Any]):
    """Ready batches in the order of `train`: for `DataLoader(batches, batch_size=None)`, or to iterate over directly.

    One pass is one epoch. In one process the batches are those of `train` with the same seed: a uniform permutation of
    all readable images. The last batch of an epoch may be smaller. With workers or ranks, each serves a contiguous part
    of the same batches, so together they serve every image once. Reading uses threads; workers help only
    if what you do with a batch is slow.

    Args:
        stores: A complete store, or several of the same encoder, or where they are.
        batch_size: Images per batch, or as many tokens as that many images have.
        batch_of: `images` for batches of shape `(batch_size, T, D)`, `tokens` for tokens drawn from many images, shape
            `(batch_size * T, D)`.
        shuffle: `global` for a uniform permutation, `windowed` for whole shards in random order, several mixed at a
            time: faster from slow disks.
        seed: Seed of the order.
        dtype: Type of the batches, of torch or its name; the store's own if None.
        with_rows: Whether to serve pairs `(rows, batch)`: row numbers of images or tokens, int64, counted through all
            stores.
        rank: Number of this process among those that train together.
        n_ranks: Processes that train together.

    Raises:
        StoreError: If a store cannot be used, or stores differ in their specs.
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        stores: StoreLayout | Location | Sequence[StoreLayout | Location],
        *,
        batch_size: int = 64,
        batch_of: BatchOf = "images",
        shuffle: Shuffle = "global",
        seed: int = 42,
        dtype: torch.dtype | str | None = "float32",
        with_rows: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> None:
        self._stores = _open_all(stores)
        if batch_size < 1 or not 0 <= rank < n_ranks:
            raise ValueError(
                "batch_size must be 1 or more, and rank below n_ranks and 0 or more, found "
                f"{batch_size}, {rank} and {n_ranks}"
            )
        self._batch_size, self._seed, self._with_rows, self._dtype = batch_size, seed, with_rows, _to_dtype(dtype)
        self._shuffle, self._batch_of, self._share = shuffle, batch_of, (rank, n_ranks)
        self._n_images = sum(len(store.valid_rows) for store in self._stores)
        # In shared memory, so that workers which live through several epochs learn of a new one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass: every epoch has its own; 0 at first."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        """Batches of one epoch, of this rank."""
        first, end = _part(-(-self._n_images // self._batch_size), *self._share)
        return end - first

    def __iter__(self) -> Iterator[Any]:
        worker, (rank, n_ranks) = get_worker_info(), self._share
        first, end = _part(-(-self._n_images // self._batch_size), rank, n_ranks)
        if worker is not None:
            start, stop = _part(end - first, worker.id, worker.num_workers)
            first, end = first + start, first + stop
        begin = int(self._epoch) * self._n_images
        with ExitStack() as stack:
            readers = [stack.enter_context(StoreReader(store)) for store in self._stores]
            loader = ShuffledLoader(
                ConcatReader(readers),
                batch_images=self._batch_size,
                seed=self._seed,
                samples_seen=begin + first * self._batch_size,
                stop=begin + min(end * self._batch_size, self._n_images),
                shuffle=self._shuffle,
                batch_of=self._batch_of,
            )
            for rows, activations, _ in loader:
                values = _to_tensor(activations, self._dtype, copy=True)
                numbers = torch.from_numpy(rows.copy())
                if self._batch_of == "tokens":
                    values, numbers = values.flatten(0, 1), numbers.flatten()
                yield (numbers, values) if self._with_rows else values


def _open_all(stores: StoreLayout | Location | Sequence[StoreLayout | Location]) -> list[StoreLayout]:
    """One or several complete stores."""
    return [_open(store) for store in ([stores] if isinstance(stores, StoreLayout | str | Path) else stores)]


def _open(store: StoreLayout | Location) -> StoreLayout:
    """A complete store."""
    if not isinstance(store, StoreLayout):
        return StoreLayout.open(store)
    store.require_complete()
    return store


def _part(n: int, number: int, n_parts: int) -> tuple[int, int]:
    """First and end of one of several contiguous parts of `range(n)`."""
    return n * number // n_parts, n * (number + 1) // n_parts


def _to_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating-point type of torch by its name."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be float32, float16 or another floating-point type of torch, found {dtype!r}")
    return found


def _to_tensor(values: npt.NDArray[Any], dtype: torch.dtype | None, *, copy: bool = False) -> torch.Tensor:
    """An array as a tensor of a type."""
    tensor = torch.from_numpy(values)
    return tensor.to(dtype or tensor.dtype, copy=copy)
