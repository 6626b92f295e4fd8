"""Small arrays of a store as the files that Zarr stores them in, made and read in memory.

zarr-python does the encoding; the files travel as bytes, so that each can be checked against its digest before it is
decoded, and written in one step wherever the store lies.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.codec import make_compressors
from cytosae_cache.format.spec import Compression, StoreSpec

BAD_METADATA = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError, ValueError)
"""What zarr-python raises for metadata that no Zarr writer wrote."""

_ROWS_PER_CHUNK = 1 << 16


def encode_hierarchy(
    tables: Mapping[str, npt.NDArray[Any]], *, activations: tuple[StoreSpec, int, int, Compression] | None = None
) -> dict[str, bytes]:
    """The files of small arrays and of the groups they lie in.

    Args:
        tables: Arrays by their place in the store, for example `images/valid`.
        activations: Spec, images, images a shard and codec, if the metadata of the large array is wanted, too.

    Returns:
        Bytes by file name. The outermost group's metadata is not among them.
    """
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    root = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3)
    if activations is not None:
        spec, n_images, shard_images, compression = activations
        root.create_array(
            "activations",
            shape=(n_images, *spec.record_shape),
            dtype=spec.store_dtype,
            shards=(shard_images, *spec.record_shape),
            chunks=(1, *spec.record_shape),
            # What is missing must never pass for data: no code is -128.
            fill_value=-128 if spec.store_dtype == "int8" else float("nan"),
            filters=None,
            compressors=make_compressors(compression, np.dtype(spec.store_dtype).itemsize),
            dimension_names=("image", "token", "channel"),
        )
    for place, values in tables.items():
        folder, _, name = place.rpartition("/")
        chunks = tuple(max(1, min(size, _ROWS_PER_CHUNK)) for size in values.shape)
        dtype: Any = str if values.dtype.kind == "T" else values.dtype
        array = root.require_group(folder).create_array(name, shape=values.shape, chunks=chunks, dtype=dtype)
        if values.size:
            array[...] = values
    return {name: data.to_bytes() for name, data in files.items() if name != "zarr.json"}


def read_table(
    files: Mapping[str, bytes], place: str, *, lengths: Sequence[int], widths: Sequence[int], where: str
) -> npt.NDArray[Any]:
    """One small array from its files.

    Args:
        files: Bytes by file name.
        place: The array's place in the store.
        lengths: Lengths of the first axis that it may have.
        widths: Lengths of the second axis that it may have, if there is one.
        where: The store, for messages.

    Raises:
        StoreCorruptError: If it is missing, of another shape or kind, or cannot be decoded.
    """
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    known = [(length, *more) for length in lengths for more in ((), *((width,) for width in widths))]
    try:
        memory = MemoryStore({name: make(data) for name, data in files.items()}, read_only=True)
        array: Any = zarr.open_array(memory, path=place, mode="r", zarr_format=3)
        if array.shape not in known or array.dtype.itemsize > 16 or array.dtype.kind == "O":
            raise StoreCorruptError(
                f"array '{place}' of store '{where}' has shape {array.shape} and type {array.dtype}"
            )
        return np.asarray(array[...])
    except StoreCorruptError:
        raise
    except BAD_METADATA as error:
        raise StoreCorruptError(f"array '{place}' of store '{where}' cannot be read: {error}") from error
