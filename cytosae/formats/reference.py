"""The reference's checkpoint, whose config is a pickled object of its own class."""

import contextlib
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from cytosae.formats.foreign import OWN_CONFIG_KEY, InteropError
from cytosae.sae.base import Sae

_REFERENCE_MODULE, _REFERENCE_CLASS = "src.sae_training.config", "ViTSAERunnerConfig"


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
        OWN_CONFIG_KEY: json.dumps({**cfg, "arch": sae.architecture, "settings": sae.settings}),
    }
    state = OrderedDict((name, tensor.detach().cpu().contiguous()) for name, tensor in sae.state_dict().items())
    return {"cfg": values, "state_dict": state}


def unwrap_cfg(cfg: object) -> object:
    """Our own config from one that `reference_checkpoint` made; any other config unchanged."""
    if isinstance(cfg, dict) and isinstance(cfg.get(OWN_CONFIG_KEY), str):
        with contextlib.suppress(ValueError):
            return json.loads(cfg[OWN_CONFIG_KEY])
    return cfg


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
