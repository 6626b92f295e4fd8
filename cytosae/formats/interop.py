"""Autoencoders in other programs' formats: SAELens, plain safetensors, and the reference's checkpoint. Both ways."""

import contextlib
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cytosae.formats.atomic import write_atomically, write_torch_atomically
from cytosae.sae.base import Sae

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
"""Files of a folder that SAELens writes and `SAE.load_from_disk` opens."""

SAELENS_VERSION = "6.0.0"
"""Oldest SAELens that takes such a folder as it is; a missing or older number makes it guess."""

_CFG_KEY = "cytosae_cache"
"""Where files of other formats keep the whole config."""

_TO_SAELENS = {
    "relu": "standard", "topk": "topk", "batchtopk": "jumprelu", "matryoshka": "jumprelu", "jumprelu": "jumprelu",
    "gated": "gated",
}  # fmt: skip
_FROM_SAELENS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_RENAMED = {"b_enc": "b_gate"}
"""Parameters of the gated architecture that SAELens calls otherwise."""

_REFERENCE_MODULE, _REFERENCE_CLASS = "src.sae_training.config", "ViTSAERunnerConfig"
_MAX_CONFIG_BYTES = 1 << 22


class ExchangeError(ValueError):
    """A file of another format cannot be read, or an autoencoder has no place in it."""


def to_saelens(sae: Sae, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`cfg.json` and the tensors of a SAELens folder.

    Thresholds go out as they act: batchtopk and matryoshka become JumpReLU with one threshold for all latents, and one
    below 0 becomes 0. Nothing is left to fold: saved autoencoders take raw activations.

    Args:
        sae: The autoencoder.
        cfg: What its file says of it.
    """
    state = {name: tensor.detach().cpu().float().contiguous() for name, tensor in sae.state_dict().items()}
    if "threshold" in state:
        state["threshold"] = torch.relu(state["threshold"]).expand_as(state["b_enc"]).contiguous()
    if sae.architecture == "gated":
        state = {_RENAMED.get(name, name): tensor for name, tensor in state.items()}
    d_in, n_latents = sae.W_enc.shape
    config = {
        "architecture": _TO_SAELENS[sae.architecture],
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
    if sae.architecture == "topk":
        config |= {"k": sae.settings["k"], "rescale_acts_by_decoder_norm": False}
    return config, state


def from_saelens(config: object, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """`cfg` and `state_dict` as our own files hold them, from the parts of a SAELens folder.

    Raises:
        ExchangeError: If the config is none, or says that activations are treated in a way that we have no place for.
    """
    if not isinstance(config, dict):
        raise ExchangeError(f"{SAELENS_CONFIG} must hold an object, found {type(config).__name__}")
    for name, wanted in (
        ("normalize_activations", "none"), ("reshape_activations", "none"), ("apply_b_dec_to_input", True),
        ("rescale_acts_by_decoder_norm", False),
    ):  # fmt: skip
        if config.get(name, wanted) != wanted:
            raise ExchangeError(f"{SAELENS_CONFIG} has {name} {config[name]!r}; only {wanted!r} can be used")
    metadata = config.get("metadata")
    cfg = metadata.get(_CFG_KEY) if isinstance(metadata, dict) else None
    architecture = config.get("architecture")
    known = _FROM_SAELENS.get(architecture) if isinstance(architecture, str) else None
    if known is None:
        raise ExchangeError(f"{SAELENS_CONFIG} has architecture {architecture!r}; known are {', '.join(_FROM_SAELENS)}")
    if not isinstance(cfg, dict) or _TO_SAELENS.get(str(cfg.get("arch"))) != architecture:
        settings = {"k": config.get("k")} if known == "topk" else {}
        cfg = {"arch": known, "settings": settings, "saelens": config}
    tensors = dict(state)
    if known == "gated":
        back = {new: old for old, new in _RENAMED.items()}
        tensors = {back.get(name, name): tensor for name, tensor in tensors.items()}
    threshold = tensors.get("threshold")
    if cfg["arch"] in ("batchtopk", "matryoshka") and threshold is not None:
        if threshold.ndim != 1 or not len(threshold) or (threshold != threshold[0]).any():
            raise ExchangeError(f"{cfg['arch']} has one threshold for all latents, found several")
        tensors["threshold"] = threshold[0].clone()
    return {"cfg": cfg, "state_dict": tensors}


def write_saelens(folder: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write a folder that SAELens 6 opens with `SAE.load_from_disk`; the config comes last and completes it."""
    config, state = to_saelens(sae, cfg)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=1) + "\n"
    write_atomically(folder / SAELENS_WEIGHTS, lambda file: file.write(save(state)))
    write_atomically(folder / SAELENS_CONFIG, lambda file: file.write(text.encode()))


