"""Folders of transformers: what their `config.json` states, with the defaults that it may omit."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cytosae.backbones.errors import BackboneError, shown
from cytosae.backbones.preprocessing import ImageTransform, read_transformers
from cytosae.backbones.statement import (
    IMAGENET,
    INCEPTION,
    OPENAI,
    SIGLIP,
    Statement,
    activation_name,
    positive_number,
    size_of,
    whole_number,
)

HIBOU = ImageTransform(mean=(0.7068, 0.5755, 0.722), std=(0.195, 0.2316, 0.1816), resample="bicubic")
"""Hibou is DINOv2 with registers under DINOv2's own `model_type`, with code of its own, which is never run."""


@dataclass(frozen=True)
class _Family:
    """A `model_type` of transformers: its defaults, which a config may omit."""

    suggestion: ImageTransform
    """How the family usually wants its images."""
    eps: float
    """Epsilon of layer normalisation."""
    patch_size: int = 16
    """Pixels along a patch's side."""
    activation: str = "gelu"
    """Activation function of the MLPs, as transformers names it."""
    width: int = 768
    """Width D."""
    depth: int = 12
    """Blocks."""
    heads: int = 12
    """Attention heads."""
    n_registers: int | None = None
    """Register tokens; None if the tensors say it."""
    positions: str = "plain"
    """Rule by which the position table is resized."""
    rope: bool = False
    """Whether positions are rotary."""
    pre_norm: bool = False
    """Whether tokens are normalised before the first block."""
    n_cls: int = 1
    """CLS tokens."""


_CLIP = _Family(OPENAI, 1e-5, 32, "quick_gelu", pre_norm=True)
_SIGLIP = _Family(SIGLIP, 1e-6, 16, "gelu_tanh", n_cls=0)
_DINOV2 = _Family(ImageTransform(), 1e-6, 14)

FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": _Family(INCEPTION, 1e-12),
    "deit": _Family(IMAGENET, 1e-12),
    "vit_mae": _Family(IMAGENET, 1e-12),
    "ijepa": _Family(IMAGENET, 1e-12, n_cls=0),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _Family(ImageTransform(), 1e-6, 16, n_registers=4, positions="antialias"),
    "dinov3_vit": _Family(IMAGENET, 1e-5, width=384, heads=6, n_registers=0, rope=True),
}
"""Known kinds of transformers folders by `model_type`, with the defaults of transformers 5."""


def read_transformers_config(config: Mapping[str, Any], folder: Path, name: str) -> Statement:
    """What the `config.json` of a transformers folder states.

    Args:
        config: The file's contents.
        folder: The folder.
        name: Name of the encoder where the user gives none.

    Raises:
        BackboneError: If the description is impossible, or is of a kind of network that is not known.
    """
    kind, path = config.get("model_type"), folder / "config.json"
    if isinstance(kind, str) and kind.startswith("siglip2"):
        raise BackboneError(
            f"'{path}' describes SigLIP 2 with variable resolution (naflex): its tokens have no fixed grid, so an "
            "image has no fixed number of them. Use a SigLIP 2 checkpoint of fixed resolution (model_type siglip)"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BackboneError(
            f"'{folder}' contains a model of type {shown(repr(kind))}; known are {', '.join(FAMILIES)}, and folders of "
            "timm and open_clip"
        )
    family = FAMILIES[kind]
    try:
        vision = config.get("vision_config", config)
        facts = _sizes(vision, family)
        registers = vision.get("num_register_tokens")
        if registers is not None or family.n_registers is not None:
            facts["n_registers"] = whole_number(registers, family.n_registers, top=64, least=0)
        hibou = kind == "dinov2" and bool(registers or "auto_map" in config)
        if hibou:
            facts["positions"] = "antialias"
        # Stated, because tensors that are all missing would otherwise be taken for a network without them.
        facts |= {
            "layer_scale": kind.startswith("dino"),
            "pre_norm": family.pre_norm,
            "patch_bias": not family.pre_norm,
        }
        facts |= {"n_cls": family.n_cls, "rope_theta": facts.get("rope_theta")}
        if not family.rope:
            facts["qkv_bias"] = bool(vision.get("qkv_bias", True))
        if "use_swiglu_ffn" in vision or "use_gated_mlp" in vision:
            facts["swiglu"] = bool(vision.get("use_swiglu_ffn", vision.get("use_gated_mlp")))
            # Dinov2's SwiGLU is always SiLU, whatever the config calls the activation of the other kind of MLP.
            if kind.startswith("dinov2") and facts["swiglu"]:
                facts["activation"] = "silu"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BackboneError(f"'{path}' states impossible sizes: {error}") from error
    assume = kind.startswith("dinov2") and not hibou
    suggestion = HIBOU if hibou else family.suggestion
    return Statement(name, facts, read_transformers(folder, suggestion.resample), suggestion, assume=assume)


def _sizes(vision: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    """Sizes of a transformers config."""
    patch = vision.get("patch_size", family.patch_size)
    patch = patch[0] if isinstance(patch, list) and len(set(patch)) == 1 else patch
    facts = {
        "width": size_of("width", vision.get("hidden_size"), family.width),
        "depth": size_of("depth", vision.get("num_hidden_layers"), family.depth),
        "heads": size_of("heads", vision.get("num_attention_heads"), family.heads),
        "patch_size": size_of("patch_size", patch, family.patch_size),
        "activation": activation_name(vision.get("hidden_act", family.activation)),
        "eps": positive_number(vision.get("layer_norm_eps", family.eps)),
        "positions": family.positions,
    }
    if family.rope:
        facts["rope_theta"] = positive_number(vision.get("rope_theta", 100.0), top=1e9)
    return facts
