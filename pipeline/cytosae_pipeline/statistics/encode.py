"""One pass of the encoder over a store, feeding accumulators: the core of `features`, `classes` and `patients`."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cytosae.formats.checkpoint import load_sae, weights_file
from cytosae.sae.base import Sae
from cytosae.statistics.accumulators import BLOCK_IMAGES, BlockEncoder, PooledActs
from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.spec import StoreSpec
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.storage.atomic import write_file
from cytosae_cache.store import ActivationStore
from cytosae_pipeline import __version__
from cytosae_pipeline.config import StatisticsConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.runtime.devices import DTYPES, choose_device
from cytosae_pipeline.runtime.memory import available_ram
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.training.placement import exceeds_page_cache
from cytosae_pipeline.workspace.find import ensure_store
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """What a statistic works on."""

    store: ActivationStore
    """A complete store."""
    sae: Sae
    """The autoencoder, on its device; without its decoder unless that was asked for."""
    sae_cfg: dict[str, Any]
    """What its file says of it."""
    sae_sha256: str
    """Hash of its file."""
    folder: Path
    """Where the outputs go."""


def open_inputs(config: StatisticsConfig, *, encoder_only: bool = True) -> Inputs:
    """Open the autoencoder and the store it fits, building a missing store first if that can be done.

    Args:
        config: The verb's options.
        encoder_only: Leave the decoder out, which most statistics do not need.

    Raises:
        ValueError: If no autoencoder was named, it cannot be read, or the store does not fit it.
    """
    if config.sae_path is None:
        raise UserError("say which autoencoder: --sae_path out/checkpoints/RUN/final_sparse_autoencoder_....pt")
    device = choose_device(config.device)
    sae, cfg = load_sae(config.sae_path, device=device, encoder_only=encoder_only)
    spec_hash, block = cfg.get("spec_hash"), cfg.get("block_layer")
    store = ensure_store(config, spec_hash=spec_hash, default_block=block if isinstance(block, int) else None)
    differences = check_match(store, sae, cfg)
    if differences and not config.allow_mismatch:
        raise StoreMismatchError(
            f"store '{store.path}' is not of the kind that '{config.sae_path}' was trained on (store, autoencoder): "
            + "; ".join(differences)
            + ". Build one that fits, or give --allow-mismatch if you know that this does not matter"
        )
    for difference in differences:
        logger.info(f"ignoring a mismatch (store, autoencoder): {difference}")
    folder = Workspace(config.root_dir).feature_dir(config.sae_path, config.vit_type, store.provenance.dataset)
    folder.mkdir(parents=True, exist_ok=True)
    with weights_file(config.sae_path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Inputs(store, sae, cfg, digest, folder)


def check_match(store: ActivationStore, sae: Sae, cfg: dict[str, Any]) -> list[str]:
    """In what a store differs from the one an autoencoder was trained on; empty if nothing is known to differ.

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
    harmless = ("precision:", "store_dtype:", "model_name:")
    return [line for line in store.spec.differences(theirs) if not line.startswith(harmless)]


def run_pass(
    inputs: Inputs,
    config: StatisticsConfig,
    thresholds: Sequence[float],
    consume: Callable[[torch.Tensor, PooledActs], None],
    *,
    what: str,
) -> None:
    """Encode every valid image once and hand over its scores and counts.

    Args:
        inputs: Store and autoencoder.
        config: Batch size, precision, and whether checksums are checked.
        thresholds: Thresholds of the counts.
        consume: Called with row numbers, int64, shape `(n,)`, and their reduction.
        what: Name of the work.
    """
    store = inputs.store
    dtype = DTYPES["fp32" if config.precision == "auto" else config.precision]
    encoder = BlockEncoder(inputs.sae, thresholds, dtype=dtype)
    block_rows = -(-config.batch_size // BLOCK_IMAGES) * BLOCK_IMAGES
    with (
        StoreReader(store, verify=not config.no_verify, direct=exceeds_page_cache([store], available_ram())) as reader,
        Progress(what, store.n_images, "images") as bar,
    ):
        for block in iter_row_blocks(reader, block_rows=block_rows):
            reduction = encoder.reduce(torch.from_numpy(block.activations), block.first)
            valid = torch.from_numpy(block.valid.nonzero()[0])
            here = valid.to(reduction.scores.device)
            consume(valid + block.first, PooledActs(reduction.scores[here], reduction.counts[:, here]))
            bar.advance(len(block.valid))


def withdraw_record(inputs: Inputs, verb: str) -> None:
    """Remove a verb's record before its outputs change, so that a record that is there tells of whole outputs."""
    (inputs.folder / f"{verb}.json").unlink(missing_ok=True)


def write_record(inputs: Inputs, config: StatisticsConfig, verb: str, **more: Any) -> Path:  # noqa: ANN401 - JSON values
    """Write beside the outputs what they were made from, as JSON."""
    path = inputs.folder / f"{verb}.json"
    record = {
        "verb": verb,
        "package_version": __version__,
        "sae_sha256": inputs.sae_sha256,
        "store_spec_hash": inputs.store.spec.hash,
        "store_list_digest": inputs.store.provenance.list_digest,
        "dataset": inputs.store.provenance.dataset,
        "precision": config.precision,
        **more,
    }
    write_file(path, (json.dumps(record, indent=1) + "\n").encode())
    return path
