"""Folders of timm and of open_clip: what their JSON files state. The name of an architecture implies the rest."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cytosae.backbones.errors import BackboneError, shown
from cytosae.backbones.preprocessing import ImageTransform, read_open_clip, read_timm
from cytosae.backbones.statement import (
    IMAGENET,
    OPENAI,
    Statement,
    activation_name,
    positive_number,
    size_of,
    whole_number,
)

_SIZES = {
    "tiny": (192, 12, 3),
    "xsmall": (256, 10, 4),
    "small": (384, 12, 6),
    "medium": (512, 12, 8),
    "betwixt": (640, 12, 10),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
    "huge_plus": (1280, 32, 20),
    "giant": (1408, 40, 16),
    "giantopt": (1536, 40, 16),
    "gigantic": (1664, 48, 16),
    "so150m": (896, 18, 14),
    "so400m": (1152, 27, 16),
    "7b": (4096, 40, 32),
}
"""Width, blocks and attention heads by the size in an architecture's name."""

_DINO_GIANT = (1536, 40, 24)
"""The giant network of DINOv2, which is not timm's."""

_NAME = re.compile(
    r"(?:vit|deit|deit3)_(?P<size>huge_plus|[a-z0-9]+?)(?P<distilled>_distilled)?_patch(?P<patch>\d+)"
    r"(?P<rest>(?:_(?:reg\d+|gap|map|clip|quickgelu|siglip|dinov2|dinov3|qkvb|\d+))*)"
)
"""Architectures of timm that are this program's ViT. Others share names of tensors, but compute something else."""

_TANH = re.compile(
    r"vit_(?:base_patch32_siglip|large_patch16_siglip(?:_gap)?_512|so400m_patch16_siglip|giantopt_patch16_siglip).*"
)
"""SigLIP towers for which timm uses GELU's tanh approximation."""

_MLPS = ("mlp", "swiglu_packed", "swiglupacked")


def is_dinov2(config: Mapping[str, Any]) -> bool:
    """Whether a timm description is of DINOv2, of which the shapes say everything that it could state."""
    return "dinov2" in str(config.get("architecture"))


def read_timm_config(config: Mapping[str, Any], path: Path, name: str) -> Statement:
    """What the `config.json` of a timm folder states.

    Args:
        config: The file's contents.
        path: The file.
        name: Name of the encoder where the user gives none.

    Raises:
        BackboneError: If the description is impossible, or is of a network that is not supported.
    """
    architecture = config.get("architecture")
    arguments = config.get("model_args") or {}
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        raise BackboneError(f"'{path}' must name a timm architecture and its model_args, found {shown(architecture)}")
    try:
        facts = _timm_facts(architecture, arguments, path)
    except (TypeError, ValueError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"'{path}' states impossible model_args: {error}") from error
    of_dinov2 = is_dinov2(config)
    suggestion = OPENAI if "clip" in architecture and "siglip" not in architecture else IMAGENET
    transform = read_timm(config, path, "bilinear" if of_dinov2 else "bicubic")
    return Statement(name, facts, transform, ImageTransform() if of_dinov2 else suggestion, assume=of_dinov2)


