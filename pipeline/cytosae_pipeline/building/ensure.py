"""The store that a verb needs: found, finished, or built first where everything needed was given."""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from cytosae.backbones.weights import weights_sha256
from cytosae_cache.errors import StoreNotFoundError
from cytosae_cache.format.spec import Preprocessing
from cytosae_cache.joined_store import require_different
from cytosae_cache.reading.concat import check_same_spec
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.build import build_and_open
from cytosae_pipeline.config import BuildConfig, StoreSource
from cytosae_pipeline.workspace.find import find_store, require_finished
from cytosae_pipeline.workspace.paths import resolve_model_path

logger = logging.getLogger(__name__)


def ensure_store(
    config: StoreSource,
    *,
    spec_hash: str | None = None,
    default_block: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> ActivationStore:
    """The complete store that the options mean; a missing or unfinished one is built first if that is possible.

    Args:
        config: The verb's options.
        spec_hash: Spec of the store that the autoencoder was trained on, which takes precedence.
        default_block: Block of the autoencoder, used for building.
        preprocessing: Preprocessing of the images that the autoencoder was trained on, used for building where the
            options say nothing.

    Raises:
        StoreNotFoundError: If there is no store and no checkpoint or images to build it from.
        StoreIncompleteError: If it is unfinished and cannot be finished from the options.
        ClusterError: If it is built on the cluster that the options name, which cannot be used.
    """
    digest = _hash_weights(config)
    try:
        store = find_store(config, weights_sha256=digest, spec_hash=spec_hash)
        if store.complete or digest is None:
            require_finished(store, config)
            return store
        logger.info(f"store '{store.path}' is unfinished: finishing it first")
    except StoreNotFoundError:
        if digest is None or config.store is not None:
            raise
        logger.info(f"no activation store of data set '{config.dataset_name}' yet: building it first")
    block = config.block_layer if default_block is None else default_block
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(StoreSource)}
    if preprocessing is not None:
        trained = (preprocessing.image_size, preprocessing.mean, preprocessing.std)
        own: dict[str, object] = dict(zip(("image_size", "image_mean", "image_std"), trained, strict=True))
        own["image_resample"] = preprocessing.resample.removeprefix("pillow-")
        own["white_level"] = preprocessing.white_level or None
        shared |= {name: value for name, value in own.items() if shared[name] is None}
    # On the cluster that the verb uses, if it uses one: its workers need the images and the checkpoint.
    shared |= {"block_layer": (block,), "dask": getattr(config, "dask", None)}
    store = build_and_open(BuildConfig(**shared), weights_digest=digest)[0]
    require_finished(store, config)
    return store


def ensure_stores(
    config: StoreSource,
    with_dataset: Sequence[str],
    *,
    spec_hash: str | None = None,
    default_block: int | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[ActivationStore, ...]:
    """The store that the options mean, and those of further data sets of the same encoder: see `ensure_store`.

    Args:
        config: The verb's options.
        with_dataset: Names of the further data sets, each with images of its own.
        spec_hash: As for `ensure_store`; of several stores of a further data set, the one like the first is taken.
        default_block: As for `ensure_store`.
        preprocessing: As for `ensure_store`.

    Raises:
        StoreMismatchError: If a store was given twice, or their encoders differ.
        StoreNotFoundError: As for `ensure_store`.
        StoreIncompleteError: As for `ensure_store`.
        ClusterError: As for `ensure_store`.
    """
    first = ensure_store(config, spec_hash=spec_hash, default_block=default_block, preprocessing=preprocessing)
    if not with_dataset:
        return (first,)
    spec = first.spec
    block = config.block_layer if spec.imported else spec.block - spec.n_blocks
    further = [
        ensure_store(
            replace(config, dataset_name=name, store=None, images=None, block_layer=block),
            spec_hash=spec.hash, default_block=default_block, preprocessing=spec.preprocessing,
        )
        for name in with_dataset
    ]  # fmt: skip
    stores = (first, *further)
    require_different(stores)
    check_same_spec(stores)
    return stores


def _hash_weights(config: StoreSource) -> str | None:
    """Hash of the checkpoint that was named, so that a store of other weights is never mistaken for its own."""
    path = resolve_model_path(config.model_path)
    if path is None:
        return None
    if not path.exists():
        logger.info(f"checkpoint '{path}' does not exist; relying on the stores' own records instead")
        return None
    return weights_sha256(path)
