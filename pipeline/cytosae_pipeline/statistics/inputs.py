"""What a statistic is computed from: an autoencoder and the store it fits, opened once and passed on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cytosae.backbones.errors import shown
from cytosae.formats.checkpoint import LoadedSae, SaeNotFoundError, digest_sae, load_sae
from cytosae.formats.foreign import Activation
from cytosae.sae.base import Sae
from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.building.ensure import ensure_store
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.config.commands import command
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import choose_device
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

_HARMLESS = ("precision:", "store_dtype:", "model_name:")
"""Differences between specs that are roundings of the same activations, or only names."""


@dataclass(frozen=True)
class Inputs:
    """An autoencoder and a store, opened."""

    store: ActivationStore
    """A complete store."""
    sae: Sae
    """The autoencoder, on its device; without its decoder if `open_inputs` was told so."""
    sae_cfg: dict[str, Any]
    """The config in its file."""
    sae_sha256: str
    """SHA-256 of its file."""
    folder: Path
    """Folder of the outputs."""

    @property
    def n_latents(self) -> int:
        """Latents S."""
        return int(self.sae.W_enc.shape[1])


def open_inputs(config: StatisticsConfig, *, encoder_only: bool = True) -> Inputs:
    """Open the autoencoder and the store it fits; a missing store is built first if that is possible.

    Args:
        config: The verb's options.
        encoder_only: Leave out the decoder, which most statistics do not need.

    Raises:
        ValueError: If no autoencoder was named, it cannot be read, or the store does not fit it.
    """
    path = require_sae_path(config)
    sae, cfg = open_sae(config, device=choose_device(config.device), encoder_only=encoder_only)
    spec_hash, block = cfg.get("spec_hash"), cfg.get("block_layer")
    trained = StoreSpec.from_json(cfg["spec"]).preprocessing if "spec" in cfg else None
    default_block = block if isinstance(block, int) else None
    store = ensure_store(config, spec_hash=spec_hash, default_block=default_block, preprocessing=trained)
    differences = check_match(store, sae, cfg)
    if differences and not config.allow_mismatch:
        raise StoreMismatchError(
            f"store '{store.path}' differs from the one that '{path}' was trained on (store, autoencoder): "
            + "; ".join(differences)
            + ". Build one that fits, or give --allow-mismatch if you know that this does not matter"
        )
    for difference in differences:
        logger.info(f"ignoring a mismatch (store, autoencoder): {difference}")
    folder = Workspace(config.root_dir).feature_dir(path, config.vit_type, store.provenance.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    return Inputs(store, sae, cfg, digest_sae(path, stated_activation(config)), folder)


def open_sae(config: StatisticsConfig, *, device: torch.device | str, encoder_only: bool = False) -> LoadedSae:
    """Read the autoencoder that the options name.

    Args:
        config: The verb's options.
        device: Device of the autoencoder.
        encoder_only: Leave out the decoder.

    Raises:
        ValueError: If no autoencoder was named, or it cannot be read.
    """
    path, activation = require_sae_path(config), stated_activation(config)
    try:
        return load_sae(path, device=device, encoder_only=encoder_only, activation=activation)
    except SaeNotFoundError as error:
        listed = command("list", config, ("root_dir",))
        raise SaeNotFoundError(f"no autoencoder at '{path}'. List existing ones with: {listed}") from error


def require_sae_path(config: StatisticsConfig) -> Path:
    """The path of the autoencoder.

    Raises:
        UserError: If none was given.
    """
    if config.sae_path is None:
        raise UserError("name the autoencoder: --sae_path out/checkpoints/RUN/final_sparse_autoencoder_....pt")
    return config.sae_path


def check_match(store: ActivationStore, sae: Sae, cfg: dict[str, Any]) -> list[str]:
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
    if "spec" not in cfg:
        return []
    theirs = StoreSpec.from_json(cfg["spec"])
    return [shown(line, 200) for line in store.spec.differences(theirs) if not line.startswith(_HARMLESS)]


def stated_activation(config: StatisticsConfig) -> Activation | None:
    """What the options state about the autoencoder; None if they state nothing."""
    return None if config.sae_arch is None else Activation(config.sae_arch, config.sae_k, config.sae_threshold)
