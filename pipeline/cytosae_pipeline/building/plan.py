"""What a build will do, decided before an image is read or the network runs."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cytosae.backbones.backbone import BackboneInfo, describe_blocks
from cytosae.backbones.preprocessing import MAX_IMAGE_SIZE, StatedTransform
from cytosae_cache.errors import StoreNotFoundError
from cytosae_cache.format.spec import Precision, Preprocessing, StoreDtype, StoreSpec, TokenLayout
from cytosae_cache.storage.base import Location
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.store_place import free_bytes
from cytosae_pipeline.config import BuildConfig
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.images.listing import list_images_of, open_dataset
from cytosae_pipeline.images.summary import describe_images
from cytosae_pipeline.runtime.devices import choose_device, choose_precision
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import format_bytes
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.workspace.find import require_dataset
from cytosae_pipeline.workspace.paths import EMBEDDED_MODEL, Workspace, resolve_model_path

_SHARDS_AT_ONCE = 2


@dataclass(frozen=True)
class StorePlan:
    """One of the stores of a build."""

    info: BackboneInfo
    """Description of the checkpoint and of the block."""
    spec: StoreSpec
    """What identifies the store."""
    store: Location
    """Place of the store."""
    n_bytes: int
    """Bytes of its activations, uncompressed."""
    free_bytes: int | None
    """Free disk at that place; None for remote storage."""


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do."""

    images: ImageList
    """Images in row order."""
    model_path: Path
    """Checkpoint of the backbone."""
    stores: tuple[StorePlan, ...]
    """One per block."""
    device: torch.device
    """Device of the network."""

    @property
    def info(self) -> BackboneInfo:
        """Description of the checkpoint; all stores share it, apart from the block."""
        return self.stores[0].info

    @property
    def n_bytes(self) -> int:
        """Bytes of all activations, uncompressed."""
        return sum(item.n_bytes for item in self.stores)

    def describe(self) -> str:
        """The plan as text."""
        lines = [
            describe_images(self.images),
            *self._describe_network(),
        ]
        for item in self.stores:
            free = "remote" if item.free_bytes is None else f"{format_bytes(item.free_bytes)} free"
            lines.append(f"store '{item.store}': {format_bytes(item.n_bytes)} ({free})")
        return "\n".join(lines)

    def _describe_network(self) -> list[str]:
        """The network that will run, and what it is given."""
        info, spec = self.info, self.stores[0].spec
        blocks = ", ".join(str(item.spec.block) for item in self.stores)
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (info.image_mean, info.image_std))
        scale = "" if info.image_scale == 1 / 255 else f", pixel values x {info.image_scale:g}"
        level = spec.preprocessing.white_level
        scale += f", grey values of more than 8 bits from 0 to {level}" if level else ""
        return [
            f"{spec.model_name} block{'s' if len(self.stores) > 1 else ''} {blocks} (of 0 to {spec.n_blocks - 1}), "
            f"{spec.tokens.n_tokens} tokens x {spec.d_model}, {spec.precision} on {self.device}",
            f"network: {info.kind}",
            f"images: {info.image_size} x {info.image_size} ({info.resample}){scale}, mean {mean}, std {std}; "
            f"{info.grid[0]} x {info.grid[1]} patches",
            *info.notes,
        ]


