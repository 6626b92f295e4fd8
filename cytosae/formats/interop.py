"""Autoencoders in the formats of other programs: SAELens, plain safetensors, and the reference's checkpoint.

Each format is written and read. Writing is plain; a caller that needs an atomic or durable write wraps it.
"""

import contextlib
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cytosae.sae.base import Sae
from cytosae.sae.registry import ARCHITECTURES, saelens_defaults

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""Files of a SAELens folder, which `SAE.load_from_disk` opens."""

SAELENS_VERSION = "6.0.0"
"""Oldest version whose folders SAELens reads without guessing their defaults."""

_CFG_KEY = "cytosae_cache"
"""Key of the whole config in files of other formats."""

_REFERENCE_MODULE, _REFERENCE_CLASS = "src.sae_training.config", "ViTSAERunnerConfig"
_MAX_CONFIG_BYTES = 1 << 22


class InteropError(ValueError):
    """A file of another format cannot be read, or a format cannot represent an autoencoder."""


def to_saelens(sae: Sae, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`cfg.json` and the tensors of a SAELens folder.

    Saved autoencoders take raw activations, so no scaling has to be folded in.

    Args:
        sae: The autoencoder.
        cfg: The config in its file.

    Raises:
        InteropError: If SAELens has no such architecture.
    """
    if sae.saelens_architecture is None:
        raise InteropError(f"SAELens has no architecture for {sae.architecture}: use --format safetensors")
    more, state = sae.to_saelens()
    d_in, n_latents = sae.W_enc.shape
    config = {
        "architecture": sae.saelens_architecture,
        "d_in": d_in,
        "d_sae": n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": cfg.get("model_name"),
            "hook_name": f"blocks.{cfg.get('block_layer')}.hook_resid_post",
            _CFG_KEY: {**cfg, "arch": sae.architecture, "settings": sae.settings},
        },
    }
    return config | more, state


