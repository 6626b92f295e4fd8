"""One safetensors file with the tensors of an autoencoder and, in its metadata, our config."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cytosae.formats.foreign import OWN_CONFIG_KEY, InteropError
from cytosae.sae.base import Sae


def write_safetensors(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write one safetensors file: tensors under our names, the config as JSON in its metadata. Not atomic."""
    plain = {**cfg, "arch": sae.architecture, "settings": sae.settings}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    path.write_bytes(save(state, metadata={OWN_CONFIG_KEY: json.dumps(plain)}))


def read_tensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Our config, None if the file has none, and the tensors of a safetensors file.

    Raises:
        InteropError: If the file is missing or damaged; the library checks every offset against its size.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # Copied: they are views of the mapped file, and truncating it later would crash the process.
            state = {name: file.get_tensor(name).clone() for name in names}
            text = (file.metadata() or {}).get(OWN_CONFIG_KEY)
    except (OSError, SafetensorError, ValueError) as error:
        raise InteropError(f"{path.name} cannot be read: {error}") from error
    try:
        return None if text is None else json.loads(text, parse_constant=str), state
    except (ValueError, RecursionError) as error:
        raise InteropError(f"the config in the metadata of {path.name} cannot be read: {error}") from error
