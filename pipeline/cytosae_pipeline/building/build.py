"""Stage one: run the vision transformer once over a data set and write its activation store."""

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from cytosae.backbones.backbone import Backbone, BackboneInfo, describe_backbone, load_backbone
from cytosae.backbones.images import to_tensor
from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError, StoreNotFoundError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.marks import remove_marks
from cytosae_cache.format.metadata import Provenance
from cytosae_cache.format.spec import Precision, Preprocessing, StoreDtype, StoreSpec, TokenLayout
from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import ShardData, StoreWriter, clear_leftovers, create_store
from cytosae_pipeline import __version__
from cytosae_pipeline.building.findings import Remarks, require_readable, write_duplicates, write_skipped
from cytosae_pipeline.building.source_check import check_sizes, count_reasons, reopen_shards
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.columns import type_columns
from cytosae_pipeline.images.decoding import Decoded, ImageDecoder
from cytosae_pipeline.images.files import VANISHED
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import open_dataset
from cytosae_pipeline.images.summary import describe_images
from cytosae_pipeline.runtime.devices import autocast, choose_device, choose_precision
from cytosae_pipeline.runtime.progress import Progress, format_bytes, format_seconds
from cytosae_pipeline.workspace.find import require_dataset
from cytosae_pipeline.workspace.paths import Workspace, resolve_model_path

if TYPE_CHECKING:
    import numpy.typing as npt

logger = logging.getLogger(__name__)

_MOST_WORKERS = 8
_TORCH_SINGLE_THREADED = 32_768
"""Elements up to which torch stays in the calling thread."""


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do, decided before any work begins."""

    images: ImageList
    """Images in row order."""
    model_path: Path
    """Checkpoint of the backbone."""
    info: BackboneInfo
    """Description of the checkpoint."""
    spec: StoreSpec
    """What identifies the store."""
    store: Location
    """Place of the store."""
    n_bytes: int
    """Bytes of its activations, uncompressed."""
    free_bytes: int | None
    """Free disk at that place; None for remote storage."""
    device: torch.device
    """Device of the network."""

    def describe(self) -> str:
        """The plan as text."""
        free = "remote" if self.free_bytes is None else f"{format_bytes(self.free_bytes)} free"
        return (
            f"{describe_images(self.images)}\n"
            f"{self.spec.model_name} block {self.spec.block} (of 0 to {self.spec.n_blocks - 1}), "
            f"{self.spec.tokens.n_tokens} tokens x {self.spec.d_model}, {self.spec.precision} on {self.device}\n"
            f"store '{self.store}': {format_bytes(self.n_bytes)} ({free})"
        )


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
    status: Literal["built", "resumed", "already complete"]
    """What had to be done."""
    seconds: float
    """Duration in seconds."""
    notes: tuple[str, ...] = ()
    """What should be known about the images, as messages."""


def plan_build(config: BuildConfig, *, weights_digest: str | None = None) -> BuildPlan:
    """Decide everything about a build without reading an image or running the network.

    Raises:
        ValueError: If the data set or checkpoint is missing or wrong; the message says what to do.
    """
    name = require_dataset(config)
    workspace = Workspace(config.root_dir)
    model_path = resolve_model_path(config.model_path)
    if model_path is None:
        raise UserError(
            "build needs the vision transformer's checkpoint: --model_path ./DinoBloom-B.pth "
            "(or --model_path embedded for the small one in the package)"
        )
    images = open_dataset(config.images or workspace.dataset_dir(name), config.layout)
    if config.limit is not None:
        images = images.spread(config.limit)
    info = describe_backbone(
        model_path, name=config.model_name, block=config.block_layer, weights_digest=weights_digest
    )
    device = choose_device(config.device)
    spec = make_spec(info, store_dtype=config.store_dtype, precision=choose_precision(config.precision, device))
    store = open_storage(config.store or workspace.store_path(name, spec.hash)).location
    n_bytes = len(images) * spec.record_bytes
    return BuildPlan(images, model_path, info, spec, store, n_bytes, _free_bytes(store), device)


def _free_bytes(store: Location) -> int | None:
    """Free disk at the place of a store; None for remote storage."""
    if isinstance(store, str):
        return None
    return shutil.disk_usage(_existing(store)).free


def make_spec(info: BackboneInfo, *, store_dtype: StoreDtype, precision: Precision) -> StoreSpec:
    """The spec of a backbone's activations."""
    return StoreSpec(
        model_name=info.name,
        weights_sha256=info.weights_sha256,
        block=info.block % info.n_blocks,
        n_blocks=info.n_blocks,
        d_model=info.d_model,
        tokens=TokenLayout(info.n_cls, info.n_registers, info.grid),
        preprocessing=Preprocessing(image_size=info.image_size, mean=info.image_mean, std=info.image_std),
        store_dtype=store_dtype,
        precision=precision,
    )


def build_store(config: BuildConfig) -> BuildResult:
    """Build the store of a data set, resume an interrupted build, or do nothing if the store is complete.

    Raises:
        ValueError: As for `build_and_open`.
        StoreError: As for `build_and_open`.
        SourceError: As for `build_and_open`.
    """
    return build_and_open(config)[1]


