"""Stage one: run the vision transformer once over a data set and write its activation store."""

import contextlib
import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreError, StoreMismatchError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.marks import remove_marks
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.storage.base import Location, waiting_for_lock
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.cluster_fill import fill_on_cluster, find_device
from cytosae_pipeline.building.fill import fill_range, open_writers, shards_to_fill
from cytosae_pipeline.building.findings import Remarks, require_readable, write_duplicates, write_skipped
from cytosae_pipeline.building.plan import BuildPlan, StorePlan, plan_build, require_shard_memory
from cytosae_pipeline.building.replacement import choose_place, put_in_place, reopen
from cytosae_pipeline.building.source_check import check_sizes, count_reasons
from cytosae_pipeline.building.store_place import (
    disk_messages,
    make_provenance,
    require_space,
)
from cytosae_pipeline.building.tail_file import write_tail
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.images.columns import type_columns
from cytosae_pipeline.images.image_list import STORED, DatasetError, ImageList
from cytosae_pipeline.runtime.cluster import connect, keep_connected
from cytosae_pipeline.runtime.progress import format_seconds
from cytosae_pipeline.workspace.build_record import record_build
from cytosae_pipeline.workspace.find import require_dataset, training_command
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
Status = Literal["built", "resumed", "already complete", "in part"]
"""What had to be done."""


@dataclass(frozen=True)
class BuildResult:
    """What a build did."""

    store: Location
    """The store, complete unless it is built `in part`."""
    n_images: int
    """Rows of the store."""
    n_skipped: int
    """Images set aside as unreadable; those of the whole store, once it is complete."""
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
    """The command that trains an autoencoder on it; '' if another verb asked for the store, or it is not complete."""
    n_missing_shards: int = 0
    """Shards that other parts of the build have yet to write."""
    tail: Location | None = None
    """The file with the rest of the network, if `keep_tail` asked for it; the last part of a build writes it."""


def build_store(config: BuildConfig) -> BuildResult:
    """Build the store of a data set, resume an interrupted build, or do nothing if the store is complete.

    Raises:
        ValueError: As for `build_and_open`.
        StoreError: As for `build_and_open`.
        SourceError: As for `build_and_open`.
    """
    _require_one_block(config)
    return build_stores(config)[0]


def build_stores(config: BuildConfig) -> list[BuildResult]:
    """`build_store` for several blocks, from one pass of the network: one store per block, in their order.

    Raises:
        ValueError: As for `build_and_open`.
        StoreError: As for `build_and_open`.
        SourceError: As for `build_and_open`.
    """
    return [
        replace(result, next=training_command(store, config) if store.complete else "")
        for store, result in _build(config, None)
    ]


def build_and_open(config: BuildConfig, *, weights_digest: str | None = None) -> tuple[ActivationStore, BuildResult]:
    """The complete store of a data set, and what a build did for it; incomplete only if a shard was damaged meanwhile.

    Args:
        config: Options, with one block and all shards.
        weights_digest: `weights_sha256` of the checkpoint, if it is known already.

    Raises:
        ValueError: If the data set, checkpoint or an existing store does not fit; the message says what to do.
        StoreError: If the disk is full or cannot be written; finished work is kept.
        SourceError: If the disk with the images fails; finished work is kept.
    """
    _require_one_block(config)
    return _build(config, weights_digest)[0]


def _require_one_block(config: BuildConfig) -> None:
    """Refuse several blocks where one store is returned.

    Raises:
        UserError: If there are several.
    """
    if len(config.block_layer) > 1:
        raise UserError(f"block_layer asks for {len(config.block_layer)} stores: call build_stores, or give one block")


