"""Finding the store that a verb's options mean."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from cytosae_cache.errors import StoreError, StoreIncompleteError, StoreMismatchError, StoreNotFoundError
from cytosae_cache.format.spec import Preprocessing, StoreSpec
from cytosae_cache.store import ActivationStore, iter_stores
from cytosae_pipeline.config import ImportConfig, StoreChoice, TrainConfig
from cytosae_pipeline.config.commands import WHICH_IMAGES, WHICH_STORE, command
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.config.store import StorePlace
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.workspace.build_record import RECORDED, find_build
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

IMPORTED = "imported"
"""What stands in place of the block where embeddings were imported."""

_MOST_EPOCHS = 100  # of the training that is suggested for a small store


def find_store(
    choice: StoreChoice, *, weights_sha256: str | None = None, spec_hash: str | None = None
) -> ActivationStore:
    """The one store that the options mean, finished or not.

    Args:
        choice: The verb's options.
        weights_sha256: If given, only stores made with these weights count.
        spec_hash: If given, a store with this spec takes precedence.

    Raises:
        StoreNotFoundError: If there is none; the message says which exist and what to type.
        StoreMismatchError: If several fit.
        StoreError: If none fits and one is damaged.
        UserError: If neither a name nor a path was given.
    """
    if choice.store is not None:
        try:
            return ActivationStore(choice.store)
        except StoreNotFoundError as error:
            listed = command("list", choice, ("root_dir",))
            raise StoreNotFoundError(
                f"no activation store at '{choice.store}' (no zarr.json there). List existing stores with: {listed}"
            ) from error
    name = require_dataset(choice)
    stores, damaged = _open_stores(Workspace(choice.root_dir).stores_dir(name))
    fitting = [store for store in stores if _fits(store.spec, choice, weights_sha256)]
    exact = [store for store in fitting if store.spec.hash == spec_hash]
    fitting = exact or fitting
    if not fitting and damaged:
        raise damaged[0]
    if not fitting:
        raise StoreNotFoundError(_not_found_message(choice, name, stores, weights_sha256))
    finished = [store for store in fitting if store.complete]
    if len(finished) == 1 and len(fitting) > 1:
        ignored = ", ".join(f"'{store.path}'" for store in fitting if not store.complete)
        logger.info(f"taking the finished store '{finished[0].path}'; unfinished, and not used: {ignored}")
        fitting = finished
    if len(fitting) > 1:
        several_models = len({store.spec.model_name for store in fitting}) > 1
        raise StoreMismatchError(
            f"{len(fitting)} stores of data set '{name}' fit; choose one with --store PATH"
            f"{' or --model_name NAME' * several_models}:\n{list_stores(fitting)}"
        )
    return fitting[0]


def require_finished(store: ActivationStore, choice: StoreChoice) -> None:
    """Refuse an unfinished store with the command that finishes it.

    Args:
        store: The store.
        choice: The verb's options, by which the store was found.

    Raises:
        StoreIncompleteError: If the store's build has not finished.
    """
    if store.complete:
        return
    written = f"{store.n_finished_shards} of {say_count(store.n_shards, 'shard')} written"
    if store.spec.imported:
        raise StoreIncompleteError(
            f"store '{store.path}' is unfinished: {written}. "
            f"Finish it by running the same `cytosae-cache import` command again"
        )
    raise StoreIncompleteError(
        f"store '{store.path}' is unfinished: {written}. "
        f"Finish it with the options that its build was given: {build_again_command(store, choice)}"
    )


def list_stores(stores: Sequence[ActivationStore]) -> str:
    """One line per store: what distinguishes it from the others."""
    return "\n".join(
        f"  {shlex.quote(str(store.path))}  {store.spec.model_name} {describe_block(store.spec)} "
        f"{store.spec.precision} {store.spec.store_dtype} {_describe_size(store.spec)}"
        f"{say_count(store.n_images, 'image')}" + ("" if store.complete else " (unfinished)")
        for store in stores
    )


def describe_block(spec: StoreSpec) -> str:
    """Which block's output a store contains, counted from the end as `--block_layer` does, or that it was imported."""
    return IMPORTED if spec.imported else f"block {spec.block - spec.n_blocks}"


def _describe_size(spec: StoreSpec) -> str:
    """Size of the images that the encoder saw, if it saw any."""
    return "" if spec.imported else f"{spec.preprocessing.image_size} px "