def write_safetensors(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write one safetensors file: tensors under our own names, the config as JSON in its metadata."""
    plain = {**cfg, "arch": sae.architecture, "settings": sae.settings}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    write_atomically(path, lambda file: file.write(save(state, metadata={_CFG_KEY: json.dumps(plain)})))


def write_reference(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write a checkpoint as CytoSAE's own code unpickles it.

    Raises:
        ExchangeError: If the architecture is not the reference's.
    """
    checkpoint = reference_checkpoint(sae, cfg)
    with _reference_class() as kind:
        record = kind()
        vars(record).update(checkpoint["cfg"])
        write_torch_atomically(path, {**checkpoint, "cfg": record})


def reference_checkpoint(sae: Sae, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference's checkpoint holds, but for the config's class; `write_reference` adds it.

    Raises:
        ExchangeError: If the architecture is not the reference's.
    """
    if sae.architecture != "relu":
        raise ExchangeError(
            f"the reference knows relu autoencoders alone, found {sae.architecture}: "
            "use --format saelens or --format safetensors"
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
        # Kept for the way back; the reference does not look at it.
        _CFG_KEY: json.dumps({**cfg, "arch": sae.architecture, "settings": sae.settings}),
    }
    state = OrderedDict((name, tensor.detach().cpu().contiguous()) for name, tensor in sae.state_dict().items())
    return {"cfg": values, "state_dict": state}


@contextlib.contextmanager
def _reference_class() -> Iterator[type]:
    """The class of the reference's config, known to the pickler by its name for as long as this lasts."""
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
    """Our own config out of one that `reference_checkpoint` made; any other as it is."""
    if isinstance(cfg, dict) and isinstance(cfg.get(_CFG_KEY), str):
        with contextlib.suppress(ValueError):
            return json.loads(cfg[_CFG_KEY])
    return cfg


def read_saelens(folder: Path) -> dict[str, Any]:
    """`cfg` and `state_dict` of a SAELens folder.

    Raises:
        ExchangeError: If a file is missing, damaged or says what cannot be used.
    """
    path = folder / SAELENS_CONFIG
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ExchangeError(f"{SAELENS_CONFIG} has more than {_MAX_CONFIG_BYTES:,} bytes")
        config = json.loads(path.read_text(), parse_constant=str)
    except (OSError, ValueError, RecursionError) as error:
        raise ExchangeError(f"{SAELENS_CONFIG} cannot be read: {error}") from error
    return from_saelens(config, _read_tensors(folder / SAELENS_WEIGHTS)[1])


def read_safetensors(path: Path) -> dict[str, Any]:
    """`cfg` and `state_dict` of a file that `write_safetensors` wrote.

    Raises:
        ExchangeError: If it is damaged, or has no config of ours.
    """
    metadata, state = _read_tensors(path)
    try:
        cfg = json.loads(metadata[_CFG_KEY], parse_constant=str)
    except (KeyError, ValueError, RecursionError) as error:
        raise ExchangeError(f"it has no config under '{_CFG_KEY}' in its metadata: it is no export of ours") from error
    return {"cfg": cfg, "state_dict": state}


def _read_tensors(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of a safetensors file; the library checks every offset against the file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # Copied: they are views of the file, and whoever shortened it later would end the program.
            state = {name: file.get_tensor(name).clone() for name in names}
            return file.metadata() or {}, state
    except (OSError, SafetensorError, ValueError) as error:
        raise ExchangeError(f"{path.name} cannot be read: {error}") from error