def _build(config: BuildConfig, weights_digest: str | None) -> list[tuple[ActivationStore, BuildResult]]:
    """Build the stores of all blocks, with their results."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(keep_connected())
        find = None if config.dask is None else functools.partial(_find_device, config, config.dask)
        plan = plan_build(config, weights_digest=weights_digest, find_device=find)
        logger.info(plan.describe())
        remarks = Remarks()
        locks = stack.enter_context(contextlib.ExitStack())
        for item in sorted(plan.stores, key=lambda item: str(item.store)):
            stack.enter_context(disk_messages(item.store))
            storage = open_storage(item.store)
            locks.enter_context(waiting_for_lock(storage) if config.is_shared else storage.lock())
        opened = []
        for item in plan.stores:
            opened.append(_open_or_create(config, plan, item))
            record_build(opened[-1][0], config)
        if config.is_shared:
            locks.close()
        filled = _fill([store for store, _ in opened if not store.complete], config, plan, remarks)
        notes = [*plan.images.notes, *remarks.describe()]
        results = []
        for item, (store, status) in zip(plan.stores, opened, strict=True):
            seconds = time.monotonic() - started
            whole = filled.get(store.spec, store)
            if whole.complete:
                whole, skipped = _accept(whole, item, config)
                tail = write_tail(whole, plan.model_path, item.info, config) if config.keep_tail else None
                result = replace(_conclude(whole, status, skipped, config, notes, seconds), tail=tail)
            else:
                result = _conclude_part(whole, config, remarks, notes, seconds)
            results.append((whole, result))
    for note in results[0][1].notes[len(plan.images.notes) :]:
        logger.warning(note)
    return results


def _find_device(config: BuildConfig, dask: str) -> torch.device:
    """The kind of device that the workers of the cluster compute on."""
    with connect(dask) as client:
        return find_device(client, config)


def _fill(
    stores: Sequence[ActivationStore], config: BuildConfig, plan: BuildPlan, remarks: Remarks
) -> dict[StoreSpec, ActivationStore]:
    """Compute and write the missing shards, here or on a cluster; returns the stores that are complete, by their spec.

    Raises:
        StoreMismatchError: As for `fill_range`.
        StoreError: As for `fill_range`.
    """
    if not stores:
        return {}
    with open_writers(stores, shared=config.is_shared) as writers:
        if config.dask is None:
            fill_range(writers, shards_to_fill(stores[0], config), config, plan, remarks)
        else:
            with connect(config.dask) as client:
                fill_on_cluster(client, stores, config, plan, remarks)
        finished = [writer.finish_if_last() if config.is_shared else writer.finish() for writer in writers]
    return {store.spec: store for store in finished if store is not None}


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


def _conclude_part(
    store: ActivationStore, config: BuildConfig, remarks: Remarks, notes: Sequence[str], seconds: float
) -> BuildResult:
    """Say what was done for a store that other builds have yet to complete."""
    n_missing = store.n_shards - store.n_finished_shards
    what = "its shards" if config.shards is None else f"part {config.shards}"
    logger.info(f"wrote {what} of store '{store.path}' in {format_seconds(seconds)}")
    return BuildResult(
        store=store.path,
        n_images=store.n_images,
        n_skipped=sum(remarks.skipped.values()),
        skipped_reasons=dict(remarks.skipped.most_common()),
        skipped_csv=None,
        status="in part",
        seconds=seconds,
        notes=tuple(notes),
        n_missing_shards=n_missing,
    )


def _open_or_create(config: BuildConfig, plan: BuildPlan, item: StorePlan) -> tuple[ActivationStore, Status]:
    """The store to fill, and what has to be done."""
    chosen = config.store is not None
    place = choose_place(item.store, overwrite=config.overwrite, delete_first=config.delete_first, chosen=chosen)
    check = functools.partial(_check_existing, config, plan, item)
    found = reopen(place, item.store, check, overwrite=config.overwrite)
    if found is not None:
        return found
    if plan.images.layout == STORED:
        raise StoreError(f"store '{item.store}' was deleted while this build was starting. Run the command again")
    if config.compression == "none":
        advice = "Free some space, use another --root_dir, or --limit the number of images"
        advice += ", or add --delete-first to delete the old store before" * (place != item.store)
        require_space(place, item.n_bytes, advice)
    images = plan.images
    provenance = make_provenance(require_dataset(config), images.digest(), plan.device.type, config.batch_size)
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
    _check_list(config, plan.images, store)
    if store.complete:
        # A build that was killed at its very end may have left marks behind.
        remove_marks(store.storage)
        check_sizes(store, plan.images)
        return "already complete"
    made = store.provenance
    wanted = (min(config.shard_images, store.n_images), config.compression, plan.device.type, config.batch_size)
    found = (store.shard_images, store.compression, made.device, made.batch_size or config.batch_size)
    if wanted != found:
        raise StoreMismatchError(
            f"the unfinished store '{store.path}' was started with --shard_images {found[0]} --compression {found[1]} "
            f"--device {found[2]} --batch_size {found[3]}, now these are {wanted[0]}, {wanted[1]}, {wanted[2]} and "
            f"{wanted[3]}: its numbers would differ from shard to shard. Give the same values, or --overwrite"
        )
    return "resumed"


def _check_list(config: BuildConfig, images: ImageList, store: ActivationStore) -> None:
    """Refuse a store of other images.

    Raises:
        StoreMismatchError: If it is one.
    """
    if images.layout == STORED:
        if config.limit is not None and len(images) > config.limit:
            raise StoreMismatchError(
                f"store '{store.path}' has {len(images):,} images, --limit asks for {config.limit:,}: give every part "
                "of a build the same options"
            )
        return
    digest = images.digest()
    if images.columns and store.provenance.list_digest == images.without_columns().digest():
        logger.info(f"store '{store.path}' was made without the list's further columns: --overwrite adds them")
    elif store.provenance.list_digest != digest:
        raise StoreMismatchError(
            f"store '{store.path}' was made from {say_count(store.n_images, 'image')} with list digest "
            f"{store.provenance.list_digest[:12]}, the current list has {len(images):,} and digest "
            f"{digest[:12]}: images, labels, patients or further columns changed. Use another --dataset_name, or "
            "--overwrite to build it from scratch"
        )
