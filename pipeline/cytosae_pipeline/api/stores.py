"""Stores in Python: `build`, `import` and `verify`."""

from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import VerifyReport
from cytosae_pipeline.api.options import takes_options
from cytosae_pipeline.building.build import build_and_open
from cytosae_pipeline.building.build import build_stores as run_builds
from cytosae_pipeline.building.deep_verify import check_store
from cytosae_pipeline.config import BuildConfig, ImportConfig, VerifyConfig
from cytosae_pipeline.importing.store import import_embeddings as run_import


@takes_options(BuildConfig)
def build_store(options: BuildConfig) -> ActivationStore:
    """Run the vision transformer over a data set once, and open the store: the verb `build`.

    A complete store is returned at once; an interrupted build is resumed. Images that could not be read are `False` in
    `store.valid`. The first access to `store.images` reads their names.

    Returns:
        The store; complete (`store.complete`), unless `shards` asks for one part and others are missing.

    Raises:
        ValueError: If the data set, the checkpoint or an existing store does not fit; the message says what to do.
        OSError: If the disk with the images fails; finished work is kept.
    """
    return build_and_open(options)[0]


@takes_options(BuildConfig)
def build_stores(options: BuildConfig) -> list[ActivationStore]:
    """`build_store` for several blocks from one pass of the network: `block_layer=(-4, -2)`.

    Returns:
        The stores, in the order of `block_layer`; complete as for `build_store`.

    Raises:
        ValueError: As for `build_store`.
        OSError: As for `build_store`.
    """
    return [ActivationStore(result.store) for result in run_builds(options)]


@takes_options(ImportConfig)
def import_embeddings(options: ImportConfig) -> ActivationStore:
    """Turn embeddings that you already have into a store: the verb `import`.

    Returns:
        The complete store.

    Raises:
        ValueError: If the files cannot be read or do not fit together; the message says what to do.
    """
    return ActivationStore.open(run_import(options).store)


@takes_options(VerifyConfig, leave_out=("layout", "vit_type"))
def verify_store(options: VerifyConfig) -> VerifyReport:
    """Check every file and checksum of a store: the verb `verify`.

    Returns:
        What was found; `report.sound` is true if nothing is wrong.

    Raises:
        ValueError: If there is no such store, or it is unfinished.
    """
    return check_store(options)[1]
