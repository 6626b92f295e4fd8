"""Stores filled by the workers of a cluster, each of which runs `fill_range` on some of the shards."""

import functools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch

from cytosae.backbones.backbone import Backbone, load_backbone
from cytosae_cache.format.marks import PROGRESS_FOLDER, mark_name
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.fill import fill_range, open_writers, shards_to_fill
from cytosae_pipeline.building.findings import Remarks
from cytosae_pipeline.building.plan import BuildPlan, plan_build
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.config.store import Device
from cytosae_pipeline.errors import say_count
from cytosae_pipeline.runtime.cluster import count_workers, map_ranges, plan_ranges
from cytosae_pipeline.runtime.cluster_worker import ClusterError
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.paths import EMBEDDED_MODEL

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)


def find_device(client: "Client", config: BuildConfig) -> torch.device:
    """The kind of device that all workers of a cluster compute on.

    Args:
        client: The cluster.
        config: Options of the build.

    Raises:
        ClusterError: If they do not agree.
        UserError: If the options ask for one that a worker does not have.
    """
    count_workers(client)  # there is one
    kinds = set(client.run(_choose_kind, config.device).values())
    if len(kinds) > 1:
        raise ClusterError(
            f"some workers would compute on {' and others on '.join(sorted(kinds))}, whose last bits differ. Give "
            "--device, or start workers of one kind"
        )
    return torch.device(kinds.pop())


def fill_on_cluster(
    client: "Client", stores: Sequence[ActivationStore], config: BuildConfig, plan: BuildPlan, remarks: Remarks
) -> None:
    """Have the workers of a cluster compute and write missing shards.

    Args:
        client: The cluster.
        stores: Unfinished stores, one for each block.
        config: Options of the build.
        plan: What it does.
        remarks: Collects what is to be said of images.

    Raises:
        ClusterError: As for `map_ranges`.
        StoreError: As for `fill_range`, on a worker.
    """
    shards = shards_to_fill(stores[0], config)
    parts = plan_ranges(len(shards), count_workers(client))
    ranges = [range(shards.start + part.start, shards.start + part.stop) for part in parts]
    blocks = tuple(store.spec.block for store in stores)
    # Workers may run in other folders, and the computing device is that of the plan, whatever each would choose.
    theirs = replace(
        config,
        root_dir=config.root_dir.absolute(),
        images=None if config.images is None else config.images.absolute(),
        model_path=plan.model_path.absolute() if plan.model_path != EMBEDDED_MODEL else config.model_path,
        store=None if config.store is None else str(stores[0].absolute_location),
        device=cast("Device", plan.device.type),
        precision=stores[0].spec.precision,
        block_layer=blocks,
        dask=None,
        shards="1/1",  # the store is shared, and has the list of images
    )
    written = _find_written(stores, shards)
    n_rows, done = _count_rows(stores[0], shards), _count_rows(stores[0], written)
    if done:
        n_shards = f"{len(written):,} of {say_count(len(shards), 'shard')}"
        logger.info(f"resuming after {say_count(done, 'image')} on disk ({n_shards}), which the workers verify")
    with Progress("build", n_rows, "images", done=done) as progress:

        def advance(part: range) -> None:
            progress.advance(_count_rows(stores[0], set(part) - written))

        remarks.merge(map_ranges(client, functools.partial(_fill, theirs), ranges, _merge, advance))


def _find_written(stores: Sequence[ActivationStore], shards: range) -> set[int]:
    """Those of some shards that have a completion mark in all stores."""
    names = [set(store.storage.names(f"{PROGRESS_FOLDER}/")) for store in stores]
    return {shard for shard in shards if all(mark_name(shard) in found for found in names)}


def _count_rows(store: ActivationStore, shards: Iterable[int]) -> int:
    return sum(len(store.shard_rows(shard)) for shard in shards)


def _fill(config: BuildConfig, shards: range) -> Remarks:
    """Fill some shards; runs on a worker."""
    logging.getLogger("cytosae_pipeline").setLevel(logging.WARNING)  # progress is shown where the command was typed
    plan, backbone = _open(config)
    remarks = Remarks()
    stores = [ActivationStore(item.store) for item in plan.stores]
    unfinished = [store for store in stores if not store.complete]
    if unfinished:
        with open_writers(unfinished, shared=True) as writers:
            fill_range(writers, shards, config, plan, remarks, backbone=backbone)
    return remarks


@functools.lru_cache(maxsize=1)
def _open(config: BuildConfig) -> tuple[BuildPlan, Backbone]:
    """What a process needs for all ranges of one build."""
    plan = plan_build(config)
    blocks = [item.spec.block for item in plan.stores]
    return plan, load_backbone(plan.model_path, plan.info, blocks=blocks, device=plan.device)


def _merge(one: Remarks, other: Remarks) -> Remarks:
    one.merge(other)
    return one


def _choose_kind(device: Device) -> str:
    """The kind of device that a worker would compute on."""
    return choose_device(device).type
