"""What a statistic is computed from: an autoencoder and the store it fits, opened once and passed on."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from cytosae.backbones.errors import shown
from cytosae.formats.checkpoint import SaeNotFoundError, digest_sae, load
from cytosae.formats.readers import find_files
from cytosae.sae.base import Sae
from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.storage.atomic import make_folder
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.ensure import ensure_stores
from cytosae_pipeline.config import SaeChoice
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.config.store import JoinChoice
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.shortage import require_memory
from cytosae_pipeline.statistics.data_sets import join_data_sets
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.workspace.paths import Workspace
from cytosae_pipeline.workspace.runs import LATEST, suggest_sae

logger = logging.getLogger(__name__)

_HARMLESS = ("precision:", "store_dtype:", "model_name:")
"""Differences between specs that are roundings of the same activations, or only names."""


@dataclass(frozen=True)
class Inputs:
    """An autoencoder and a store that fit together."""

    store: ActivationStore
    """A complete store."""
    sae: Sae
    """The autoencoder, on its device; without its decoder if it was opened so."""

    @cached_property
    def sae_cfg(self) -> dict[str, Any]:
        """The config in the autoencoder's file; empty if it was made in memory."""
        return {} if self.sae.source is None else self.sae.source.cfg

    @cached_property
    def sae_sha256(self) -> str:
        """SHA-256 of the autoencoder's file, or of its tensors if it was made in memory."""
        return digest_sae(self.sae) if self.sae.source is None else self.sae.source.sha256

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return int(self.sae.W_enc.shape[1])

    @cached_property
    def labels(self) -> LabelIndex:
        """Names of the labels, and the label of each row."""
        return LabelIndex.of(self.store.images.label)

    @cached_property
    def patients(self) -> LabelIndex:
        """Names of the patients, and the patient of each row."""
        return LabelIndex.of(self.store.images.patient)


@dataclass(frozen=True)
class PlacedInputs(Inputs):
    """An autoencoder and a store, and where a verb writes what it computes from them."""

    folder: Path
    """Folder of the outputs."""


def open_inputs(config: SaeChoice, *, encoder_only: bool = True) -> PlacedInputs:
    """`open_pair`, and the folder of the results, which is made.

    Args:
        config: The verb's options.
        encoder_only: Leave out the decoder, which most statistics do not need.

    Raises:
        ValueError: As for `open_pair`.
    """
    pair = open_pair(config, encoder_only=encoder_only)
    folder = Workspace(config.root_dir).feature_dir(
        require_sae_path(config), config.vit_type, pair.store.provenance.dataset
    )
    make_folder(folder)
    return PlacedInputs(pair.store, pair.sae, folder)


def open_pair(config: SaeChoice, *, encoder_only: bool = True) -> Inputs:
    """Open the autoencoder and the store it fits; a missing store is built first if that is possible.

    Args:
        config: The verb's options.
        encoder_only: Leave out the decoder.

    Raises:
        ValueError: If no autoencoder was named, it cannot be read, or the store does not fit it.
    """
    # On a cluster the workers encode; this machine may have no such device, or lend it to one of them.
    here = encoder_only and getattr(config, "dask", None) is not None
    sae = open_sae(config, device=choose_device("cpu" if here else config.device), encoder_only=encoder_only)
    cfg = {} if sae.source is None else sae.source.cfg
    spec_hash, block = cfg.get("spec_hash"), cfg.get("block_layer")
    trained = StoreSpec.from_json(cfg["spec"]).preprocessing if "spec" in cfg else None
    default_block = block if isinstance(block, int) else None
    with_dataset = config.with_dataset if isinstance(config, JoinChoice) else ()
    stores = ensure_stores(
        config, with_dataset, spec_hash=spec_hash, default_block=default_block, preprocessing=trained
    )
    store = join_data_sets(stores, config.joined_patients) if isinstance(config, JoinChoice) else stores[0]
    require_match(store, sae, allow_mismatch=config.allow_mismatch)
    return Inputs(store, sae)


