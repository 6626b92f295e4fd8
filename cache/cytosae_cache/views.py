"""Views of a store for other tools and for notebooks; nothing is read until it is needed."""

import html
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.storage.base import Location

if TYPE_CHECKING:
    import dask.array
    import xarray

_MOST_STORES = 8
"""Stores that the tasks of a process keep open."""


def dask_view(store: StoreLayout) -> "dask.array.Array":
    """The activations as a dask array whose chunks are whole shards.

    Chunks that cross shard borders would read shards several times, and writing such chunks with dask loses data
    silently; `dask.array.from_zarr` would make one task per image.

    Args:
        store: A complete store.

    Returns:
        Lazy array, float32, shape `(n_images, n_tokens, d_model)`; unreadable images are NaN. Checksums are verified.
        float16 is converted as it is read, because sums over a store leave its range and its 11 bits.
    """
    import dask.array as da
    from dask import delayed

    shape = store.spec.image_shape
    if not store.n_shards:
        return da.zeros((0, *shape), dtype=np.float32)
    read = delayed(read_shard, pure=True)
    # Tasks get what another process needs to open the same store, wherever it runs, and to notice another one there.
    place = (store.absolute_location, store.spec.hash, store.contents)
    shards = [
        da.from_delayed(read(*place, shard), (len(store.shard_rows(shard)), *shape), dtype=np.float32)
        for shard in range(store.n_shards)
    ]
    return da.concatenate(shards)


def xarray_view(store: StoreLayout, activations: "dask.array.Array") -> "xarray.Dataset":
    """The store as a labelled data set over `image`, `token` and `channel`.

    Args:
        store: A complete store.
        activations: Its activations, as `dask_view` returns them.

    Returns:
        `activations` with the coordinates `path`, `label`, `patient`, `valid` and the further columns along `image`
        (except those named like one of these), and the provenance as attributes.

    Raises:
        StoreError: If xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise StoreError(
            "xarray is not installed. Install it in your clone of cytosae-cache: pip install '.[xarray]', or use "
            "store.dask()"
        ) from error
    table = {name: ("image", np.array(column, dtype=object)) for name, column in store.images._asdict().items()}
    further = {
        name: ("image", column.astype(object) if column.dtype.kind == "T" else column)
        for name, column in store.image_columns.items()
        if name not in {*table, "activations", "valid", "image", "token", "channel"}
    }
    return xarray.Dataset(
        {"activations": (("image", "token", "channel"), activations)},
        coords={**table, **further, "valid": ("image", store.valid)},
        attrs={**vars(store.provenance), "model_name": store.spec.model_name, "spec_hash": store.spec.hash},
    )


def describe(store: StoreLayout) -> dict[str, str]:
    """What is in a store, in a few words each: data set, images, encoder, preprocessing, size, state."""
    spec = store.spec
    state = "complete" if store.complete else f"unfinished, {store.n_finished_shards:,} of {store.n_shards:,} shards"
    block = "imported" if spec.imported else f"block {spec.block - spec.n_blocks}"
    facts = {
        "data set": store.provenance.dataset,
        "shape": f"{store.n_images:,} images x {store.n_tokens:,} tokens x {store.d_model:,}",
        "encoder": f"{spec.model_name}, {block}",
        "spec": spec.hash,
        "size": f"{_format_bytes(store.n_images * spec.record_bytes)} as {spec.store_dtype}",
        "state": state,
    }
    return {name: "".join(c if c.isprintable() else "?" for c in text) for name, text in facts.items()}


def _format_bytes(n: float) -> str:
    """A size as text, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.3g} TB"


def html_table(facts: dict[str, str]) -> str:
    """Facts as an HTML table; all text is escaped."""
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in facts.items())
    return f"<table>{''.join(rows)}</table>"


def read_shard(location: Location, spec_hash: str, contents: str, shard: int) -> npt.NDArray[np.float32]:
    """Read and verify one shard of a store; a process opens the store once.

    Args:
        location: Absolute path or URL of the store.
        spec_hash: Hash of its spec.
        contents: Identity of its contents.
        shard: Number of the shard.

    Returns:
        Float32, shape `(n, n_tokens, d_model)`.

    Raises:
        StoreMismatchError: If there is another store by now.
        StoreError: If it cannot be opened or read.
    """
    store = _stores.get((str(location), spec_hash, contents), lambda: _open_same(location, spec_hash, contents))
    rows = store.shard_rows(shard)
    # Tasks already run in parallel. The file closes with the task.
    with StoreReader(store, n_threads=1) as reader:
        return reader.read(np.arange(rows.start, rows.stop)).astype(np.float32, copy=False)


def _open_same(location: Location, spec_hash: str, contents: str) -> StoreLayout:
    """The store that a view was made of."""
    store = StoreLayout.open(location)
    if (store.spec.hash, store.contents) != (spec_hash, contents):
        raise StoreMismatchError(
            f"store '{store.path}' is not the one that this view was made of: it was built again meanwhile. Open it "
            "again and make a new view"
        )
    return store


class _Stores:
    """The stores that tasks of this process share, with the tables that they have read; the latest ones are kept."""

    def __init__(self) -> None:
        self._stores: OrderedDict[tuple[str, ...], StoreLayout] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, ...], open_store: Callable[[], StoreLayout]) -> StoreLayout:
        """A store, opened if it is not open yet."""
        with self._lock:
            store = self._stores.pop(key, None)
            self._stores[key] = store = open_store() if store is None else store
            while len(self._stores) > _MOST_STORES:
                self._stores.popitem(last=False)
            return store


_stores = _Stores()


def _start_afresh() -> None:
    """In a forked child: let go of the lock, which another thread may have held."""
    global _stores
    _stores = _Stores()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
