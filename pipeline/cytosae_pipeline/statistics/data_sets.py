"""Stores of several data sets as one, and what should be known about their images first."""

import itertools
import logging
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cytosae_cache.joined_store import SameNames, join_stores
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import quote, say_count

logger = logging.getLogger(__name__)

_DIGEST_BYTES = 8
"""Bytes of a picture's digest by which it is told from the others."""


def join_data_sets(stores: Sequence[ActivationStore], joined_patients: SameNames | None) -> ActivationStore:
    """`join_stores`, saying what is joined and whether pictures are in several data sets; one store stays alone.

    Args:
        stores: Complete stores of the same encoder.
        joined_patients: Value of `--joined_patients`.

    Raises:
        StoreMismatchError: As for `JoinedStore`.
    """
    joined = join_stores(stores, joined_patients=joined_patients)
    if joined is stores[0]:
        return joined
    sizes = (f"{store.provenance.dataset} ({say_count(store.n_images, 'image')})" for store in stores)
    logger.info(f"read as one: {', '.join(sizes)}")
    digests = [_digests(store) for store in stores]
    for (one, first), (other, second) in itertools.combinations(zip(stores, digests, strict=True), 2):
        n_same = len(np.intersect1d(first, second))
        if n_same:
            names = (quote(store.provenance.dataset) for store in (one, other))
            logger.warning(
                f"{say_count(n_same, 'picture')} in both data sets, {' and '.join(names)}: each counts twice. Leave "
                "one of them out of its data set if that is not meant"
            )
    return joined


def _digests(store: ActivationStore) -> npt.NDArray[np.uint64]:
    """The beginning of the digest of each different readable picture, sorted."""
    column = store.column("images/sha256")[store.valid, :_DIGEST_BYTES]
    return np.unique(np.ascontiguousarray(column).view(np.uint64))
