"""Local transformers folders: CLIP and SigLIP vision towers, ViT, DINOv2 with and without registers."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytosae.backbones.dinov2 import BackboneError
from cytosae.backbones.images import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD

Triple = tuple[float, float, float]

_HALF: Triple = (0.5, 0.5, 0.5)
_CLIP_MEAN: Triple = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD: Triple = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class _Family:
    """What tells one kind of folder from another."""

    model: str
    """transformers class of the vision part."""
    n_cls: int
    """CLS tokens."""
    mean: Triple
    """Mean of the input's channels where the folder does not say."""
    std: Triple
    """Standard deviation of the input's channels where the folder does not say."""
    patch_size: int
    """Pixels along a patch's side where the folder does not say."""
    interpolates: bool
    """Whether the model must be asked to fit its position table to the input."""
    n_registers: int = 0
    """Register tokens where the folder does not say."""


_CLIP = _Family("CLIPVisionModel", 1, _CLIP_MEAN, _CLIP_STD, 32, interpolates=True)
_SIGLIP = _Family("SiglipVisionModel", 0, _HALF, _HALF, 16, interpolates=True)

_FAMILIES: dict[str, _Family] = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": _Family("ViTModel", 1, _HALF, _HALF, 16, interpolates=True),
    "dinov2": _Family("Dinov2Model", 1, IMAGE_MEAN, IMAGE_STD, 14, interpolates=False),
    "dinov2_with_registers": _Family(
        "Dinov2WithRegistersModel", 1, IMAGE_MEAN, IMAGE_STD, 16, interpolates=False, n_registers=4
    ),
}

# A config may leave out what equals the defaults of transformers; repeated here to describe it without that import.
_N_BLOCKS = 12
_WIDTH = 768


@dataclass(frozen=True)
class Folder:
    """What a transformers folder says of its vision transformer."""

    name: str
    """Name of the folder."""
    family: _Family
    """Kind of network."""
    n_blocks: int
    """Blocks."""
    d_model: int
    """Width D."""
    patch_size: int
    """Pixels along a patch's side."""
    image_size: int
    """Input side that its position table is for, in pixels."""
    n_cls: int
    """CLS tokens."""
    n_registers: int
    """Register tokens."""
    image_mean: Triple
    """Mean that the input's channels are relative to."""
    image_std: Triple
    """Standard deviation that the input's channels are divided by."""


def read_folder(path: Path) -> Folder:
    """Describe a folder from its JSON files alone.

    Raises:
        BackboneError: If there is no `config.json`, or it is of a kind that is not known.
    """
    config = _read_json(path / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise BackboneError(f"'{path}' holds a model of type {kind!r}; known are {', '.join(_FAMILIES)}")
    family = _FAMILIES[kind]
    vision = config.get("vision_config", config)
    preprocessor = path / "preprocessor_config.json"
    stated = _read_json(preprocessor) if preprocessor.is_file() else {}
    try:
        sizes = {
            "n_blocks": int(vision.get("num_hidden_layers", _N_BLOCKS)),
            "d_model": int(vision.get("hidden_size", _WIDTH)),
            "patch_size": int(vision.get("patch_size", family.patch_size)),
        }
        if min(sizes.values()) < 1 or sizes["patch_size"] > IMAGE_SIZE:
            raise ValueError(sizes)
        return Folder(
            name=path.resolve().name,
            family=family,
            **sizes,
            image_size=int(vision.get("image_size", IMAGE_SIZE)),
            n_cls=family.n_cls,
            n_registers=int(vision.get("num_register_tokens", family.n_registers)),
            image_mean=_triple(stated.get("image_mean", family.mean)),
            image_std=_triple(stated.get("image_std", family.std), positive=True),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise BackboneError(f"'{path}' states its sizes or its normalisation wrongly: {error}") from error


def load_folder(path: Path, n_blocks: int) -> tuple[nn.Module, dict[str, bool]]:
    """Load the vision part of a folder, cut after `n_blocks` blocks, from safetensors or tensors-only files.

    Returns:
        The model, and the arguments that its call needs.

    Raises:
        BackboneError: If weights of a kept part are missing, misshapen or would be left unused.
    """
    import transformers

    folder = read_folder(path)
    model_class = getattr(transformers, folder.family.model)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config = getattr(config, "vision_config", config)
        config.num_hidden_layers = n_blocks
        # transformers 4 draws weights at random before it loads them; nobody's random state shall notice.
        with torch.random.fork_rng(devices=[]):
            model, loading = model_class.from_pretrained(
                path, config=config, local_files_only=True, output_loading_info=True, attn_implementation="sdpa"
            )
    except Exception as error:  # what transformers, safetensors and pickle raise has no common parent
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"'{path}' cannot be loaded: {first}") from error
    # A pooler or head behind the last block is never used, so its absence does no harm.
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name and "head" not in name)
    misshapen = sorted(map(str, loading.get("mismatched_keys", ())))
    unused = sorted(name for name in loading["unexpected_keys"] if _is_kept(name, n_blocks))
    if missing or misshapen or unused:
        raise BackboneError(
            f"'{path}' lacks weights: missing {missing[:12]}, "
            f"misshapen {misshapen[:12]}, or has others than its config.json says: unused {unused[:12]}"
        )
    interpolate = folder.family.interpolates and folder.image_size != IMAGE_SIZE
    return model, {"interpolate_pos_encoding": True} if interpolate else {}


def _is_kept(name: str, n_blocks: int) -> bool:
    """Whether a weight belongs to a kept block of the vision part, or to no block of it but its embedding."""
    if name.startswith("text_model."):
        return False
    block = re.search(r"(?:^|\.)layers?\.(\d+)\.", name)
    return int(block[1]) < n_blocks if block else "embeddings." in name and "position_ids" not in name


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise BackboneError(
            f"'{path}' is missing: expected a transformers folder with config.json and weights"
        ) from None
    except ValueError as error:
        raise BackboneError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BackboneError(f"'{path}' must hold a JSON object")
    return value


def _triple(values: Any, *, positive: bool = False) -> Triple:  # noqa: ANN401 - checked here
    """Three finite numbers."""
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) and (value > 0 or not positive) for value in (red, green, blue)):
        raise ValueError(f"expected three {'positive' if positive else 'finite'} numbers, found {values}")
    return red, green, blue