def training_command(store: ActivationStore, config: StorePlace | ImportConfig) -> str:
    """The command that trains on a store that was just made; it finds this store and no other.

    A small store would be passed over thousands of times by default; the command then says for how long to train.

    Args:
        store: The complete store.
        config: Options that it was made with.
    """
    block = store.spec.block - store.spec.n_blocks
    is_default = store.spec.imported or block == StoreChoice.__dataclass_fields__["block_layer"].default
    names = [name for name in WHICH_STORE if name != "block_layer" and hasattr(config, name)]
    options: dict[str, object] = {} if is_default else {"block_layer": block}
    try:
        chosen = StoreChoice(**{name: getattr(config, name) for name in names} | options)
        is_found = find_store(chosen).path == store.path
    except (StoreMismatchError, StoreNotFoundError):
        is_found = False
    if not is_found:
        options["store"] = store.path
    n_images = int(store.valid.sum())
    if n_images * _MOST_EPOCHS < TrainConfig().total_training_tokens:
        options["total_training_tokens"] = n_images * _MOST_EPOCHS
    return command("train", config, names, **options)


def build_again_command(store: ActivationStore, choice: StoreChoice, **options: object) -> str:
    """The command that builds a store again, with the options that its build was given where the workspace knows them.

    Args:
        store: The store, built from images.
        choice: Options by which it was found.
        **options: Further options.
    """
    build, block = find_build(store, choice.root_dir), store.spec.block - store.spec.n_blocks
    if build is None:
        return _build_command(choice, dataset_name=store.provenance.dataset, block_layer=block, **options)
    place = Workspace(choice.root_dir).store_path(store.provenance.dataset, store.spec.hash)
    if isinstance(store.path, str) or store.path.resolve() != place.resolve():
        options |= {"store": store.path, "block_layer": block}
    return command("build", build, ("root_dir", "dataset_name", *RECORDED), **options)


def require_dataset(choice: StorePlace) -> str:
    """The data set's name.

    Raises:
        UserError: If none was given.
    """
    if choice.dataset_name is None:
        listed = command("list", choice, ("root_dir",))
        raise UserError(f"name the data set: --dataset_name NAME, or give a store's path (see: {listed})")
    return choice.dataset_name


def _open_stores(folder: Path) -> tuple[list[ActivationStore], list[StoreError]]:
    """The stores of a data set that can be opened, and the errors of the others, which are said."""
    stores, damaged = [], []
    for path in filter(_is_store, iter_stores(folder)):
        try:
            stores.append(ActivationStore(path))
        except StoreError as error:
            logger.warning(f"left out: {error}")
            damaged.append(error)
    return stores, damaged


def _is_store(path: Path) -> bool:
    """Whether a build got as far as laying out the store."""
    return (path / "zarr.json").is_file()


def _fits(spec: StoreSpec, choice: StoreChoice, weights_sha256: str | None) -> bool:
    """Whether the options allow a store."""
    block = choice.block_layer if choice.block_layer >= 0 else spec.n_blocks + choice.block_layer
    return (
        (spec.imported or spec.block == block)
        and spec.module == choice.module_name
        and choice.model_name in (None, spec.model_name)
        and weights_sha256 in (None, spec.weights_sha256)
        and (spec.imported or _is_prepared(spec.preprocessing, choice))
    )


def _is_prepared(found: Preprocessing, choice: StoreChoice) -> bool:
    """Whether a store's images were prepared as the options say, as far as they say it."""
    resample = choice.image_resample and f"pillow-{choice.image_resample}"
    stated = (choice.image_size, choice.image_mean, choice.image_std, resample, choice.white_level)
    values = (found.image_size, found.mean, found.std, found.resample, found.white_level)
    return all(wanted in (None, value) for wanted, value in zip(stated, values, strict=True))


def _not_found_message(
    choice: StoreChoice, name: str, stores: Sequence[ActivationStore], weights_sha256: str | None
) -> str:
    """What was looked for, what exists, and what to type."""
    workspace = Workspace(choice.root_dir)
    wanted = [f"block_layer {choice.block_layer}"]
    wanted += [f"model_name {choice.model_name}"] if choice.model_name else []
    wanted += [f"weights {weights_sha256[:12]}"] if weights_sha256 else []
    options = {
        name: getattr(choice, name)
        for name in ("image_size", "image_mean", "image_std", "image_resample", "white_level")
    }
    wanted += [f"{name} {value}" for name, value in options.items() if value is not None]
    if stores:
        existing = f". There are others:\n{list_stores(stores)}\n"
    else:
        existing = f"; this data set has no stores{suggest(name, workspace.datasets_with_stores()) or '.'} "
    return (
        f"no activation store for {', '.join(wanted)} in '{workspace.stores_dir(name)}'{existing}"
        f"Build it with: {_build_command(choice)}"
    )


def _build_command(choice: StoreChoice, **options: object) -> str:
    """The command that builds a store; words in capitals stand for what is not known here."""
    unknown = {"images": "PATH", "model_path": "CHECKPOINT"}
    asked = {option: getattr(choice, option, None) or text for option, text in unknown.items()}
    return command("build", choice, (*WHICH_STORE, *WHICH_IMAGES), **asked, **options)