def _timm_facts(architecture: str, arguments: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What the name of a timm architecture implies, and what its arguments change.

    Raises:
        BackboneError: If it is not one of those that the ViT of this program computes.
        ValueError: If an argument is impossible.
    """
    base = architecture.split(".")[0]
    match = _NAME.fullmatch(base)
    if match is None or match["size"] not in _SIZES:
        raise BackboneError(
            f"'{path}' describes the timm architecture '{shown(architecture)}', which is not supported; supported are "
            "plain vision transformers (vit_*, deit_*), with registers, of CLIP, SigLIP, DINOv2 and DINOv3"
        )
    words = set(match["rest"].split("_"))
    width, depth, heads = _DINO_GIANT if base.startswith("vit_giant_") and "dinov2" in words else _SIZES[match["size"]]
    facts: dict[str, Any] = {
        "width": size_of("width", arguments.get("embed_dim"), width),
        "depth": size_of("depth", arguments.get("depth"), depth),
        "patch_size": size_of("patch_size", arguments.get("patch_size"), int(match["patch"])),
        "eps": 1e-5 if words & {"clip", "dinov3"} else 1e-6,
        "positions": "antialias",
        "n_cls": int(arguments.get("class_token", not words & {"siglip", "gap", "map"})),
        "pre_norm": "clip" in words,
        "patch_bias": "clip" not in words,
        "rope_theta": 100.0 if "dinov3" in words else None,
    }
    # `vit_base_patch16_gap_224` alone has other heads than all others of its size.
    usual = heads if facts["width"] == width and base != "vit_base_patch16_gap_224" else 0
    facts["heads"] = size_of("heads", arguments.get("num_heads"), usual, least=0)
    facts |= _implied_parts(words, arguments, distilled=match["distilled"] is not None)
    if isinstance(arguments.get("act_layer"), str):
        facts["activation"] = activation_name(arguments["act_layer"].lower())
    elif "quickgelu" in words:
        facts["activation"] = "quick_gelu"
    elif _TANH.fullmatch(base):
        facts["activation"] = "gelu_tanh"
    mlp = arguments.get("mlp_layer")
    if mlp is not None and str(mlp).lower().split(".")[-1] not in _MLPS:
        raise ValueError(f"unknown mlp_layer {shown(mlp)}")
    return facts


def _implied_parts(words: set[str], arguments: Mapping[str, Any], *, distilled: bool) -> dict[str, Any]:
    """Parts that must be there; whether others are, the tensors say."""
    facts: dict[str, Any] = {}
    if words & {"dinov2", "dinov3"} or arguments.get("init_values") is not None:
        facts["layer_scale"] = True
    named = next(
        (int(word[3:]) for word in words if word.startswith("reg")), 4 if "dinov3" in words else int(distilled)
    )
    registers = whole_number(arguments.get("reg_tokens", arguments.get("num_reg_tokens")), named, top=64, least=0)
    if registers:
        facts["n_registers"] = registers
    if "qkv_bias" in arguments:
        facts["qkv_bias"] = bool(arguments["qkv_bias"])
    elif not words & {"dinov3", "gap"}:
        facts["qkv_bias"] = True
    return facts


def read_open_clip_config(config: Mapping[str, Any], path: Path, name: str) -> Statement:
    """What an `open_clip_config.json` states: a vision tower of its own, or one of timm.

    Args:
        config: The file's contents.
        path: The file.
        name: Name of the encoder where the user gives none.

    Raises:
        BackboneError: If the description is impossible, or is of a network that is not supported.
    """
    try:
        model = config["model_cfg"]
        vision = model["vision_cfg"]
        trunk = vision.get("timm_model_name")
        if trunk is not None:
            facts = _timm_facts(str(trunk), {}, path)
        else:
            width = size_of("width", vision.get("width"), 768)
            facts = {
                "width": width,
                "heads": width // size_of("width", vision.get("head_width"), 64),
                "activation": _open_clip_activation(model, vision),
                "eps": positive_number(vision.get("norm_kwargs", {}).get("eps", 1e-5)),
                "positions": "antialias",
                "n_cls": 1,
                "pre_norm": not vision.get("no_ln_pre"),
                "patch_bias": False,
                "qkv_bias": True,
                "layer_scale": vision.get("ls_init_value") is not None,
                "rope_theta": None,
            }
        return Statement(name, facts, read_open_clip(config, path), OPENAI)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"'{path}' states impossible sizes: {shown(repr(error))}") from error


def _open_clip_activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """The activation function of open_clip's own vision tower."""
    options = vision.get("act_kwargs") or {}
    if model.get("quick_gelu") and not options:
        return "quick_gelu"
    known = {(): "gelu", (("approximate", "none"),): "gelu", (("approximate", "tanh"),): "gelu_tanh"}
    if model.get("quick_gelu") or tuple(options.items()) not in known:
        raise ValueError(f"unknown act_kwargs {shown(options)}")
    return known[tuple(options.items())]
