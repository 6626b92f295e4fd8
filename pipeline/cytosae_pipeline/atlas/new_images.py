"""The store of new images, which must be made as the atlas' own was."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cytosae.backbones.registry import ARCHITECTURES as ENCODERS
from cytosae.backbones.weights import weights_sha256
from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.atlas.contents import Atlas
from cytosae_pipeline.building.build import build_and_open
from cytosae_pipeline.building.plan import plan_build
from cytosae_pipeline.config import ApplyConfig, BuildConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.inputs import differences_of_specs
from cytosae_pipeline.workspace.paths import resolve_model_path

logger = logging.getLogger(__name__)

_WORK = "activations.work"
_DATASET = "new"


@contextmanager
def open_new_store(config: ApplyConfig, atlas: Atlas, folder: Path) -> Iterator[ActivationStore]:
    """The store of the new images: that of the options, or one that is built in the folder and removed at the end.

    If building is interrupted, what is built stays there, and the same command resumes it.

    Args:
        config: Options.
        atlas: The atlas, whose spec the store must have.
        folder: Folder of the outputs.

    Raises:
        StoreMismatchError: If the store, or the one that would be built, has another spec.
        ValueError: If images or checkpoint are missing or cannot be used.
    """
    if config.store is not None:
        store = ActivationStore.open(config.store)
        require_spec(f"store '{store.path}'", store.spec, config, atlas)
        yield store
        return
    if atlas.spec.imported:
        raise UserError(
            f"atlas '{config.atlas}' is of embeddings that another program computed: import those of the new images "
            "with `cytosae-cache import`, and give the store with --store"
        )
    work = folder / _WORK
    options = _build_options(config, atlas.spec, work)
    digest = None
    path = resolve_model_path(config.model_path)
    if path is not None and path.exists():
        digest = weights_sha256(path)
    plan = plan_build(options, weights_digest=digest)
    require_spec(f"'{config.model_path}'", plan.stores[0].spec, config, atlas)
    store, _ = build_and_open(options, weights_digest=digest)
    yield store
    store.close()
    shutil.rmtree(work, ignore_errors=True)


def require_spec(what: str, found: StoreSpec, config: ApplyConfig, atlas: Atlas) -> None:
    """Refuse activations that are not made as those of the atlas; the type of numbers may differ.

    Raises:
        StoreMismatchError: If they differ, unless `allow_mismatch` is set and the shapes are equal.
    """
    differences = differences_of_specs(found, atlas.spec)
    if found.d_model != atlas.spec.d_model or (differences and not config.allow_mismatch):
        raise StoreMismatchError(
            f"{what} does not give the activations that atlas '{config.atlas}' is of (found, atlas): "
            f"{'; '.join(differences)}. Give the vision transformer '{atlas.spec.model_name}' with weights "
            f"{atlas.spec.weights_sha256[:12]}, or a store of it"
        )
    for difference in differences:
        logger.info(f"ignoring a mismatch (found, atlas): {difference}")


def _build_options(config: ApplyConfig, spec: StoreSpec, work: Path) -> BuildConfig:
    """How the activations of new images are computed: as those of the atlas were."""
    images = spec.preprocessing
    name = spec.model_name if spec.model_name in ENCODERS else None
    return BuildConfig(
        root_dir=work,
        dataset_name=_DATASET,
        images=config.images,
        layout=config.layout,
        model_path=config.model_path,
        model_name=name,
        block_layer=(spec.block - spec.n_blocks,),
        image_size=images.image_size,
        image_mean=images.mean,
        image_std=images.std,
        image_resample=images.resample.removeprefix("pillow-"),  # type: ignore[arg-type] # checked by the record
        white_level=images.white_level or None,
        store_dtype=spec.store_dtype,
        precision=spec.precision,
        device=config.device,
        workers=config.workers,
    )
