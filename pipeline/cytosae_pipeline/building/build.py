"""Stage one: run the vision transformer once over a data set and write its activation store."""

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from cytosae.backbones.backbone import Backbone, load_backbone
from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.marks import remove_marks
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.storage.base import Location
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import ShardData, StoreWriter, create_store
from cytosae_pipeline.building.activations import compute_activations, widen_with_torch
from cytosae_pipeline.building.findings import Remarks, require_readable, write_duplicates, write_skipped
from cytosae_pipeline.building.plan import BuildPlan, StorePlan, plan_build, require_shard_memory
from cytosae_pipeline.building.replacement import choose_place, put_in_place, reopen
from cytosae_pipeline.building.source_check import check_sizes, count_reasons, reopen_shards
from cytosae_pipeline.building.store_place import (
    disk_messages,
    make_provenance,
    require_space,
)
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.images.columns import type_columns
from cytosae_pipeline.images.decoding import Decoded, ImageDecoder
from cytosae_pipeline.images.files import VANISHED
from cytosae_pipeline.images.image_list import DatasetError
from cytosae_pipeline.runtime.progress import Progress, format_seconds
from cytosae_pipeline.workspace.build_record import record_build
from cytosae_pipeline.workspace.find import require_dataset, training_command
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
Status = Literal["built", "resumed", "already complete"]
"""What had to be done."""


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    store: Location
    """The complete store."""
    n_images: int
    """Rows of the store."""
    n_skipped: int
    """Images set aside as unreadable."""
    skipped_reasons: dict[str, int]
    """Images of each kind of reason."""
    skipped_csv: Path | None
    """List of these images, if there are any."""
    status: Status
    """What had to be done."""
    seconds: float
    """Duration in seconds."""
    notes: tuple[str, ...] = ()
    """What should be known about the images, as messages."""
    next: str = ""
    """The command that trains an autoencoder on it; '' if another verb asked for the store."""


def build_store(config: BuildConfig) -> BuildResult:
    """Build the store of a data set, resume an interrupted build, or do nothing if the store is complete.

    Raises:
        ValueError: As for `build_and_open`.
        StoreError: As for `build_and_open`.
        SourceError: As for `build_and_open`.
    """
    store, result = build_and_open(config)
    return replace(result, next=training_command(store, config))


def build_stores(config: BuildConfig) -> list[BuildResult]:
    """`build_store` for several blocks, from one pass of the network: one store per block, in their order.

    Raises:
        ValueError: As for `build_and_open`.
        StoreError: As for `build_and_open`.
        SourceError: As for `build_and_open`.
    """
    return [replace(result, next=training_command(store, config)) for store, result in _build(config, None)]


def build_and_open(config: BuildConfig, *, weights_digest: str | None = None) -> tuple[ActivationStore, BuildResult]:
    """The complete store of a data set, and what a build did for it.

    Args:
        config: Options, with one block.
        weights_digest: `weights_sha256` of the checkpoint, if it is known already.

    Raises:
        ValueError: If the data set, checkpoint or an existing store does not fit; the message says what to do.
        StoreError: If the disk is full or cannot be written; finished work is kept.
        SourceError: If the disk with the images fails; finished work is kept.
    """
    if len(config.block_layer) > 1:
        raise UserError(f"block_layer asks for {len(config.block_layer)} stores: call build_stores, or give one block")
    return _build(config, weights_digest)[0]


