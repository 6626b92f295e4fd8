"""A computed shard on its way to disk, and what is recorded of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import NotFiniteError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.moments import Widen, image_sums
from cytosae_cache.format.shard import as_bytes, checksum


@dataclass(frozen=True)
class ShardData:
    """A computed shard on its way to disk."""

    shard: int
    """Number of the shard."""
    activations: npt.NDArray[Any]
    """Shape `(n, n_tokens, d_model)` in the store's `dtype`; rows of unreadable images are NaN."""
    sha256: Sequence[bytes | None]
    """SHA-256 of each image file; None if it could not be read."""
    reason: Sequence[str]
    """Why an image could not be read; '' for a valid one."""
    source_bytes: Sequence[int] = ()
    """Length of each image file, 0 if it could not be read; empty if there are no files."""


def summarise(
    data: ShardData, records: npt.NDArray[Any], values: npt.NDArray[Any], store: StoreLayout, widen: Widen
) -> dict[str, Any]:
    """The fields of a mark that follow from the shard's contents."""
    valid = np.array([not reason for reason in data.reason], dtype=bool)
    total, total_sq = (np.zeros(store.d_model) for _ in range(2))
    wide = np.empty(store.spec.image_shape)
    for slot in np.flatnonzero(valid):
        sums, squares = image_sums(values[slot], wide, widen)
        if not np.isfinite(squares).all():
            row = store.shard_rows(data.shard)[slot]
            raise NotFiniteError(
                f"image {store.images.path[row]!r} (row {row}) has activations of NaN or infinity in {store.dtype}. "
                "Try --store-dtype float32 or --precision fp32; if neither helps, the weights do not fit the images"
            )
        total += sums
        total_sq += squares
    return {
        "image_crc32c": [checksum(as_bytes(record)) for record in records],
        "sha256": [digest.hex() if digest is not None else "" for digest in data.sha256],
        "source_bytes": list(data.source_bytes) or [0] * len(data.reason),
        "reason": list(data.reason),
        "count": int(valid.sum()) * store.n_tokens,
        "sum": total.tolist(),
        "sum_sq": total_sq.tolist(),
    }
