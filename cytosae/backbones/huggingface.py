"""Local transformers folders: CLIP and SigLIP vision towers, ViT, and DINOv2 with and without registers."""

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
    """A kind of network, and the defaults where its folder does not state a value."""

    model: str
    """transformers class of the vision part."""
    n_cls: int
    """CLS tokens."""
    mean: Triple
    """Default mean of the input's channels."""
    std: Triple
    """Default standard deviation of the input's channels."""
    patch_size: int
    """Default number of pixels along a patch's side."""
    interpolates: bool
    """Whether the model interpolates its position table only on request."""
    n_registers: int = 0
    """Default number of register tokens."""


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

# A config may omit values that equal the defaults of transformers. Repeated here, so that no import is needed.
_N_BLOCKS = 12
_WIDTH = 768


@dataclass(frozen=True)
class TransformersFolder:
    """Description of the vision transformer in a transformers folder."""

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
    """Height and width of the input that the position table was made for, in pixels."""
    n_cls: int
    """CLS tokens."""
    n_registers: int
    """Register tokens."""
    image_mean: Triple
    """Mean that the input's channels are relative to."""
    image_std: Triple
    """Standard deviation that the input's channels are divided by."""


def read_folder(path: Path) -> TransformersFolder:
    """Describe a folder from its JSON files alone.

    Raises:
        BackboneError: If `config.json` is missing, or describes an unknown kind of network.
    """
    config = _read_json(path / "config.json")
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise BackboneError(f"'{path}' contains a model of type {kind!r}; known are {', '.join(_FAMILIES)}")
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
        return TransformersFolder(
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
        raise BackboneError(
            f"'{path}' has invalid sizes or an invalid normalisation in its JSON files: {error}"
        ) from error


def load_folder(path: Path, n_blocks: int) -> tuple[nn.Module, dict[str, bool]]:
    """Load the vision part of a folder, cut after `n_blocks` blocks, from safetensors or tensors-only files.

    Returns:
        The model, and further arguments for calling it.

    Raises:
        BackboneError: If a weight of a kept part is missing, has another shape, or would not be used.
    """
    import transformers

    folder = read_folder(path)
    model_class = getattr(transformers, folder.family.model)
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config = getattr(config, "vision_config", config)
        config.num_hidden_layers = n_blocks
        # transformers 4 draws random weights before it loads them; this must not change the global random state.
        with torch.random.fork_rng(devices=[]):
            model, loading = model_class.from_pretrained(
                path, config=config, local_files_only=True, output_loading_info=True, attn_implementation="sdpa"
            )
    except Exception as error:  # errors of transformers, safetensors and pickle have no common base class
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"'{path}' cannot be loaded: {first}") from error
    # A pooler or head after the last block is never used, so it may be missing.
    missing = sorted(name for name in loading["missing_keys"] if "pooler" not in name and "head" not in name)
    misshapen = sorted(map(str, loading.get("mismatched_keys", ())))
    unused = sorted(name for name in loading["unexpected_keys"] if _is_kept(name, n_blocks))
    if missing or misshapen or unused:
        raise BackboneError(
            f"weights in '{path}' do not match its config.json: missing {missing[:12]}, "
            f"of another shape {misshapen[:12]}, unused {unused[:12]}"
        )
    interpolate = folder.family.interpolates and folder.image_size != IMAGE_SIZE
    return model, {"interpolate_pos_encoding": True} if interpolate else {}


def _is_kept(name: str, n_blocks: int) -> bool:
    """Whether a weight belongs to a kept block of the vision part, or to its embedding."""
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
        raise BackboneError(f"'{path}' must contain a JSON object")
    return value


def _triple(values: Any, *, positive: bool = False) -> Triple:  # noqa: ANN401 - checked here
    """Three finite numbers."""
    red, green, blue = (float(value) for value in values)
    if not all(math.isfinite(value) and (value > 0 or not positive) for value in (red, green, blue)):
        raise ValueError(f"expected three {'positive' if positive else 'finite'} numbers, found {values}")
    return red, green, blue
