"""Checks that the images are still those that a store was built from."""

from collections.abc import Sequence

import numpy as np

from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.errors import escape, join_few, say_count
from cytosae_pipeline.images.decoding import Hashed, ImageDecoder
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.runtime.progress import Progress

_NAMED = 3


def check_sizes(store: ActivationStore, images: ImageList) -> None:
    """Compare the length of every existing image with its length when it was read; no image is read.

    Args:
        store: A complete store.
        images: Its images as they were listed just now.

    Raises:
        StoreMismatchError: If some differ; the message names the first.
    """
    sizes = store.column("images/n_bytes").tolist()
    changed = [
        f"'{escape(row.path)}' ({size:,} bytes then, {row.seen.n_bytes:,} now)"
        for row, size, valid in zip(images.rows, sizes, store.valid.tolist(), strict=True)
        if valid and size and row.seen is not None and row.seen.n_bytes != size
    ]
    if changed:
        raise StoreMismatchError(
            f"{len(changed):,} of {store.n_images:,} images changed since store '{store.path}' was built from them: "
            f"{join_few(changed, _NAMED)}. Restore the old ones, use another --dataset_name, or --overwrite to build "
            "it from scratch"
        )


def reopen_shards(writer: StoreWriter, shards: Sequence[int], images: ImageList, decoder: ImageDecoder) -> list[int]:
    """Hash the images of finished shards again, so that a resumed build never mixes old and new ones.

    Args:
        writer: Writer of the unfinished store.
        shards: The finished shards.
        images: The store's images.
        decoder: Reads them.

    Returns:
        Shards that must be computed again, because an image that could not be read before can be read now.

    Raises:
        StoreMismatchError: If images differ from those that were read; the message names the first.
        SourceError: If the disk fails repeatedly.
    """
    store = writer.store
    n_rows = sum(len(store.shard_rows(shard)) for shard in shards)
    hashed = decoder.iter_hashes(row for shard in shards for row in store.shard_rows(shard))
    changed: list[str] = []
    reopened: list[int] = []
    with Progress("compare images", n_rows, "images") as progress:
        for shard in shards:
            for recorded, found in zip(writer.recorded_sources(shard), hashed, strict=False):
                name = f"'{escape(images.rows[found.row].path)}'"
                if recorded is not None and found.sha256 != recorded:
                    changed.append(name + (f" ({found.reason})" if found.reason else ""))
                elif recorded is None and found.sha256 is not None and shard not in reopened[-1:]:
                    reopened.append(shard)
                progress.advance()
    if changed:
        raise StoreMismatchError(
            f"{say_count(len(changed), 'image')} changed since the build of store '{store.path}' was interrupted: "
            f"{join_few(changed, _NAMED)}. Restore the old ones, or --overwrite to build it from scratch from the new "
            "ones"
        )
    return reopened


def compare_source(recorded: bytes, found: Hashed) -> str:
    """What is wrong with an image of a complete store; '' if nothing is."""
    if found.reason:
        return f"the image can no longer be read: {found.reason}"
    return "" if found.sha256 == recorded else "the image file changed since the store was built"


def count_reasons(store: ActivationStore) -> dict[str, int]:
    """Images set aside for each kind of reason, the most frequent first."""
    kinds = [str(reason).partition(":")[0] for reason in store.column("images/reason")[~store.valid]]
    names, counts = np.unique(np.array(kinds, dtype=np.dtypes.StringDType()), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[place]): int(counts[place]) for place in order}