def _build(config: BuildConfig, weights_digest: str | None) -> list[tuple[ActivationStore, BuildResult]]:
    """Build the stores of all blocks, with their results."""
    started = time.monotonic()
    plan = plan_build(config, weights_digest=weights_digest)
    logger.info(plan.describe())
    remarks = Remarks(plan.images)
    with contextlib.ExitStack() as stack:
        for item in sorted(plan.stores, key=lambda item: str(item.store)):
            stack.enter_context(disk_messages(item.store))
            stack.enter_context(open_storage(item.store).lock())
        opened = []
        for item in plan.stores:
            opened.append(_open_or_create(config, plan, item))
            record_build(opened[-1][0], config)
        filled = _fill([store for store, _ in opened if not store.complete], config, plan, remarks)
        notes = [*plan.images.notes, *remarks.describe()]
        results = []
        for item, (store, status) in zip(plan.stores, opened, strict=True):
            complete, skipped = _accept(filled.get(store.spec, store), item, config)
            seconds = time.monotonic() - started
            results.append((complete, _conclude(complete, status, skipped, config, notes, seconds)))
    for note in results[0][1].notes[len(plan.images.notes) :]:
        logger.warning(note)
    return results


def _accept(store: ActivationStore, item: StorePlan, config: BuildConfig) -> tuple[ActivationStore, Path | None]:
    """A complete store in its place, and the list of its unreadable images.

    Raises:
        DatasetError: If no image could be read; such a store replaces no other.
    """
    skipped = write_skipped(store, Workspace(config.root_dir).list_path(item.store, require_dataset(config), "skipped"))
    try:
        require_readable(store, skipped)
    except DatasetError:
        if store.path != item.store:
            store.storage.delete()
        raise
    return put_in_place(store, item.store), skipped


def _conclude(
    store: ActivationStore,
    status: Status,
    skipped: Path | None,
    config: BuildConfig,
    notes: Sequence[str],
    seconds: float,
) -> BuildResult:
    """List a store's duplicates, and say what was done."""
    workspace, name = Workspace(config.root_dir), require_dataset(config)
    found = [*notes, *write_duplicates(store, workspace.list_path(store.path, name, "duplicates"))]
    if status == "already complete":
        logger.info(f"store '{store.path}' is already complete: nothing to do")
    else:
        logger.info(f"wrote store '{store.path}' in {format_seconds(seconds)}")
    n_skipped = int((~store.valid).sum())
    return BuildResult(
        store=store.path,
        n_images=store.n_images,
        n_skipped=n_skipped,
        skipped_reasons=count_reasons(store),
        skipped_csv=skipped,
        status=status,
        seconds=seconds,
        notes=tuple(found),
    )


def _open_or_create(config: BuildConfig, plan: BuildPlan, item: StorePlan) -> tuple[ActivationStore, Status]:
    """The store to fill, and what has to be done."""
    chosen = config.store is not None
    place = choose_place(item.store, overwrite=config.overwrite, delete_first=config.delete_first, chosen=chosen)
    check = functools.partial(_check_existing, config, plan, item)
    found = reopen(place, item.store, check, overwrite=config.overwrite)
    if found is not None:
        return found
    if config.compression == "none":
        advice = "Free some space, use another --root_dir, or --limit the number of images"
        advice += ", or add --delete-first to delete the old store before" * (place != item.store)
        require_space(place, item.n_bytes, advice)
    images = plan.images
    provenance = make_provenance(require_dataset(config), images.digest(), plan.device.type)
    table = ImageTable(images.paths, images.labels, images.patients)
    shards = min(config.shard_images, len(images))
    require_shard_memory(plan, shards, config.batch_size)
    columns = type_columns(images)
    return create_store(
        place, item.spec, table, provenance, shard_images=shards, compression=config.compression, columns=columns
    ), "built"


