"""Reading rows that are numbered through several stores."""

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.reader import RowReader


class JoinedReader(RowReader):
    """Reads rows of a joined store; any thread may read.

    Args:
        store: The joined store.
        open_readers: Open the reader of each of its parts, in order.
    """

    def __init__(self, store: StoreLayout, open_readers: Sequence[Callable[[], RowReader]]) -> None:
        self.store = store
        with ExitStack() as stack:
            self._readers = [stack.enter_context(open_reader()) for open_reader in open_readers]
            self._opened = stack.pop_all()
        self._starts = first_rows([reader.store for reader in self._readers])

    def read_rows(self, rows: IntArray, out: npt.NDArray[Any]) -> None:
        """See `RowReader`. Fastest if the rows of each part are together."""
        rows = np.asarray(rows, dtype=np.int64)
        self._require_room(rows, out)
        read_through(self._readers, self._starts, rows, out)

    def close(self) -> None:
        """See `RowReader`."""
        self._opened.close()


def first_rows(stores: Sequence[StoreLayout]) -> IntArray:
    """First row of each of several stores, numbered through all of them, then their number, shape `(n_stores + 1,)`."""
    return np.cumsum([0, *(store.n_images for store in stores)], dtype=np.int64)


def read_through(readers: Sequence[RowReader], starts: IntArray, rows: IntArray, out: npt.NDArray[Any]) -> None:
    """Fill a batch with rows that are numbered through several stores.

    Args:
        readers: The stores' readers.
        starts: As from `first_rows`.
        rows: The rows, shape `(n,)`.
        out: As for `RowReader.read_rows`.
    """
    numbers = np.searchsorted(starts, rows, side="right") - 1
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1), len(rows)]
    for start, end in itertools.pairwise(bounds):
        if start < end:
            number = numbers[start]
            readers[number].read_rows(rows[start:end] - starts[number], out[start:end])
