"""Shards of stores that are being built: which are missing, their images through the network, and their writing."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence

import numpy as np

from cytosae.backbones.backbone import Backbone, load_backbone
from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.shard_data import ShardData
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building.activations import compute_activations, widen_with_torch
from cytosae_pipeline.building.findings import Remarks
from cytosae_pipeline.building.plan import BuildPlan
from cytosae_pipeline.building.source_check import reopen_shards
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.errors import escape, say_count
from cytosae_pipeline.images.decoding import Decoded, ImageDecoder
from cytosae_pipeline.images.files import VANISHED
from cytosae_pipeline.runtime.progress import Progress

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8


@contextlib.contextmanager
def open_writers(stores: Sequence[ActivationStore], *, shared: bool) -> Iterator[list[StoreWriter]]:
    """Writers of unfinished stores; what they have at the end of the block is written, even after an error.

    Args:
        stores: The stores.
        shared: Whether there may be other writers of them.
    """
    with contextlib.ExitStack() as stack:
        opened = (StoreWriter(store, widen=widen_with_torch, shared=shared) for store in stores)
        yield [stack.enter_context(writer) for writer in opened]


def shards_to_fill(store: ActivationStore, config: BuildConfig) -> range:
    """All shards of a store, or those of one part."""
    return range(store.n_shards) if config.part is None else config.part.of(store.n_shards)


def fill_range(
    writers: Sequence[StoreWriter],
    shards: Sequence[int],
    config: BuildConfig,
    plan: BuildPlan,
    remarks: Remarks,
    *,
    backbone: Backbone | None = None,
) -> None:
    """Compute the missing shards of a range and give them to the stores' writers.

    Args:
        writers: Writers of the stores, one for each block.
        shards: The shards, in order.
        config: Options of the build.
        plan: What it does.
        remarks: Collects what is to be said of images.
        backbone: The network, if it was loaded before, for these blocks at least.

    Raises:
        StoreMismatchError: If images changed since the build was interrupted.
        StoreError: If an image cannot be read and the options say to stop, or images vanish in a row.
    """
    first, info = writers[0].store, plan.info
    if first.spec.store_dtype == "int8" and any(writer.needs_channels for writer in writers):
        shards = sorted({0, *shards})  # its numbers say how all others are stored
    n_workers = config.workers if config.workers is not None else min(_MOST_WORKERS, os.cpu_count() or 1)
    with ImageDecoder(
        plan.images,
        n_workers=n_workers,
        image_size=info.image_size,
        resample=info.resample,
        white_level=config.white_level,
    ) as decoder:
        missing = [_missing_shards(writer, shards, config, plan, decoder) for writer in writers]
        todo = sorted(set().union(*missing))
        rows = [row for shard in todo for row in first.shard_rows(shard)]
        n_rows = sum(len(first.shard_rows(shard)) for shard in shards)
        done = n_rows - len(rows)
        if done:
            logger.info(f"resuming after {say_count(done, 'image that is', 'images that are')} on disk and verified")
        if not rows:
            return
        blocks = [writer.store.spec.block for writer in writers]
        backbone = backbone or load_backbone(plan.model_path, info, blocks=blocks, device=plan.device)
        with Progress("build", n_rows, "images", done=done) as progress:
            decoded = remarks.watch(decoder.iter_rows(rows), plan.images)
            for shard in todo:
                computed = _compute_shard(first, shard, decoded, backbone, config, plan, progress)
                for writer, wanted in zip(writers, missing, strict=True):
                    if shard in wanted:
                        writer.submit(computed[writer.store.spec.block])


def _missing_shards(
    writer: StoreWriter, shards: Sequence[int], config: BuildConfig, plan: BuildPlan, decoder: ImageDecoder
) -> set[int]:
    """Those of the shards that have to be computed, those of images that changed included; none is left on disk."""
    todo = writer.missing_shards(shards)
    finished = sorted(set(shards) - set(todo))
    reopened: list[int] = []
    if finished:
        try:
            reopened = reopen_shards(writer, finished, plan.images, decoder)
        except StoreMismatchError as error:
            if not config.overwrite:
                raise
            logger.info(f"starting again from scratch, as --overwrite asks: {error}")
            reopened = finished
    writer.discard(todo, reopened)
    return {*todo, *reopened}


def _compute_shard(
    store: StoreLayout,
    shard: int,
    decoded: Iterator[Decoded],
    backbone: Backbone,
    config: BuildConfig,
    plan: BuildPlan,
    progress: Progress,
) -> dict[int, ShardData]:
    """Run the network on one shard's images, in batches that begin at the shard's first row; results by block."""
    rows = store.shard_rows(shard)
    activations = [np.empty((len(rows), *store.spec.image_shape), dtype=store.dtype) for _ in backbone.blocks]
    digests: list[bytes | None] = []
    reasons: list[str] = []
    sizes: list[int] = []
    for start in range(0, len(rows), config.batch_size):
        batch = [next(decoded) for _ in rows[start : start + config.batch_size]]
        for image in batch:
            if image.reason and config.strict_images:
                raise StoreError(
                    f"image '{escape(plan.images.rows[image.row].path)}' cannot be read: {image.reason}. "
                    "Repair or remove it, or omit --strict-images to set such images aside"
                )
        for all_rows, part in zip(
            activations, compute_activations(backbone, batch, store.spec, plan.device), strict=True
        ):
            all_rows[start : start + len(batch)] = part
        digests += [image.sha256 for image in batch]
        reasons += [image.reason for image in batch]
        sizes += [image.n_bytes for image in batch]
        progress.advance(len(batch))
    if len(rows) > 1 and all(reason == VANISHED for reason in reasons):
        raise StoreError(
            f"{len(rows):,} consecutive images have vanished since the build began, the first "
            f"'{escape(plan.images.rows[rows[0]].path)}' in '{plan.images.root}': was a disk unmounted? Finished "
            "work is kept: run the command again to resume"
        )
    return {
        block: ShardData(shard, part, digests, reasons, sizes)
        for block, part in zip(backbone.blocks, activations, strict=True)
    }