def _check_existing(config: BuildConfig, plan: BuildPlan, item: StorePlan, store: ActivationStore) -> Status:
    """What has to be done for an existing store, if it is the one that is to be built.

    Raises:
        StoreMismatchError: If it is not.
    """
    if store.spec != item.spec:
        raise StoreMismatchError(
            f"store '{store.path}' is not the one that the options describe (store, options): "
            f"{'; '.join(store.spec.differences(item.spec))}. Give another --store, or --overwrite"
        )
    images, digest = plan.images, plan.images.digest()
    if images.columns and store.provenance.list_digest == images.without_columns().digest():
        logger.info(f"store '{store.path}' was made without the list's further columns: --overwrite adds them")
    elif store.provenance.list_digest != digest:
        raise StoreMismatchError(
            f"store '{store.path}' was made from {store.n_images:,} images with list digest "
            f"{store.provenance.list_digest[:12]}, the current list has {len(images):,} and digest "
            f"{digest[:12]}: images, labels, patients or further columns changed. Use another --dataset_name, or "
            "--overwrite to build it from scratch"
        )
    if store.complete:
        # A build that was killed at its very end may have left marks behind.
        remove_marks(store.storage)
        check_sizes(store, images)
        return "already complete"
    wanted = (min(config.shard_images, len(images)), config.compression, plan.device.type)
    found = (store.shard_images, store.compression, store.provenance.device)
    if wanted != found:
        raise StoreMismatchError(
            f"the unfinished store '{store.path}' was started with --shard_images {found[0]} --compression {found[1]} "
            f"--device {found[2]}, now these are {wanted[0]}, {wanted[1]} and {wanted[2]}. Give the same values, or "
            "--overwrite"
        )
    return "resumed"


def _fill(
    stores: Sequence[ActivationStore], config: BuildConfig, plan: BuildPlan, remarks: Remarks
) -> dict[StoreSpec, ActivationStore]:
    """Compute and write the missing shards; returns the complete stores by their spec."""
    if not stores:
        return {}
    n_workers = config.workers if config.workers is not None else min(_MOST_WORKERS, os.cpu_count() or 1)
    info = plan.info
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(StoreWriter(store, widen=widen_with_torch)) for store in stores]
        decoder = stack.enter_context(
            ImageDecoder(
                plan.images,
                n_workers=n_workers,
                image_size=info.image_size,
                resample=info.resample,
                white_level=config.white_level,
            )
        )
        missing = [_missing_shards(writer, config, plan, decoder) for writer in writers]
        todo = sorted(set().union(*missing))
        first = stores[0]
        rows = [row for shard in todo for row in first.shard_rows(shard)]
        done = first.n_images - len(rows)
        if done:
            logger.info(f"resuming after {done:,} images that are on disk and verified")
        if rows:
            blocks = [store.spec.block for store in stores]
            backbone = load_backbone(plan.model_path, info, blocks=blocks, device=plan.device)
            with Progress("build", first.n_images, "images", done=done) as progress:
                decoded = remarks.watch(decoder.iter_rows(rows))
                for shard in todo:
                    computed = _compute_shard(first, shard, decoded, backbone, config, plan, progress)
                    for writer, shards, data in zip(writers, missing, computed, strict=True):
                        if shard in shards:
                            writer.submit(data)
        return {store.spec: writer.finish() for store, writer in zip(stores, writers, strict=True)}


def _missing_shards(writer: StoreWriter, config: BuildConfig, plan: BuildPlan, decoder: ImageDecoder) -> set[int]:
    """Shards that have to be computed, those of images that changed included; nothing of them is left on disk."""
    todo = writer.missing_shards()
    finished = sorted(set(range(writer.store.n_shards)) - set(todo))
    if finished:
        try:
            todo = sorted([*todo, *reopen_shards(writer, finished, plan.images, decoder)])
        except StoreMismatchError as error:
            if not config.overwrite:
                raise
            logger.info(f"starting again from scratch, as --overwrite asks: {error}")
            todo = list(range(writer.store.n_shards))
    writer.discard(todo)
    return set(todo)


def _compute_shard(
    store: ActivationStore,
    shard: int,
    decoded: Iterator[Decoded],
    backbone: Backbone,
    config: BuildConfig,
    plan: BuildPlan,
    progress: Progress,
) -> list[ShardData]:
    """Run the network on one shard's images, in batches that begin at the shard's first row; one result per block."""
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
    return [ShardData(shard, part, digests, reasons, sizes) for part in activations]