def from_saelens(config: object, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`cfg` and `state_dict` of our own file format from the parts of a SAELens folder.

    Raises:
        InteropError: If the config is not one of SAELens, or if it treats activations in a way that we do not support.
    """
    if not isinstance(config, dict):
        raise InteropError(f"{SAELENS_CONFIG} must contain an object, found {type(config).__name__}")
    for name, wanted in (
        ("normalize_activations", "none"), ("reshape_activations", "none"), ("apply_b_dec_to_input", True),
        ("rescale_acts_by_decoder_norm", False),
    ):  # fmt: skip
        if config.get(name, wanted) != wanted:
            raise InteropError(f"{SAELENS_CONFIG} has {name} {config[name]!r}; only {wanted!r} is supported")
    theirs, defaults = config.get("architecture"), saelens_defaults()
    if not isinstance(theirs, str) or theirs not in defaults:
        raise InteropError(f"{SAELENS_CONFIG} has architecture {theirs!r}; known are {', '.join(defaults)}")
    metadata = config.get("metadata")
    cfg = metadata.get(_CFG_KEY) if isinstance(metadata, dict) else None
    kind = ARCHITECTURES.get(str(cfg.get("arch"))) if isinstance(cfg, dict) else None
    if not isinstance(cfg, dict) or kind is None or kind.saelens_architecture != theirs:
        kind = defaults[theirs]
        cfg = {"arch": kind.architecture, "settings": kind.settings_from_saelens(config), "saelens": config}
    try:
        return {"cfg": cfg, "state_dict": kind.from_saelens(state)}
    except ValueError as error:
        raise InteropError(str(error)) from error


def write_saelens(
    folder: Path, sae: Sae, cfg: Mapping[str, Any], *, write: Callable[[Path, bytes], object] = Path.write_bytes
) -> None:
    """Write a folder that SAELens 6 opens with `SAE.load_from_disk`; other files of the folder stay.

    Args:
        folder: Created if missing.
        sae: The autoencoder.
        cfg: Its config.
        write: Writes one file. The config comes last, so a folder with it is complete if every write is atomic.

    Raises:
        InteropError: If SAELens does not have the architecture.
    """
    config, state = to_saelens(sae, cfg)
    weights, text = save(state), json.dumps(config, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / SAELENS_WEIGHTS, weights)
    write(folder / SAELENS_CONFIG, text.encode())


def write_safetensors(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write one safetensors file: tensors under our names, the config as JSON in its metadata. Not atomic."""
    plain = {**cfg, "arch": sae.architecture, "settings": sae.settings}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    path.write_bytes(save(state, metadata={_CFG_KEY: json.dumps(plain)}))


def write_reference(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write a checkpoint that CytoSAE's own code can unpickle. Not atomic.

    Raises:
        InteropError: If the reference does not have the architecture.
    """
    checkpoint = reference_checkpoint(sae, cfg)
    with _reference_class() as kind:
        record = kind()
        vars(record).update(checkpoint["cfg"])
        # Through a file object: given a path, torch would write its name into the archive.
        with path.open("wb") as file:
            torch.save({**checkpoint, "cfg": record}, file)


def reference_checkpoint(sae: Sae, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's checkpoint, with the config as a dict; `write_reference` turns it into the reference's class.

    Raises:
        InteropError: If the reference does not have the architecture.
    """
    if not sae.fits_reference:
        raise InteropError(
            f"the reference has no {sae.architecture} autoencoders: use --format saelens or --format safetensors"
        )
    d_in, n_latents = sae.W_enc.shape
    values = {name: value for name, value in cfg.items() if name not in ("spec", "settings", "evaluation")}
    values |= {
        "d_in": d_in,
        "d_sae": n_latents,
        "expansion_factor": n_latents / d_in if n_latents % d_in else n_latents // d_in,
        "dtype": torch.float32,
        "device": "cpu",
        "seed": cfg.get("seed", 42),
        "l1_coefficient": cfg.get("l1_coefficient", 0.0),
        # Kept for reading the file back; the reference ignores it.
        _CFG_KEY: json.dumps({**cfg, "arch": sae.architecture, "settings": sae.settings}),
    }
    state = OrderedDict((name, tensor.detach().cpu().contiguous()) for name, tensor in sae.state_dict().items())
    return {"cfg": values, "state_dict": state}


@contextlib.contextmanager
def _reference_class() -> Iterator[type]:
    """A class with the name of the reference's config class, importable by the pickler inside the context."""
    parts = _REFERENCE_MODULE.split(".")
    kind = type(_REFERENCE_CLASS, (), {"__module__": _REFERENCE_MODULE})
    names = [".".join(parts[: number + 1]) for number in range(len(parts))]
    before = {name: sys.modules.get(name) for name in names}
    modules = {name: types.ModuleType(name) for name in names}
    setattr(modules[_REFERENCE_MODULE], _REFERENCE_CLASS, kind)
    sys.modules.update(modules)
    try:
        yield kind
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def unwrap_cfg(cfg: object) -> object:
    """Our own config from one that `reference_checkpoint` made; any other config unchanged."""
    if isinstance(cfg, dict) and isinstance(cfg.get(_CFG_KEY), str):
        with contextlib.suppress(ValueError):
            return json.loads(cfg[_CFG_KEY])
    return cfg


def read_saelens(folder: Path) -> dict[str, Any]:
    """`cfg` and `state_dict` of a SAELens folder.

    Raises:
        InteropError: If a file is missing, damaged or not supported.
    """
    path = folder / SAELENS_CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise InteropError(f"{SAELENS_CONFIG} has more than {_MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(), parse_constant=str)
    except (OSError, ValueError, RecursionError) as error:
        raise InteropError(f"{SAELENS_CONFIG} cannot be read: {error}") from error
    return from_saelens(config, _read_tensors(folder / SAELENS_WEIGHTS)[1])


def read_safetensors(path: Path) -> dict[str, Any]:
    """`cfg` and `state_dict` of a file that `write_safetensors` wrote.

    Raises:
        InteropError: If it is damaged or has no config of this package.
    """
    metadata, state = _read_tensors(path)
    try:
        cfg = json.loads(metadata[_CFG_KEY], parse_constant=str)
    except (KeyError, ValueError, RecursionError) as error:
        raise InteropError(
            f"its metadata has no config under '{_CFG_KEY}': it is not an export of cytosae-cache"
        ) from error
    return {"cfg": cfg, "state_dict": state}


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file; the library checks every offset against the file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # Copied: they are views of the mapped file, and truncating it later would crash the process.
            state = {name: file.get_tensor(name).clone() for name in names}
            return file.metadata() or {}, state
    except (OSError, SafetensorError, ValueError) as error:
        raise InteropError(f"{path.name} cannot be read: {error}") from error
