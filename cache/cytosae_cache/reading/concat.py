"""Reading several stores as if they were one."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.reading.joined_reader import first_rows, read_through
from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.reading.reader import RowReader, aligned_buffer
from cytosae_cache.reading.sampler import RowLayout

_BLOCK_IMAGES = 256


def check_same_spec(stores: Sequence[StoreLayout]) -> None:
    """Check that stores can be streamed as one.

    Raises:
        StoreMismatchError: If their specs differ.
    """
    first = stores[0]
    for store in stores[1:]:
        if store.spec != first.spec:
            raise StoreMismatchError(
                f"stores '{first.path}' and '{store.path}' cannot be streamed as one: "
                + "; ".join(first.spec.differences(store.spec))
            )


class ConcatReader:
    """The valid images of one or several stores, or some of them, numbered from 0 through all stores.

    Args:
        readers: Readers of stores with equal specs; the caller closes them.
        chosen: For each store, which rows may be served, bool, shape `(n_images,)`; default all.

    Raises:
        StoreError: If no valid image is left.
        StoreMismatchError: If the stores' specs differ.
    """

    def __init__(self, readers: Sequence[RowReader], chosen: Sequence[npt.NDArray[np.bool_]] | None = None) -> None:
        stores = [reader.store for reader in readers]
        check_same_spec(stores)
        self._readers = readers
        self._offsets = first_rows(stores)
        masks = [store.valid for store in stores]
        if chosen is not None:
            masks = [valid & mask for valid, mask in zip(masks, chosen, strict=True)]
        self.rows = np.concatenate(
            [np.flatnonzero(mask) + offset for mask, offset in zip(masks, self._offsets, strict=False)]
        ).astype(np.int64)
        """Row number of each image, counted through all stores including unreadable images, shape `(n,)`."""
        if not len(self.rows) and any(store.valid.any() for store in stores):
            raise StoreError(
                f"no image of store '{stores[0].path}' is left to serve: use a smaller --held_out, or more images"
            )
        if not len(self.rows):
            raise StoreError(f"no image of store '{stores[0].path}' could be read, so there is nothing to train on")
        starts = [offset + store.shard_starts for store, offset in zip(stores, self._offsets, strict=False)]
        ends = self._offsets[-1:]
        self.layout = RowLayout(
            np.searchsorted(self.rows, np.concatenate([*starts, ends])), np.searchsorted(self.rows, self._offsets)
        )
        """Shard and store bounds of the valid images."""
        self.image_shape = stores[0].spec.image_shape
        """Tokens and channels of an image."""
        self.dtype = stores[0].dtype
        """Dtype that readers return."""

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, images: IntArray, out: npt.NDArray[Any]) -> None:
        """Fill a batch; fastest if the images of each store are contiguous.

        Args:
            images: Numbers of valid images in the order of the batch, shape `(n,)`.
            out: C-contiguous memory of the stores' dtype, shape `(n, n_tokens, d_model)`.

        Raises:
            ValueError: If `out` has another shape or dtype.
            StoreCorruptError: If a file is missing or damaged.
        """
        read_through(self._readers, self._offsets, self.rows[images], out)

    def iter_blocks(self) -> Iterator[slice]:
        """Consecutive slices of the valid images, each of a convenient size for one read."""
        for start in range(0, len(self), _BLOCK_IMAGES):
            yield slice(start, min(start + _BLOCK_IMAGES, len(self)))

    def read_block(self, block: slice, out: npt.NDArray[Any]) -> None:
        """Fill a batch with consecutive images, like `read`."""
        self.read(np.arange(block.start, block.stop, dtype=np.int64), out)

    def read_all(self) -> npt.NDArray[Any]:
        """Read all valid images in order into new memory, shape `(n, n_tokens, d_model)`."""
        values = aligned_buffer((len(self), *self.image_shape), self.dtype)
        for block in self.iter_blocks():
            self.read_block(block, values[block])
        return values