def build_and_open(config: BuildConfig, *, weights_digest: str | None = None) -> tuple[ActivationStore, BuildResult]:
    """`build_store`, with the complete store.

    Args:
        config: Options.
        weights_digest: `weights_sha256` of the checkpoint, if it is known already.

    Raises:
        ValueError: If the data set, checkpoint or an existing store does not fit; the message says what to do.
        StoreError: If the disk is full or cannot be written; finished work is kept.
        SourceError: If the disk with the images fails; finished work is kept.
    """
    started = time.monotonic()
    plan = plan_build(config, weights_digest=weights_digest)
    logger.info(plan.describe())
    folder = open_storage(plan.store)
    remarks = Remarks(plan.images)
    workspace, name = Workspace(config.root_dir), require_dataset(config)
    with _disk_messages(plan.store), folder.lock():
        if config.overwrite:
            _destroy(folder, chosen=config.store is not None)
        store, status = _open_or_create(config, plan)
        if status != "already complete":
            store = _fill(store, config, plan, remarks)
        skipped = write_skipped(store, workspace.list_path(store.path, name, "skipped"))
        require_readable(store, skipped)
        found = [*remarks.describe(), *write_duplicates(store, workspace.list_path(store.path, name, "duplicates"))]
    n_skipped = int((~store.valid).sum())
    seconds = time.monotonic() - started
    if status == "already complete":
        logger.info(f"store '{store.path}' is already complete: nothing to do")
    else:
        logger.info(f"wrote store '{store.path}' in {format_seconds(seconds)}")
    for note in found:
        logger.warning(note)
    notes = (*plan.images.notes, *found)
    result = BuildResult(store.path, store.n_images, n_skipped, count_reasons(store), skipped, status, seconds, notes)
    return store, result


def _destroy(folder: StorageBackend, *, chosen: bool) -> None:
    """Delete a store. At a place chosen by the user, delete only what opens as a store, or leftovers of a build."""
    try:
        ActivationStore(folder.location)
    except StoreNotFoundError:
        clear_leftovers(folder)
    except StoreCorruptError:
        if chosen:
            raise
    folder.delete()


def _open_or_create(
    config: BuildConfig, plan: BuildPlan
) -> tuple[ActivationStore, Literal["built", "resumed", "already complete"]]:
    """The store to fill, and what has to be done."""
    images = plan.images
    digest = images.digest()
    if open_storage(plan.store).size("zarr.json") is None:
        if plan.free_bytes is not None and plan.n_bytes > plan.free_bytes and config.compression == "none":
            raise StoreError(
                f"the store needs {format_bytes(plan.n_bytes)}, but only {format_bytes(plan.free_bytes)} are free at "
                f"'{plan.store}'. Free some space, use another --root_dir, or --limit the number of images"
            )
        stamp = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
        created = datetime.fromtimestamp(stamp, UTC).isoformat()
        name = require_dataset(config)
        provenance = Provenance(name, digest, __version__, created, plan.device.type)
        table = ImageTable(images.paths, images.labels, images.patients)
        shards = min(config.shard_images, len(images))
        columns = type_columns(images)
        return create_store(
            plan.store, plan.spec, table, provenance, shard_images=shards, compression=config.compression,
            columns=columns,
        ), "built"  # fmt: skip
    store = ActivationStore(plan.store)
    if images.columns and store.provenance.list_digest == images.without_columns().digest():
        logger.info(f"store '{plan.store}' was made without the list's further columns: --overwrite adds them")
    elif store.provenance.list_digest != digest:
        raise StoreMismatchError(
            f"store '{plan.store}' was made from {store.n_images:,} images with list digest "
            f"{store.provenance.list_digest[:12]}, the current list has {len(images):,} and digest "
            f"{digest[:12]}: images, labels, patients or further columns changed. Use another --dataset_name, or "
            "--overwrite to build it from scratch"
        )
    if store.complete:
        # A build that was killed at its very end may have left marks behind.
        remove_marks(store.storage)
        check_sizes(store, images)
        return store, "already complete"
    wanted = (min(config.shard_images, len(images)), config.compression, plan.device.type)
    found = (store.shard_images, store.compression, store.provenance.device)
    if wanted != found:
        raise StoreMismatchError(
            f"the unfinished store '{plan.store}' was started with --shard_images {found[0]} --compression {found[1]} "
            f"--device {found[2]}, now these are {wanted[0]}, {wanted[1]} and {wanted[2]}. Give the same values, or "
            "--overwrite"
        )
    return store, "resumed"