def plan_build(
    config: BuildConfig, *, weights_digest: str | None = None, find_device: Callable[[], torch.device] | None = None
) -> BuildPlan:
    """Decide everything about a build without reading an image or running the network.

    Args:
        config: Options.
        weights_digest: `weights_sha256` of the checkpoint, if it is known already.
        find_device: Finds the device of the network if other machines compute. Asked after images and checkpoint are
            known to be there, so that nothing is started for a name that was mistyped.

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
    root = config.images or workspace.dataset_dir(name)
    images = None if config.part is not None else _list_images(config, root)
    infos = _describe_blocks(config, model_path, weights_digest)
    device = find_device() if find_device else choose_device(config.device)
    precision = choose_precision(config.precision, device)
    places: dict[Location, tuple[BackboneInfo, StoreSpec]] = {}
    for info in infos:
        spec = make_spec(info, store_dtype=config.store_dtype, precision=precision, white_level=config.white_level or 0)
        store = open_storage(config.store or workspace.store_path(name, spec.hash)).location
        if store in places:
            raise UserError(f"block_layer {list(config.block_layer)} names block {spec.block} twice")
        places[store] = info, spec
    if images is None:
        images = _list_stored(next(iter(places)), root) or _list_images(config, root)
    stores = [
        StorePlan(info, spec, store, len(images) * spec.record_bytes, free_bytes(store))
        for store, (info, spec) in places.items()
    ]
    return BuildPlan(images, model_path, tuple(stores), device)


def _list_images(config: BuildConfig, root: Path) -> ImageList:
    """The images that lie there, or as many as the options say."""
    images = open_dataset(root, config.layout)
    return images if config.limit is None else images.spread(config.limit)


def _list_stored(store: Location, root: Path) -> ImageList | None:
    """The images of a store that another build created, so that not every part of it looks through all folders."""
    try:
        return list_images_of(ActivationStore(store), root) if root.exists() else None
    except StoreNotFoundError:
        return None


def require_shard_memory(plan: BuildPlan, shard_images: int, batch_size: int) -> None:
    """Refuse shards and batches that do not fit into memory: one shard is written while the next is computed.

    Args:
        plan: The build.
        shard_images: Images per shard.
        batch_size: Images per forward pass.

    Raises:
        NotEnoughMemoryError: If they do not.
    """
    n_at_once = min(batch_size, shard_images)
    pixels = n_at_once * 3 * plan.info.image_size**2 * (1 + torch.float32.itemsize)
    shards = _SHARDS_AT_ONCE * shard_images * sum(item.spec.record_bytes for item in plan.stores)
    what = f"building shards of {say_count(shard_images, 'image')} in batches of {n_at_once:,}"
    require_memory(pixels + shards, available_ram(), what, "Lower --shard_images or --batch_size")


def _describe_blocks(config: BuildConfig, model_path: Path, weights_digest: str | None) -> list[BackboneInfo]:
    """The checkpoint, once for each block.

    Raises:
        UserError: If the network in the package is given the name of another.
    """
    is_embedded = model_path == EMBEDDED_MODEL
    infos = describe_blocks(
        model_path,
        name=None if is_embedded else config.model_name,
        blocks=config.block_layer,
        weights_digest=weights_digest,
        preprocessing=stated_preprocessing(config),
    )
    if is_embedded and config.model_name not in (None, infos[0].name):
        raise UserError(
            f"model_path embedded is the network {infos[0].name}, found model_name {config.model_name}: leave out "
            "--model_name, or name another checkpoint with --model_path"
        )
    return infos


def stated_preprocessing(config: StorePlace) -> StatedTransform:
    """What the options say of the preprocessing.

    Raises:
        UserError: If the size is beyond what an encoder can be given.
    """
    if config.image_size is not None and config.image_size > MAX_IMAGE_SIZE:
        raise UserError(f"image_size must be at most {MAX_IMAGE_SIZE}, found {config.image_size}")
    return StatedTransform(
        size=config.image_size, mean=config.image_mean, std=config.image_std, resample=config.image_resample
    )


def make_spec(info: BackboneInfo, *, store_dtype: StoreDtype, precision: Precision, white_level: int = 0) -> StoreSpec:
    """The spec of a backbone's activations."""
    return StoreSpec(
        model_name=info.name,
        weights_sha256=info.weights_sha256,
        block=info.block % info.n_blocks,
        n_blocks=info.n_blocks,
        d_model=info.d_model,
        tokens=TokenLayout(info.n_cls, info.n_registers, info.grid),
        preprocessing=Preprocessing(
            image_size=info.image_size,
            resample=f"pillow-{info.resample}",
            mean=info.image_mean,
            std=info.image_std,
            scale=info.image_scale,
            white_level=white_level,
        ),
        store_dtype=store_dtype,
        precision=precision,
    )
