"""The identity of what a complete store contains, which everything derived from it records."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

CONTENTS_COLUMNS = ("images/sha256", "shards/n_bytes", "shards/crc32c")
"""Columns that the identity is made of; int8 stores have their channels in addition."""


def digest_contents(columns: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over the images' digests and the shards' checksums, in hex.

    Two stores with the same identity were made from the same bytes of images and have the same bytes of activations;
    names, labels and patients are not part of it.

    Args:
        columns: Those of `CONTENTS_COLUMNS`, and `channels/mean` and `channels/std` of an int8 store.
    """
    digest = hashlib.sha256(b"cytosae-cache contents\n")
    for name, column in sorted(columns.items()):
        little = column.astype(column.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {little.dtype.str} {list(little.shape)}\n".encode())
        digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()
