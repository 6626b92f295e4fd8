"""Small arrays of a store, encoded to and decoded from Zarr's files in memory.

zarr-python does the encoding. Files are passed as bytes, so that each can be compared with its digest before it is
decoded, and written atomically wherever the store is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from numcodecs import Zstd

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.codec import make_compressors, zstd_content_size
from cytosae_cache.format.spec import Compression, StoreSpec

BAD_METADATA = (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, OSError, ValueError)
"""What zarr-python raises for metadata that no Zarr writer would write."""

_LEAST_CHUNK_ROWS, _MOST_CHUNKS = 1 << 16, 64
"""A table has at most so many chunks, whose digests the group's metadata lists, and chunks of at least so many rows."""

_MOST_TEXT_BYTES = 1024
"""Most bytes of a text, on average over a chunk."""
_LEAST_TEXT_LIMIT = 1 << 26
"""Bytes that a chunk of texts may have in any case."""

_AXES = {"images": "image", "moments": "shard", "shards": "shard", "channels": "channel"}
"""Name of the first dimension of a group's arrays."""
_SECOND_AXES = {"images/sha256": "byte", "moments/sum": "channel", "moments/sum_sq": "channel"}


def encode_hierarchy(
    tables: Mapping[str, npt.NDArray[Any]], *, activations: tuple[StoreSpec, int, int, Compression] | None = None
) -> dict[str, bytes]:
    """Encode small arrays and the groups that contain them.

    Args:
        tables: Arrays by their place in the store, for example `images/valid`.
        activations: Spec, number of images, images per shard and codec, to add the metadata of the large array.

    Returns:
        Bytes by file name, without the metadata of the outermost group.
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
            # Missing images must never pass for data: no code is -128.
            fill_value=-128 if spec.store_dtype == "int8" else float("nan"),
            filters=None,
            compressors=make_compressors(compression, np.dtype(spec.store_dtype).itemsize),
            # A record has more entries than there are channels, and equal names mean equal lengths.
            dimension_names=("image", "token", "record" if spec.store_dtype == "int8" else "channel"),
        )
    for place, values in tables.items():
        folder, _, name = place.rpartition("/")
        chunks = tuple(map(_chunk_rows, values.shape))
        dtype: Any = str if values.dtype.kind == "T" else values.dtype
        array = root.require_group(folder).create_array(
            name, shape=values.shape, chunks=chunks, dtype=dtype, dimension_names=_dimensions(place, values.ndim)
        )
        if values.size:
            array[...] = values
    return {name: data.to_bytes() for name, data in files.items() if name != "zarr.json"}


def _chunk_rows(size: int) -> int:
    """Length of a table's chunks along an axis."""
    return max(1, min(size, max(_LEAST_CHUNK_ROWS, -(-size // _MOST_CHUNKS))))


def _dimensions(place: str, n: int) -> tuple[str, ...]:
    """Names of a small array's dimensions, by which xarray recognises those that arrays share.

    Args:
        place: The array's place in the store.
        n: Number of its dimensions.
    """
    first = _AXES[place.partition("/")[0]]
    return (first,) if n == 1 else (first, _SECOND_AXES[place])


def read_table(
    files: Mapping[str, bytes], place: str, *, lengths: Sequence[int], widths: Sequence[int], where: str
) -> npt.NDArray[Any]:
    """Decode one small array from its files.

    Args:
        files: Bytes by file name.
        place: The array's place in the store.
        lengths: Allowed lengths of the first axis.
        widths: Allowed lengths of the second axis, if there is one.
        where: Name of the store, for messages.

    Raises:
        StoreCorruptError: If it is missing, has another shape or dtype, or cannot be decoded.
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
                f"array '{place}' of store '{where}' has shape {array.shape} and dtype {array.dtype}, "
                f"expected one of {known}"
            )
        _check_chunks(files, place, array, where)
        return np.asarray(array[...])
    except StoreCorruptError:
        raise
    except BAD_METADATA as error:
        raise StoreCorruptError(f"array '{place}' of store '{where}' cannot be read: {error}") from error


def _check_chunks(files: Mapping[str, bytes], place: str, array: Any, where: str) -> None:  # noqa: ANN401 - zarr's
    """Refuse chunks that would unpack to more than the array can contain, before memory is taken for them.

    Raises:
        StoreCorruptError: If there are such chunks, or codecs that this format does not use.
    """
    is_text = array.dtype.kind == "T"
    codecs = [type(codec).__name__ for codec in array.metadata.codecs]
    fits = len(array.chunks) == len(array.shape) and all(
        chunk <= max(1, size) for chunk, size in zip(array.chunks, array.shape, strict=True)
    )
    if codecs != ["VLenUTF8Codec" if is_text else "BytesCodec", "ZstdCodec"] or not fits:
        raise StoreCorruptError(
            f"array '{place}' of store '{where}' has chunks of shape {array.chunks} and codecs {', '.join(codecs)}, "
            "which this format does not use"
        )
    n_items = math.prod(array.chunks)
    expected = n_items * array.dtype.itemsize
    for name, data in files.items():
        if not name.startswith(f"{place}/c"):
            continue
        size = zstd_content_size(data)
        if size is None or (size > max(_LEAST_TEXT_LIMIT, _MOST_TEXT_BYTES * n_items) if is_text else size != expected):
            stated = "no size" if size is None else f"{size:,} bytes"
            raise StoreCorruptError(
                f"'{name}' of store '{where}' states that it unpacks to {stated}, which {n_items:,} entries cannot have"
            )
        # Texts are counted in front of them, and memory is taken for that many.
        if is_text and int.from_bytes(bytes(Zstd().decode(data))[:4], "little") != n_items:
            raise StoreCorruptError(f"'{name}' of store '{where}' does not contain {n_items:,} texts")
