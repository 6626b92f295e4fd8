"""The activation store as users open it: its description, and its activations by row number."""

import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.columns import BAD_METADATA
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.reader import RowReader, StoreReader
from cytosae_cache.reading.sampler import BatchOf, Shuffle
from cytosae_cache.storage.base import Location
from cytosae_cache.views import dask_view, describe, html_table, xarray_view

if TYPE_CHECKING:
    import dask.array
    import torch
    import xarray
    import zarr

    from cytosae_cache.torch_views import StoreBatches, StoreImages


class ActivationStore(StoreLayout):
    """An existing store, opened for reading; cheap to make.

    `store[row]` and `store[rows]` return activations as arrays and read only those images' bytes. The first access
    opens a reader that later accesses reuse, from any thread. Its files and threads are released by `close`, at the end
    of a `with` block, or when the store object is no longer referenced. A forked child opens a reader of its own.

    Args:
        location: Folder or URL of the store.

    Raises:
        StoreNotFoundError: If there is no store.
        StoreCorruptError: If its metadata is not that of a store of this format.
    """

    def __init__(self, location: Location) -> None:
        super().__init__(location)
        self._readers: dict[int, RowReader] = {}

    def __getitem__(self, rows: "int | slice | Sequence[int] | npt.NDArray[np.integer[Any]]") -> npt.NDArray[Any]:
        """Activations of one row, shape `(n_tokens, d_model)`, or of several, `(n, n_tokens, d_model)`; verified.

        Raises:
            IndexError: If a row is out of range.
            StoreIncompleteError: If the store is unfinished.
            StoreCorruptError: If a file is missing or damaged.
        """
        # A single row does not cost an array of all.
        n = self.n_images
        wanted: Any = range(n)[rows] if isinstance(rows, int | np.integer) else np.arange(n)[rows]
        found = self._reader().read(np.atleast_1d(wanted))
        return found if np.ndim(wanted) else found[0]

    def __len__(self) -> int:
        return self.n_images

    def __fspath__(self) -> str:
        """The store's folder or URL, so that a store can be given wherever its place is asked for."""
        return str(self.path)

    @property
    def parts(self) -> "tuple[ActivationStore, ...]":
        """The stores that it is joined of, in the order of the rows; a store alone is its only part."""
        return (self,)

    def open_reader(self, *, n_threads: int | None = None, verify: bool = True, direct: bool = False) -> RowReader:
        """A reader of rows of the complete store; use as a context manager, or close it. Arguments as `StoreReader`'s.

        Raises:
            StoreIncompleteError: If the store is unfinished.
            StoreCorruptError: If its tables are missing or damaged.
        """
        return StoreReader(self, n_threads=n_threads, verify=verify, direct=direct)

    def close(self) -> None:
        """Close the kept reader; no thread may be reading. The next access opens another."""
        reader = self._readers.pop(os.getpid(), None)
        if reader is not None:
            reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        facts = describe(self)
        return f"<{type(self).__name__} {str(self.path)!r}: {'; '.join(facts.values())}>"

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        return html_table({"store": str(self.path), **describe(self)})

    def zarr_array(self) -> "zarr.Array[Any]":
        """The stored numbers as zarr-python sees them, shape `(n_images, n_tokens, d_model)`; records if int8.

        Looks for links in the whole store first, because zarr-python follows them.

        Raises:
            StoreCorruptError: If zarr-python cannot interpret the metadata, or a link leads out of the store.
        """
        import zarr

        self.storage.check_links()
        try:
            return zarr.open_array(str(self.path), path="activations", mode="r", zarr_format=3)
        except BAD_METADATA as error:
            raise StoreCorruptError(f"the activations of store '{self.path}' cannot be opened: {error}") from error

    def dask(self) -> "dask.array.Array":
        """The activations as a lazy dask array, float32, one chunk per shard, shape `(n_images, n_tokens, d_model)`."""
        return dask_view(self)

    def xarray(self) -> "xarray.Dataset":
        """The store as a lazy labelled data set: float32 activations over `image`, `token`, `channel`, and the images.

        Raises:
            StoreError: If xarray is not installed.
        """
        return xarray_view(self, self.dask())

    def torch_images(self, *, dtype: "torch.dtype | str | None" = "float32") -> "StoreImages":
        """The readable images as a data set of torch, by number: see `StoreImages`."""
        from cytosae_cache.torch_views import StoreImages

        return StoreImages(self.parts, dtype=dtype)

    def torch_batches(
        self,
        *,
        batch_size: int = 64,
        batch_of: BatchOf = "images",
        shuffle: Shuffle = "global",
        seed: int = 42,
        dtype: "torch.dtype | str | None" = "float32",
        with_rows: bool = False,
        rank: int = 0,
        n_ranks: int = 1,
    ) -> "StoreBatches":
        """Shuffled batches as `train` gets them, as an iterable data set of torch: see `StoreBatches`."""
        from cytosae_cache.torch_views import StoreBatches

        return StoreBatches(
            self.parts, batch_size=batch_size, batch_of=batch_of, shuffle=shuffle, seed=seed, dtype=dtype,
            with_rows=with_rows, rank=rank, n_ranks=n_ranks,
        )  # fmt: skip

    def _reader(self) -> RowReader:
        """The kept reader of this process. Threads do not survive a fork, so a child never uses its parent's."""
        process = os.getpid()
        reader = self._readers.get(process)
        if reader is None:
            # A proxy: if reader and store referenced each other, files would stay open until Python collects cycles.
            # If two threads arrive here at once, `setdefault` keeps one reader; the other has opened nothing yet.
            reader = self._readers.setdefault(process, type(self).open_reader(weakref.proxy(self)))
        return reader


def open(location: Location) -> ActivationStore:
    """Open a complete store for reading.

    Args:
        location: Folder or URL of the store.

    Raises:
        StoreNotFoundError: If there is no store.
        StoreIncompleteError: If its build has not finished; `ActivationStore(location)` describes it nevertheless.
        StoreCorruptError: If its metadata is not that of a store of this format.
    """
    return ActivationStore.open(location)


def iter_stores(folder: Path) -> Iterator[Path]:
    """Folders directly below `folder` that are named like stores, sorted by name."""
    if folder.is_dir():
        yield from sorted(path for path in folder.iterdir() if path.suffix == ".zarr" and path.is_dir())
