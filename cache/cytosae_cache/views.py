"""Views of a store for other tools and for notebooks; nothing is read until it is needed."""

import html
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.reader import StoreReader

if TYPE_CHECKING:
    import dask.array
    import xarray


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
    # Tasks get the path, not the store: it is all that another process needs.
    shards = [
        da.from_delayed(read(str(store.path), shard), (len(store.shard_rows(shard)), *shape), dtype=np.float32)
        for shard in range(store.n_shards)
    ]
    return da.concatenate(shards)


def xarray_view(store: StoreLayout) -> "xarray.Dataset":
    """The store as a labelled data set over `image`, `token` and `channel`; `activations` as `dask_view` returns them.

    Args:
        store: A complete store.

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
        {"activations": (("image", "token", "channel"), dask_view(store))},
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


def read_shard(path: str, shard: int) -> npt.NDArray[np.float32]:
    """Read and verify one shard of the store at `path`, float32, shape `(n, n_tokens, d_model)`."""
    store = StoreLayout.open(path)
    rows = store.shard_rows(shard)
    with StoreReader(store, n_threads=1) as reader:
        return reader.read(np.arange(rows.start, rows.stop)).astype(np.float32, copy=False)
