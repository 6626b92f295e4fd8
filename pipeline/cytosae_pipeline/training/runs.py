"""Training runs: what is fixed before the first step, where files go, and how a run is found again."""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cytosae.sae.registry import make_sae
from cytosae.sae.world import ALONE, World
from cytosae.training.matmul import MatmulConfig
from cytosae_cache.format.spec import canonical_json
from cytosae_cache.store import ActivationStore
from cytosae_pipeline import __version__
from cytosae_pipeline.building.ensure import ensure_stores
from cytosae_pipeline.config import TrainConfig
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.config.train import OF_ARCHITECTURES, without_foreign
from cytosae_pipeline.errors import UserError, say_count
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.training.init import choose_tokens
from cytosae_pipeline.training.matmul import (
    TRAINING_PRECISIONS,
    Products,
    choose_matmul,
    choose_products,
    read_products,
)
from cytosae_pipeline.workspace.find import IMPORTED
from cytosae_pipeline.workspace.paths import Workspace, checkpoint_name, file_part, final_name, short_name
from cytosae_pipeline.workspace.runs import CONFIG_NAME, STATE_NAMES, read_config, run_folders

logger = logging.getLogger(__name__)

NOT_THE_RECIPE = {
    "root_dir", "store", "model_path", "images", "layout", "vit_type", "run_name", "resume", "device", "no_verify",
    "resident", "log_to_wandb", "tensorboard", "wandb_project", "wandb_entity", "clip_dim", "preset", "split",
}  # fmt: skip
"""Options that do not change the numbers: they are not part of the run's identity nor of anything that is shared."""

_PART_IF_GIVEN = (
    "lr_warm_up_share", "adam_beta1", "adam_beta2", "encoder_lr_factor", "weight_decay", "input_noise",
    "pre_act_coefficient",
)  # fmt: skip
"""Options of later versions: left out of the recipe at their default, so that older runs keep their names."""


