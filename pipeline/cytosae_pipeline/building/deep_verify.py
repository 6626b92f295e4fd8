"""`verify --deep`: hash all images again, recompute some activations as the spec says, and compare."""

import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import VerifyReport
from cytosae_pipeline.building.originals import (
    BATCH_IMAGES,
    Originals,
    Problems,
    SharedOriginals,
    describe_own_backbone,
    require_network,
)
from cytosae_pipeline.building.tail_file import describe_tail
from cytosae_pipeline.building.verify_shards import verify_files
from cytosae_pipeline.config import VerifyConfig
from cytosae_pipeline.errors import UserError, escape
from cytosae_pipeline.images.listing import list_stored_images
from cytosae_pipeline.runtime.cluster import connect, count_workers, keep_connected, map_ranges, plan_ranges
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.build_record import find_images, find_model
from cytosae_pipeline.workspace.find import find_store, require_finished
from cytosae_pipeline.workspace.paths import resolve_model_path

if TYPE_CHECKING:
    from distributed import Client

N_IMAGES = 16
"""Images that are recomputed, spread over the store."""


def check_store(config: VerifyConfig) -> tuple[ActivationStore, VerifyReport]:
    """Check every file and checksum of the store that the options mean, and some of its activations if `deep` is set.

    Returns:
        The store, and what was found.

    Raises:
        StoreError: If there is no such store, or it is unfinished.
        ClusterError: If the cluster cannot be used.
        UserError: As for `verify_against_source`.
    """
    store = find_store(config)
    require_finished(store, config)
    with keep_connected():
        report = verify_files(store, config.dask)
        report.tail, report.tail_problem = describe_tail(store, config)
        if config.deep and not report.problems:
            report.problems += verify_against_source(store, config)
    return store, report


def verify_against_source(store: ActivationStore, config: VerifyConfig) -> list[str]:
    """Compare the images with their recorded digests, and stored activations with recomputed ones.

    Args:
        store: A complete store.
        config: Names the checkpoint and the images, if they are not where the store was built from, and the cluster
            whose workers do it, if any.

    Returns:
        One line per problem: an image that changed or vanished, or whose activations differ.

    Raises:
        UserError: If the checkpoint or the images are missing, or the checkpoint is not the store's.
        ClusterError: If the cluster cannot be used, or a worker does not find the same.
    """
    require_network(store)
    model_path = resolve_model_path(find_model(store, config.root_dir, config.model_path))
    if model_path is None:
        raise UserError("--deep recomputes activations: pass the network with --model_path CHECKPOINT")
    info = describe_own_backbone(store, model_path, config.model_name)
    place = find_images(store, config.root_dir, config.images)
    images = list_stored_images(store, dataclasses.replace(config, images=place))
    if images is None:
        raise UserError(f"no images at '{place}': pass their location with --images PATH")
    originals = Originals(store, images, model_path, info, config.device)
    shared = SharedOriginals.of(originals, place, config.model_name)
    with contextlib.nullcontext() if config.dask is None else connect(config.dask) as client:
        problems = _compare_files(originals, shared, client)
        sound = np.array([row for row in store.valid_rows.tolist() if row not in problems], dtype=np.int64)
        problems |= _recompute(originals, shared, client, sound[spread_rows(len(sound), N_IMAGES)])
    return [f"row {row} ('{escape(images.rows[row].path)}'): {problem}" for row, problem in sorted(problems.items())]


def _compare_files(originals: Originals, shared: SharedOriginals, client: "Client | None") -> Problems:
    """Problem of every row whose file is not the one that was read."""
    n_shards = originals.store.n_shards
    n_images = len(originals.recorded_rows(range(n_shards)))
    with Progress("compare images", n_images, "images") as bar:
        if client is None:
            return originals.compare_files(range(n_shards), bar.advance)
        return map_ranges(
            client, functools.partial(_compare_range, shared), plan_ranges(n_shards, count_workers(client)), _merge,
            lambda part: bar.advance(len(originals.recorded_rows(part))),
        )  # fmt: skip


def _recompute(
    originals: Originals, shared: SharedOriginals, client: "Client | None", rows: npt.NDArray[np.int64]
) -> Problems:
    """Problem of every row whose activations are not those that the network gives."""
    with Progress("recompute", len(rows), "images") as bar:
        if client is None or not len(rows):
            return originals.recompute(rows, bar.advance)
        batches = [rows[start : start + BATCH_IMAGES].tolist() for start in range(0, len(rows), BATCH_IMAGES)]
        return map_ranges(
            client, functools.partial(_recompute_range, shared, rows),
            [range(batch[0], batch[-1] + 1) for batch in batches], _merge,
            lambda part: bar.advance(len(_rows_in(part, rows))), unit="rows",
        )  # fmt: skip


def _compare_range(shared: SharedOriginals, shards: range) -> Problems:
    """What a worker does for a range of shards."""
    return shared.open().compare_files(shards)


def _recompute_range(shared: SharedOriginals, rows: npt.NDArray[np.int64], part: range) -> Problems:
    """What a worker does for those of the chosen rows that are in a range."""
    return shared.open().recompute(_rows_in(part, rows))


def _rows_in(part: range, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return rows[(rows >= part.start) & (rows < part.stop)]


def _merge(one: Problems, other: Problems) -> Problems:
    return one | other
