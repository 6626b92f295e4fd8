"""Finding the store that a verb means, or building it first when everything needed is at hand."""

import logging
from collections.abc import Sequence
from pathlib import Path

from cytosae_cache.errors import StoreMismatchError, StoreNotFoundError
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.store import ActivationStore, iter_stores
from cytosae_pipeline.config import BuildConfig, StoreChoice, StoreSource
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.listing import ImageList, ImageRow
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)


def find_store(
    choice: StoreChoice, *, weights_sha256: str | None = None, spec_hash: str | None = None
) -> ActivationStore:
    """The one store that the options mean, finished or not.

    Args:
        choice: The verb's options.
        weights_sha256: If given, only stores made with these weights count.
        spec_hash: If given, a store with this spec wins over others.

    Raises:
        StoreNotFoundError: If there is none; the message says what there is and what to type.
        StoreMismatchError: If several fit.
        UserError: If neither a name nor a path was given.
    """
    if choice.store is not None:
        return ActivationStore(choice.store)
    name = require_dataset(choice)
    stores = [
        ActivationStore(path) for path in iter_stores(Workspace(choice.root_dir).stores_dir(name)) if _is_store(path)
    ]
    fitting = [store for store in stores if _fits(store.spec, choice, weights_sha256)]
    exact = [store for store in fitting if store.spec.hash == spec_hash]
    fitting = exact or fitting
    if not fitting:
        raise StoreNotFoundError(_not_found_message(choice, name, stores, weights_sha256))
    if len(fitting) > 1:
        raise StoreMismatchError(
            f"{len(fitting)} stores of data set '{name}' fit; choose one with --store PATH or narrow down with "
            f"--model_name:\n{list_stores(fitting)}"
        )
    return fitting[0]


def ensure_store(
    config: StoreSource, *, spec_hash: str | None = None, default_block: int | None = None
) -> ActivationStore:
    """The complete store that the options mean; a missing or unfinished one is built first if that can be done.

    Args:
        config: The verb's options.
        spec_hash: Spec of the store that the autoencoder was trained on, which wins over others.
        default_block: Block of the autoencoder, used for building.

    Raises:
        StoreNotFoundError: If there is no store and no checkpoint or images to build it from.
        StoreIncompleteError: If it is unfinished and cannot be finished from the options.
    """
    weights = _hash_weights(config)
    try:
        store = find_store(config, weights_sha256=weights, spec_hash=spec_hash)
        if store.complete or weights is None:
            return ActivationStore.open(store.path)
        logger.info(f"store '{store.path}' is unfinished: finishing it first")
    except StoreNotFoundError:
        if weights is None or config.store is not None:
            raise
        logger.info(f"no activation store of data set '{config.dataset_name}' yet: building it first")
    from cytosae_pipeline.building.build import build_store

    block = config.block_layer if default_block is None else default_block
    shared = {name: getattr(config, name) for name in StoreSource.__dataclass_fields__}
    result = build_store(BuildConfig(**{**shared, "block_layer": block}))
    return ActivationStore.open(result.store)


def list_stores(stores: Sequence[ActivationStore]) -> str:
    """A line a store: what tells it from the others."""
    return "\n".join(
        f"  {store.path}  {store.spec.model_name} block {store.spec.block - store.spec.n_blocks} "
        f"{store.spec.precision} {store.n_images:,} images" + ("" if store.complete else " (unfinished)")
        for store in stores
    )


def require_dataset(choice: StoreChoice) -> str:
    """The data set's name.

    Raises:
        UserError: If none was given.
    """
    if choice.dataset_name is None:
        raise UserError("say which data set: --dataset_name NAME, or give a store's path (see: cytosae-cache list)")
    return choice.dataset_name


def list_stored_images(store: ActivationStore, source: StoreSource) -> ImageList | None:
    """The images of a store's own table where they lie now; None if that place is not there.

    Args:
        store: The store.
        source: Says where the images are, if not in the data set's folder.
    """
    root = source.images or Workspace(source.root_dir).dataset_dir(store.provenance.dataset)
    if not root.exists():
        return None
    # Straight from the store's own table: its rows are sorted already.
    table = tuple(ImageRow(*names) for names in zip(*store.images, strict=True))
    return ImageList(root.parent if root.is_file() else root, table, "store")


def embedded_model_path() -> Path:
    """Checkpoint of the small vision transformer that is part of the package."""
    return Path(__file__).parents[1] / "assets" / "cytosae_tiny14.pth"


def resolve_model_path(path: Path | None) -> Path | None:
    """The checkpoint's path, with the word `embedded` standing for the one in the package."""
    return embedded_model_path() if path == Path("embedded") else path


def _hash_weights(config: StoreSource) -> str | None:
    """Hash of the checkpoint that was named, so that a store of other weights is never taken for its own."""
    path = resolve_model_path(config.model_path)
    if path is None:
        return None
    if not path.exists():
        logger.info(f"checkpoint '{path}' is not there; going by the stores' own records instead")
        return None
    from cytosae.backbones.backbone import weights_sha256

    return weights_sha256(path)


def _is_store(path: Path) -> bool:
    """Whether a build got as far as laying out the store."""
    return (path / "zarr.json").is_file()


def _fits(spec: StoreSpec, choice: StoreChoice, weights_sha256: str | None) -> bool:
    """Whether a store is one that the options allow."""
    return (
        spec.block == (choice.block_layer if choice.block_layer >= 0 else spec.n_blocks + choice.block_layer)
        and spec.module == choice.module_name
        and choice.model_name in (None, spec.model_name)
        and weights_sha256 in (None, spec.weights_sha256)
    )


def _not_found_message(
    choice: StoreChoice, name: str, stores: Sequence[ActivationStore], weights_sha256: str | None
) -> str:
    """What was looked for, what there is, and what to type."""
    folder = Workspace(choice.root_dir).stores_dir(name)
    wanted = [f"block_layer {choice.block_layer}"]
    wanted += [f"model_name {choice.model_name}"] if choice.model_name else []
    wanted += [f"weights {weights_sha256[:12]}"] if weights_sha256 else []
    there = f" There are others:\n{list_stores(stores)}\n" if stores else " There is none at all. "
    return (
        f"no activation store for {', '.join(wanted)} in '{folder}'.{there}"
        f"Build it with: cytosae-cache build --root_dir '{choice.root_dir}' --dataset_name {name} "
        f"--block_layer {choice.block_layer} --images PATH --model_path CHECKPOINT"
    )