class TrainingError(UserError):
    """Training cannot start or continue; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """A training run: everything fixed before the first step."""

    config: TrainConfig
    """Options as `filled` gives them, with what was derived: `precision`, `dead_feature_window`."""
    stores: tuple[ActivationStore, ...]
    """The stores, trained on as one."""
    folder: Path
    """Folder of all its files."""
    recipe: dict[str, Any]
    """What determines the numbers, as plain JSON values, without any path, label or patient."""
    device: torch.device
    """Device."""
    products: Products
    """How matrix products are computed; the same since its first step."""
    world: World = ALONE
    """The processes that train it together."""

    @property
    def store(self) -> ActivationStore:
        """The first of its stores; all have the same spec."""
        return self.stores[0]

    @property
    def contents(self) -> list[str]:
        """Identities of the contents of its stores; they may change while the recipe stays the same."""
        return [store.contents for store in self.stores]

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return self.config.expansion_factor * self.store.d_model

    @property
    def revive_after_steps(self) -> int:
        """Steps without firing after which a latent is revived."""
        assert self.config.dead_feature_window is not None
        return self.config.dead_feature_window

    @property
    def n_steps(self) -> int:
        """Steps; the last batch may be smaller."""
        return -(-self.config.total_training_tokens // self.config.batch_size)

    @property
    def token_ranks(self) -> World:
        """Processes that have other images of every batch."""
        return self.world if self.config.split == "data" else ALONE

    @property
    def latent_ranks(self) -> World:
        """Processes that hold other latents."""
        return self.world if self.config.split == "latents" else ALONE

    @property
    def batch_images(self) -> int:
        """Images of this process' largest batch: there may be fewer than the batch size."""
        return -(-min(self.config.batch_size, self.config.total_training_tokens) // self.token_ranks.size)

    @property
    def matmul(self) -> MatmulConfig:
        """How a step computes its matrix products."""
        return choose_matmul(self.products, self.device, self.config.max_memory)

    @property
    def state_paths(self) -> tuple[Path, Path]:
        """States from which an interrupted run is resumed: the newest and the one before it."""
        newest, before = STATE_NAMES
        return self.folder / newest, self.folder / before

    @property
    def block_name(self) -> str:
        """The block in names of files, counted from the end as `--block_layer` does."""
        return IMPORTED if self.store.spec.imported else str(self.config.block_layer)

    @property
    def final_path(self) -> Path:
        """The finished autoencoder; exists only after the last step."""
        name, module = self.store.spec.model_name, self.config.module_name
        # Earlier versions wrote the option's default where embeddings were imported and no block was meant.
        earlier = self.folder / final_name(name, str(self.config.block_layer), module, self.n_latents)
        return earlier if earlier.exists() else self.folder / final_name(name, self.block_name, module, self.n_latents)

    def checkpoint_path(self, n_images: int) -> Path:
        """An intermediate autoencoder."""
        name, module = self.store.spec.model_name, self.config.module_name
        return self.folder / checkpoint_name(n_images, name, self.block_name, module, self.n_latents)


def prepare_run(
    config: TrainConfig, stores: tuple[ActivationStore, ...] | None = None, products: Products | None = None
) -> Run:
    """Find the stores and choose the run's name; nothing of the run is written.

    Args:
        config: Options.
        stores: Its stores, if they were found before.
        products: How its products are computed, if another process has chosen that.

    Raises:
        StoreMismatchError: If the stores' specs differ.
        TrainingError: If the options do not fit the stores.
    """
    workspace = Workspace(config.root_dir)
    if config.resume is not None:
        config = _resumed_config(config, workspace)
    device = choose_device(config.device)
    config = config.filled()
    stores = stores or ensure_stores(config, config.with_dataset)
    store = stores[0]
    if config.clip_dim not in (None, store.d_model):
        raise TrainingError(
            f"--clip_dim {config.clip_dim} was given, but store '{store.path}' has activations of width "
            f"{store.d_model} ({store.spec.model_name}). Omit --clip_dim, or choose another store"
        )
    if config.trained_on == "cls" and not store.spec.tokens.n_cls:
        name = "--class_token" if config.class_token else "--tokens cls"
        raise TrainingError(f"{name} was given, but {store.spec.model_name} has no CLS token")
    if config.trained_on == "patches" and not math.prod(store.spec.tokens.grid):
        raise TrainingError(f"--tokens patches was given, but images of store '{store.path}' have no patches")
    n_latents = config.expansion_factor * store.d_model
    try:  # the architecture checks its settings
        _check_k(config, n_latents)
        make_sae(config.arch, store.d_model, n_latents, device="meta", k=config.k, bandwidth=config.bandwidth)
    except ValueError as error:
        raise TrainingError(
            f"{error}. --expansion_factor {config.expansion_factor} at width {store.d_model} gives {n_latents} "
            "latents: change --k or --expansion_factor"
        ) from error
    tokens = choose_tokens(
        torch.empty(1, store.n_tokens, 1, device="meta"), choice=config.trained_on, layout=store.spec.tokens
    )
    window = config.revive_after_steps(n_latents, tokens.shape[1])
    config = replace(config, dead_feature_window=window)
    if products is not None:
        return replace(_make_run(replace(config, precision=products.precision), stores, device), products=products)
    return _with_products(config, stores, device)


def prepare_together(config: TrainConfig, world: World, stores: tuple[ActivationStore, ...] | None = None) -> Run:
    """`prepare_run` by several processes: rank 0 first, which builds a missing store and chooses the products.

    Args:
        config: Options.
        world: The processes.
        stores: Its stores, if they were found before.

    Raises:
        TrainingError: If a rank finds another store than rank 0.
    """
    if world.size == 1:
        if config.split != "data":
            logger.warning(f"--split {config.split} changes nothing: torchrun has not started several processes")
        return prepare_run(config, stores)
    run = prepare_run(config, stores) if not world.rank else None
    chosen = world.gather_texts(json.dumps(asdict(run.products)) if run is not None else "")[0]
    if run is None:
        value = json.loads(chosen)
        run = prepare_run(config, stores, read_products(value, Products(value["precision"], 0.0)))
    if run.config.split == "data" and (n_idle := world.size - run.config.batch_size) > 0:
        logger.warning(
            f"batches of {say_count(run.config.batch_size, 'image')} leave {n_idle} of {world.size} processes without "
            "work: raise --batch_size"
        )
    k, n_own = run.config.k or 1, run.n_latents // world.size
    if run.config.split == "latents" and k > n_own:
        raise TrainingError(
            f"--split latents gives each of {world.size} processes {n_own:,} of {run.n_latents:,} latents, fewer than "
            f"--k {k}. Start fewer processes, or give --split data"
        )
    found = [json.loads(text) for text in world.gather_texts(json.dumps([run.recipe, run.contents]))]
    if found[0] != found[world.rank]:
        raise TrainingError(
            f"rank {world.rank} finds other activations in '{run.store.path}' than rank 0: all processes must read the "
            "same stores, from a shared disk or from equal copies"
        )
    return run


def _with_products(config: TrainConfig, stores: tuple[ActivationStore, ...], device: torch.device) -> Run:
    """The run, with products as its folder says if it was begun before, or else as this machine computes them best."""
    # What was measured may have changed since a run was begun; the run must be found all the same.
    precisions = TRAINING_PRECISIONS if config.precision == "auto" else (config.precision,)
    runs = [_make_run(replace(config, precision=precision), stores, device) for precision in precisions]
    for run in runs:
        kept = _kept_products(run)
        if kept is not None:
            return replace(run, products=kept)
    chosen = choose_products(config.precision, device, stores[0].d_model)
    return next(replace(run, products=chosen) for run in runs if run.products.precision == chosen.precision)


def _make_run(config: TrainConfig, stores: tuple[ActivationStore, ...], device: torch.device) -> Run:
    """The run of a precision, with products that nothing was measured for."""
    recipe = _make_recipe(config, stores)
    digest = hashlib.sha256(canonical_json(recipe)).hexdigest()[:8]
    datasets = short_name("+".join(file_part(store.provenance.dataset) for store in stores))
    folder = Workspace(config.root_dir).run_dir(config.run_name or f"{datasets}-{digest}")
    return Run(config, stores, folder, recipe, device, choose_products(config.precision, device, stores[0].d_model))


def _kept_products(run: Run) -> Products | None:
    """How the products of a run that was begun are computed; None if it was not, or with another precision."""
    with contextlib.suppress(ValueError):  # what is damaged is reported where the run is claimed
        record = read_config(run.folder) if (run.folder / CONFIG_NAME).exists() else {"recipe": {}}
        if record["recipe"].get("precision") == run.products.precision:
            return read_products(record.get("products"), run.products)
    return None


def _make_recipe(config: TrainConfig, stores: tuple[ActivationStore, ...]) -> dict[str, Any]:
    """What determines a run's numbers, as plain JSON values."""
    store, further = stores[0], stores[1:]
    values = json.loads(json.dumps(asdict(config), default=str))
    fields = TrainConfig.__dataclass_fields__
    left_out = {*NOT_THE_RECIPE, *(name for name in _PART_IF_GIVEN if values[name] == fields[name].default)}
    recipe = {name: value for name, value in values.items() if name not in left_out}
    # Defaults of other architectures as well: they are part of every run's hash.
    recipe |= {name: value for name, value in OF_ARCHITECTURES.items() if recipe[name] is None}
    recipe |= {
        "dataset_name": store.provenance.dataset,
        "model_name": store.spec.model_name,
        "d_in": store.d_model,
        "n_latents": config.expansion_factor * store.d_model,
        "spec": store.spec.to_json(),
        "spec_hash": store.spec.hash,
        "list_digest": store.provenance.list_digest,
        "with_dataset": [store.provenance.dataset for store in further],
        "with_list_digest": [store.provenance.list_digest for store in further],
    }
    return recipe


def sae_cfg(run: Run) -> dict[str, Any]:
    """The config in an autoencoder's file."""
    return {**run.recipe, "contents": run.contents, "package_version": __version__, "run_name": run.folder.name}


def require_same_contents(run: Run, found: object) -> None:
    """Refuse to go on with a run whose stores were made again since from other images.

    Args:
        run: The run.
        found: What it recorded of its stores' contents; None if an older version began it, which recorded nothing.

    Raises:
        TrainingError: If they are others.
    """
    if found is None or found == run.contents:
        return
    before = found if isinstance(found, list) and len(found) == len(run.stores) else [None] * len(run.stores)
    changed = next(store for store, contents in zip(run.stores, before, strict=True) if store.contents != contents)
    raise TrainingError(
        f"run '{run.folder.name}' was trained on other activations: store '{changed.path}' was made again since, with "
        f"other contents. Choose another --run_name, or move '{run.folder}' away to train from scratch"
    )


def _check_k(config: TrainConfig, n_latents: int) -> None:
    """Raise ValueError if an architecture with a setting k is to keep more latents active than there are.

    Here rather than in every class: files of autoencoders that were trained to such a k must stay readable.
    """
    if config.k is not None and config.k > n_latents:
        raise ValueError(f"k must be a whole number from 1 to the {n_latents} latents, found {config.k}")


def differing_options(found: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """Names of what differs between two recipes, sorted; options that the architecture does not have are ignored."""
    found, recipe = (without_foreign(recipe["arch"], item) for item in (found, recipe))
    return sorted(name for name in {*found, *recipe} if found.get(name) != recipe.get(name))


def _resumed_config(config: TrainConfig, workspace: Workspace) -> TrainConfig:
    """The options of an interrupted run, read back from its folder."""
    assert config.resume is not None
    folder = workspace.run_dir(config.resume)
    there = [path.name for path in run_folders(workspace)]
    if folder.name not in there:
        raise TrainingError(
            f"no run '{config.resume}' in '{workspace.checkpoints_dir}'. There are: {', '.join(there) or 'none'}"
            + suggest(config.resume, there)
        )
    try:
        record = read_config(folder)
        # Options of later versions were off, whatever a preset makes of them by now.
        defaults = {name: field.default for name, field in TrainConfig.__dataclass_fields__.items()}
        options = defaults | record["options"]
        for name in ("model_path", "images"):
            options[name] = Path(options[name]) if options[name] is not None else None
        options["with_dataset"] = tuple(options.get("with_dataset", ()))
        # Another machine may have another device and less memory; the numbers must stay the same.
        options["precision"] = record["recipe"].get("precision", "fp32")
        options |= {"device": config.device, "resident": config.resident, "split": config.split}
        options |= {"root_dir": config.root_dir, "run_name": config.resume, "resume": None}
        return TrainConfig(**without_foreign(options["arch"], options))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"'{folder / CONFIG_NAME}' has no options of train"
        raise TrainingError(
            f"run '{config.resume}' cannot be resumed by its name: {reason}. Give its options again, with --run_name "
            f"{config.resume} instead of --resume"
        ) from error