def _fill(store: ActivationStore, config: BuildConfig, plan: BuildPlan, remarks: Remarks) -> ActivationStore:
    """Compute and write the missing shards; returns the complete store."""
    n_workers = config.workers if config.workers is not None else min(_MOST_WORKERS, os.cpu_count() or 1)
    with (
        StoreWriter(store, widen=widen_with_torch) as writer,
        ImageDecoder(plan.images, n_workers=n_workers, image_size=plan.info.image_size) as decoder,
    ):
        todo = writer.missing_shards()
        finished = sorted(set(range(store.n_shards)) - set(todo))
        if finished:
            todo = sorted([*todo, *reopen_shards(writer, finished, plan.images, decoder)])
        writer.discard(todo)
        rows = [row for shard in todo for row in store.shard_rows(shard)]
        done = store.n_images - len(rows)
        if done:
            logger.info(f"resuming after {done:,} images that are on disk and verified")
        if rows:
            backbone = load_backbone(plan.model_path, plan.info, device=plan.device)
            with Progress("build", store.n_images, "images", done=done) as progress:
                decoded = remarks.watch(decoder.iter_rows(rows))
                for shard in todo:
                    writer.submit(_compute_shard(store, shard, decoded, backbone, config, plan, progress))
        return writer.finish()


def _compute_shard(
    store: ActivationStore,
    shard: int,
    decoded: Iterator[Decoded],
    backbone: Backbone,
    config: BuildConfig,
    plan: BuildPlan,
    progress: Progress,
) -> ShardData:
    """Run the network on one shard's images, in batches that begin at the shard's first row."""
    rows = store.shard_rows(shard)
    activations = np.empty((len(rows), *store.spec.image_shape), dtype=store.dtype)
    digests: list[bytes | None] = []
    reasons: list[str] = []
    sizes: list[int] = []
    for start in range(0, len(rows), config.batch_size):
        batch = [next(decoded) for _ in rows[start : start + config.batch_size]]
        for image in batch:
            if image.reason and config.strict_images:
                raise StoreError(
                    f"image '{plan.images.rows[image.row].path}' cannot be read: {image.reason}. "
                    "Repair or remove it, or omit --strict-images to set such images aside"
                )
        computed = compute_activations(backbone, batch, plan.spec, plan.info, plan.device)
        activations[start : start + len(batch)] = computed
        digests += [image.sha256 for image in batch]
        reasons += [image.reason for image in batch]
        sizes += [image.n_bytes for image in batch]
        progress.advance(len(batch))
    if len(rows) > 1 and all(reason == VANISHED for reason in reasons):
        raise StoreError(
            f"{len(rows):,} consecutive images have vanished since the build began, the first "
            f"'{plan.images.rows[rows[0]].path}' in '{plan.images.root}': was a disk unmounted? Finished work is "
            "kept: run the command again to resume"
        )
    return ShardData(shard, activations, digests, reasons, sizes)


def compute_activations(
    backbone: Backbone, batch: Sequence[Decoded], spec: StoreSpec, info: BackboneInfo, device: torch.device
) -> "npt.NDArray[Any]":
    """Activations of a batch in the store's dtype, shape `(n, T, D)`; NaN for unreadable images.

    Unreadable images keep their slot in the batch as black pictures, so that the numbers of other images do not depend
    on them.
    """
    size = info.image_size
    pixels = np.zeros((len(batch), size, size, 3), dtype=np.uint8)
    for slot, image in enumerate(batch):
        if image.pixels is not None:
            pixels[slot] = image.pixels
    with torch.inference_mode(), autocast(spec.precision, device):
        tensor = to_tensor(pixels, mean=info.image_mean, std=info.image_std, device=device)
        # CPU-GPU sync point: the copy back waits for the forward pass. Decoding and writing continue in the meantime.
        computed = backbone(tensor).to(getattr(torch, spec.value_dtype)).cpu().numpy()
    for slot, image in enumerate(batch):
        if image.reason:
            computed[slot] = np.nan
    return computed  # type: ignore[no-any-return]


def widen_with_torch(out: "npt.NDArray[np.float64]", values: "npt.NDArray[Any]") -> None:
    """Convert float16 to float64 with the processor's own instructions, which numpy does not use.

    Works on slices too small for torch to split among threads, which the network needs.
    """
    step = max(1, _TORCH_SINGLE_THREADED // values.shape[1])
    for start in range(0, len(values), step):
        part = torch.from_numpy(values[start : start + step])
        torch.from_numpy(out[start : start + step]).copy_(part.float())


@contextlib.contextmanager
def _disk_messages(store: Location) -> Iterator[None]:
    """Turn errors of the disk into messages that say where and what to do; those of remote storage already do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreError) or isinstance(store, str) or not _concerns(error, store):
            raise
        reason = error.strerror or type(error).__name__
        where = f"store '{store}' cannot be written: {reason}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = format_bytes(shutil.disk_usage(_existing(store)).free)
            raise StoreError(
                f"{where} ({free} free). Finished work is kept: free some space, then run the command again to resume"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreError(f"{where}. Make the folder writable, or use another --root_dir") from error
        raise StoreError(f"{where}. Finished work is kept: run the command again to resume") from error


def _concerns(error: OSError, store: Path) -> bool:
    """Whether an error concerns the store's folder; errors of writing to an open file do not name one."""
    if not isinstance(error.filename, str):
        return True
    place = Path(error.filename).absolute()
    return place.is_relative_to(store.absolute().parent) or store.absolute().is_relative_to(place)


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in [path, *path.absolute().parents] if place.exists())
