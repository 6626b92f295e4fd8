"""Images that two stores have in common: found by path, and by the picture itself where both stores know it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import IntArray
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, say_count


class CommonImages(NamedTuple):
    """The same images in two stores."""

    first: IntArray
    """Their rows in the first store, increasing, shape `(n,)`."""
    second: IntArray
    """Their rows in the second, shape `(n,)`."""


def find_common(first: ActivationStore, second: ActivationStore, *, common_only: bool) -> CommonImages:
    """The readable images that both stores have.

    Args:
        first: The first store.
        second: The second; may be the same.
        common_only: Accept that each has others, too.

    Raises:
        UserError: If they have no image in common, or not all unless `common_only` is set. The message has numbers of
            images, and no path of one.
    """
    if second is first:
        return CommonImages(first.valid_rows, first.valid_rows)
    rows, other_rows = first.valid_rows, second.valid_rows
    places = _index(second.images.path, other_rows)
    at = np.array([places.get(path, -1) for path in _take(first.images.path, rows)], dtype=np.int64)
    found = CommonImages(rows[at >= 0], at[at >= 0])
    same = _same_pictures(first, second, found)
    n_named, n_common = len(same), int(same.sum())
    found = CommonImages(found.first[same], found.second[same])
    counts = (
        f"store '{first.path}' has {say_count(len(rows), 'readable image')} and '{second.path}' {len(other_rows):,}: "
        f"{n_common:,} in common, by path"
    )
    if n_named > n_common:
        counts += f" ({n_named - n_common:,} more have the same path but are other pictures)"
    if not n_common:
        raise UserError(
            f"{counts}. Two encoders are compared on the same images: build both stores from the same folder or "
            "manifest, so that paths and pictures are the same"
        )
    if not common_only and not n_common == len(rows) == len(other_rows):
        raise UserError(f"{counts}. Give --common_images to compare on these alone, or build both of the same images")
    return found


def _take(texts: Sequence[str], rows: IntArray) -> list[str]:
    """Some of the texts of a column."""
    return [texts[row] for row in rows.tolist()]


def _index(texts: Sequence[str], rows: IntArray) -> dict[str, int]:
    """Row of each path."""
    return dict(zip(_take(texts, rows), rows.tolist(), strict=True))


def _same_pictures(first: ActivationStore, second: ActivationStore, found: CommonImages) -> npt.NDArray[np.bool_]:
    """Whether images of the same path are the same picture, shape `(n,)`.

    Imported stores have digests of their activations instead of the pictures': there the path alone decides.
    """
    if first.spec.imported or second.spec.imported:
        return np.ones(len(found.first), dtype=bool)
    one, other = (
        np.asarray(store.column("images/sha256"))[rows]
        for store, rows in ((first, found.first), (second, found.second))
    )
    return np.asarray((one == other).all(axis=1))
