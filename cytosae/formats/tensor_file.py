"""One safetensors file with the tensors of an autoencoder and, in its metadata, our config."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cytosae.formats.foreign import OWN_CONFIG_KEY, InteropError
from cytosae.sae.base import Sae

DIGEST_KEY = "cytosae_cache_sha256"
"""Entry of the metadata of files that we write: the digest of their tensors and config."""


def write_safetensors(path: Path, sae: Sae, cfg: Mapping[str, Any]) -> None:
    """Write one safetensors file: tensors under our names, the config as JSON in its metadata. Not atomic."""
    plain = {**cfg, "arch": sae.architecture, "settings": sae.settings}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    text = json.dumps(plain)
    path.write_bytes(save(state, metadata={OWN_CONFIG_KEY: text, DIGEST_KEY: digest_tensors(state, text)}))


def digest_tensors(state: Mapping[str, torch.Tensor], text: str = "", *, dtype: torch.dtype | None = None) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors and over a text, 64 hex digits.

    Args:
        state: Tensors on any device.
        text: What else counts, such as the config beside them; '' if nothing.
        dtype: Type that they are compared in, whatever their own.
    """
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        plain = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        digest.update(f"\n{name} {plain.dtype} {list(plain.shape)}\n".encode())
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor]]:
    """Our config, None if the file has none, and the tensors of a safetensors file.

    Raises:
        InteropError: If the file is missing or damaged; the library checks every offset against its size, and files
            that we wrote contain a digest of their tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            # Copied: they are views of the mapped file, and truncating it later would crash the process.
            state = {name: file.get_tensor(name).clone() for name in names}
            metadata = file.metadata() or {}
    except (OSError, SafetensorError, ValueError) as error:
        raise InteropError(f"{path.name} cannot be read: {error}") from error
    text = metadata.get(OWN_CONFIG_KEY)
    if DIGEST_KEY in metadata and metadata[DIGEST_KEY] != digest_tensors(state, text or ""):
        raise InteropError(
            f"{path.name} was changed or damaged after it was written: its tensors have another digest than the one in "
            "its metadata. Export it again"
        )
    try:
        return None if text is None else json.loads(text, parse_constant=str), state
    except (ValueError, RecursionError) as error:
        raise InteropError(f"the config in the metadata of {path.name} cannot be read: {error}") from error