def open_sae(config: SaeChoice, *, device: torch.device | str, encoder_only: bool = False) -> Sae:
    """Read the autoencoder that the options name.

    Args:
        config: The verb's options.
        device: Device of the autoencoder.
        encoder_only: Leave out the decoder.

    Raises:
        ValueError: If no autoencoder was named, or it cannot be read.
    """
    path = require_sae_path(config)
    stated = {"sae_arch": config.sae_arch, "sae_k": config.sae_k, "sae_threshold": config.sae_threshold}
    try:
        return read_sae(path, device=device, encoder_only=encoder_only, **stated)
    except SaeNotFoundError as error:
        listed = command("list", config, ("root_dir",))
        near = suggest_sae(path, config.root_dir) or "."
        raise SaeNotFoundError(f"no autoencoder at '{path}'{near} List existing ones with: {listed}") from error


def read_sae(path: Path, **options: Any) -> Sae:  # noqa: ANN401 - of `load`
    """`load`, after a look at the size of the file, which is read as a whole.

    Args:
        path: As for `load`.
        **options: As for `load`.

    Raises:
        NotEnoughMemoryError: If the autoencoder does not fit into memory.
        ValueError: As for `load`.
    """
    files = find_files(path)
    if files is not None and files.weights.is_file():
        require_memory(
            files.weights.stat().st_size, available_ram(), f"reading the autoencoder '{path}'",
            "Choose one with fewer latents, or a machine with more memory",
        )  # fmt: skip
    return load(path, **options)


def require_sae_path(config: SaeChoice) -> Path:
    """The path of the autoencoder.

    Raises:
        UserError: If none was given.
    """
    if config.sae_path is None:
        listed = command("list", config, ("root_dir",))
        raise UserError(
            f"name the autoencoder: --sae_path {LATEST} for the newest finished run, or a run's name, or the path of a "
            f"file (see: {listed})"
        )
    return config.sae_path


def require_match(store: ActivationStore, sae: Sae, *, allow_mismatch: bool = False) -> None:
    """Refuse a store that differs from the one an autoencoder was trained on.

    Raises:
        StoreMismatchError: If it differs, unless `allow_mismatch` is set and the widths are equal.
    """
    differences = find_differences(store, sae)
    if differences and not allow_mismatch:
        raise StoreMismatchError(
            f"store '{store.path}' differs from the one that {describe_sae(sae)} was trained on (store, autoencoder): "
            + "; ".join(differences)
            + ". Build one that fits, or give --allow-mismatch if you know that this does not matter"
        )
    for difference in differences:
        logger.info(f"ignoring a mismatch (store, autoencoder): {difference}")


def describe_sae(sae: Sae) -> str:
    """The path of an autoencoder, in quotes, if it has one."""
    return "the autoencoder" if sae.source is None else f"'{sae.source.path}'"


def find_differences(store: ActivationStore, sae: Sae) -> list[str]:
    """Differences between a store and the one an autoencoder was trained on; empty if none is known.

    Precision and store dtype may differ: they are roundings of the same activations.

    Raises:
        StoreMismatchError: If the widths differ, so that the autoencoder cannot be applied at all.
    """
    width = sae.W_enc.shape[0]
    if width != store.d_model:
        raise StoreMismatchError(
            f"the autoencoder takes activations of width {width}, store '{store.path}' has width {store.d_model}: "
            "they belong to different vision transformers"
        )
    cfg = {} if sae.source is None else sae.source.cfg
    if "spec" not in cfg:
        return []
    return differences_of_specs(store.spec, StoreSpec.from_json(cfg["spec"]))


def differences_of_specs(here: StoreSpec, theirs: StoreSpec) -> list[str]:
    """Differences between two specs that are more than roundings or names, as `name: here, theirs`."""
    return [shown(line, 200) for line in here.differences(theirs) if not line.startswith(_HARMLESS)]
