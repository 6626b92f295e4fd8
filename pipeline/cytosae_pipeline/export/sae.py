"""`export` of an autoencoder in the format of another program."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cytosae.formats.checkpoint import load
from cytosae.formats.reference import write_reference
from cytosae.formats.saelens import SAELENS_CONFIG, SAELENS_WEIGHTS, write_saelens
from cytosae.formats.tensor_file import write_safetensors
from cytosae.sae.base import Sae
from cytosae_cache.storage.atomic import make_folder, remove_strays, replacing_path
from cytosae_cache.storage.file_set import replacing_set, undo_set
from cytosae_cache.storage.lock import locked
from cytosae_pipeline.config import ExportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.inputs import open_sae, require_sae_path
from cytosae_pipeline.workspace.paths import sae_stem
from cytosae_pipeline.workspace.runs import resolve_sae
from cytosae_pipeline.workspace.targets import resolve_target

_ENDINGS = {"saelens": ".saelens", "safetensors": ".safetensors", "reference": ".reference.pt"}
_FILE_WRITERS = {"safetensors": write_safetensors, "reference": write_reference}


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote."""

    path: Path
    """The file or folder."""
    format: str
    """Its format."""
    architecture: str
    """The autoencoder's architecture."""
    d_in: int
    """Width D."""
    n_latents: int
    """Latents S."""


def export_sae(config: ExportConfig) -> ExportResult:
    """Write an autoencoder in another format, and read it back before reporting success.

    Raises:
        UserError: If the target exists already.
        StoreBusyError: If another process is writing it.
        WriteError: If the disk is full, read-only or fails; what was there before is unchanged.
        SaeCheckpointError: If the autoencoder cannot be read.
        InteropError: If the format cannot represent it.
    """
    if config.of_data_set:
        raise UserError(f"format {config.format} is for statistics, not for an autoencoder: use run_export")
    config = resolve_sae(config)
    sae_path, sae = require_sae_path(config), open_sae(config, device="cpu")
    path = config.out or sae_path.with_name(sae_stem(sae_path) + _ENDINGS[config.format])
    if config.format == "safetensors" and path.suffix != ".safetensors":
        raise UserError(f"--out '{path}' must end in .safetensors, from which the format is detected")
    target = resolve_target(path)
    make_folder(target.parent)
    wanted, cfg = sae.state_dict(), {} if sae.source is None else sae.source.cfg
    with locked(target.with_name(f"{target.name}.lock"), str(path)):
        _require_free(path, config)
        if config.format == "saelens":
            _write_folder(target, sae, cfg)
            wanted = sae.from_saelens(sae.to_saelens()[1])
        else:
            with replacing_path(target) as temporary:
                _FILE_WRITERS[config.format](temporary, sae, cfg)
        found = load(path).state_dict()
    for name, tensor in wanted.items():
        if not torch.equal(found[name], tensor):
            raise UserError(f"'{path}' contains another {name} than was written: check the disk")
    d_in, n_latents = sae.W_enc.shape
    return ExportResult(path, config.format, sae.architecture, d_in, n_latents)


def _require_free(path: Path, config: ExportConfig) -> None:
    """Refuse a target that must not be replaced.

    Raises:
        UserError: If it exists, unless `overwrite` allows it and the format writes such a thing.
    """
    if path.exists() and not config.overwrite:
        raise UserError(f"'{path}' exists already. Give another --out, or --overwrite")
    if path.exists() and path.is_dir() != (config.format == "saelens"):
        raise UserError(f"'{path}' is not what --format {config.format} writes. Give another --out")


def _write_folder(folder: Path, sae: Sae, cfg: dict[str, Any]) -> None:
    """Write a folder of SAELens: the whole folder in one step, or its two files together if others are in it."""
    # The config comes first: every reader refuses a folder that has a config alone.
    files = [folder / SAELENS_CONFIG, folder / SAELENS_WEIGHTS]
    undo_set(files)
    if not folder.exists() or {path.name for path in folder.iterdir()} <= {path.name for path in files}:
        with replacing_path(folder) as temporary:
            write_saelens(temporary, sae, cfg)
        return
    remove_strays(folder)
    with replacing_set(files) as temporaries:
        places = dict(zip(files, temporaries, strict=True))
        write_saelens(folder, sae, cfg, write=lambda path, data: places[path].write_bytes(data))
