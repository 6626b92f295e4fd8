"""What the descriptions beside weights state: `config.json` of transformers or timm, `open_clip_config.json`."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cytosae.backbones.errors import BackboneError
from cytosae.backbones.preprocessing import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    ImageTransform,
    StatedTransform,
    read_open_clip,
    read_timm,
    read_transformers,
)
from cytosae.backbones.vit import ACTIVATIONS
from cytosae.backbones.weights import Checkpoint

_IMAGENET = ImageTransform(resample="bicubic")
_INCEPTION = ImageTransform(mean=HALF, std=HALF)
_OPENAI = ImageTransform(mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic")
HIBOU = ImageTransform(mean=(0.7068, 0.5755, 0.722), std=(0.195, 0.2316, 0.1816), resample="bicubic")
"""Hibou is DINOv2 with registers under DINOv2's own `model_type`, with code of its own, which is never run."""

_ACTIVATION_NAMES = {
    **{name: name for name in ACTIVATIONS},
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), "gelu_tanh"),
    **{"swish": "silu", "quickgelu": "quick_gelu"},
}


@dataclass(frozen=True)
class Statement:
    """What is stated about an encoder, from whichever source."""

    name: str
    """Name of the encoder where the user gives none."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Fields of its `Architecture`; the others follow from the tensors."""
    transform: StatedTransform = field(default_factory=StatedTransform)
    """How it wants its images."""
    suggestion: ImageTransform = _IMAGENET
    """What the family usually wants, for a message where nothing is stated."""
    note: str = ""
    """What a user should know about how the encoder was recognised."""
    assume: bool = False
    """Whether the suggestion is a definition of ours, which holds where nothing is stated (with a note)."""


@dataclass(frozen=True)
class _Family:
    """A `model_type` of transformers: its defaults, which a config may omit."""

    suggestion: ImageTransform
    eps: float
    patch_size: int = 16
    activation: str = "gelu"
    width: int = 768
    depth: int = 12
    heads: int = 12
    n_registers: int | None = None
    positions: str = "plain"
    rope: bool = False


_CLIP = _Family(_OPENAI, 1e-5, 32, "quick_gelu")
_SIGLIP = _Family(_INCEPTION, 1e-6, 16, "gelu_tanh")
_DINOV2 = _Family(ImageTransform(), 1e-6, 14)

FAMILIES = {
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "vit": _Family(_INCEPTION, 1e-12),
    "deit": _Family(_IMAGENET, 1e-12),
    "vit_mae": _Family(_IMAGENET, 1e-12),
    "ijepa": _Family(_IMAGENET, 1e-12),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _Family(ImageTransform(), 1e-6, 16, n_registers=4, positions="antialias"),
    "dinov3_vit": _Family(_IMAGENET, 1e-5, width=384, heads=6, n_registers=0, rope=True),
}
"""Known kinds of transformers folders by `model_type`, with the defaults of transformers 5."""


def read_statement(checkpoint: Checkpoint) -> Statement | None:
    """What is stated beside the weights; None if there is no description.

    Raises:
        BackboneError: If the description is impossible, or is of a kind of network that is not known.
    """
    config, path = checkpoint.config, checkpoint.folder
    name = path.resolve().name
    if "open_clip" in config:
        return _from_open_clip(config["open_clip"], path / "open_clip_config.json", name)
    if config.get("model_type") == "timm_wrapper" or ("architecture" in config and "model_type" not in config):
        return _from_timm(config, path / "config.json", name)
    if config:
        return _from_transformers(config, path, name)
    if checkpoint.path.is_dir():
        raise BackboneError(f"'{path / 'config.json'}' is missing: expected a folder with config.json and weights")
    return None


def _from_transformers(config: Mapping[str, Any], folder: Path, name: str) -> Statement:
    """A folder of transformers."""
    kind, path = config.get("model_type"), folder / "config.json"
    if isinstance(kind, str) and kind.startswith("siglip2"):
        raise BackboneError(
            f"'{path}' describes SigLIP 2 with variable resolution (naflex): its tokens have no fixed grid, so an "
            "image has no fixed number of them. Use a SigLIP 2 checkpoint of fixed resolution (model_type siglip)"
        )
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise BackboneError(
            f"'{folder}' contains a model of type {kind!r}; known are {', '.join(FAMILIES)}, and folders of timm and "
            "open_clip"
        )
    family = FAMILIES[kind]
    try:
        vision = config.get("vision_config", config)
        facts = _sizes(vision, family)
        registers = vision.get("num_register_tokens")
        if registers is not None or family.n_registers is not None:
            facts["n_registers"] = _whole(registers, family.n_registers, top=64, least=0)
        hibou = kind == "dinov2" and bool(registers or "auto_map" in config)
        if hibou:
            facts["positions"] = "antialias"
        # Stated, because tensors that are all missing would otherwise be taken for a network without them.
        facts["layer_scale"] = kind.startswith("dino")
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
    return Statement(name, facts, read_transformers(folder), HIBOU if hibou else family.suggestion, assume=assume)


def _sizes(vision: Mapping[str, Any], family: _Family) -> dict[str, Any]:
    """Sizes of a transformers config."""
    patch = vision.get("patch_size", family.patch_size)
    patch = patch[0] if isinstance(patch, list) and len(set(patch)) == 1 else patch
    facts = {
        "width": _whole(vision.get("hidden_size"), family.width, top=1 << 16),
        "depth": _whole(vision.get("num_hidden_layers"), family.depth, top=1000),
        "heads": _whole(vision.get("num_attention_heads"), family.heads, top=1 << 10),
        "patch_size": _whole(patch, family.patch_size, top=1024),
        "activation": _activation(vision.get("hidden_act", family.activation)),
        "eps": _epsilon(vision.get("layer_norm_eps", family.eps)),
        "positions": family.positions,
    }
    if family.rope:
        facts["rope_theta"] = _epsilon(vision.get("rope_theta", 100.0), top=1e9)
    return facts


def _from_timm(config: Mapping[str, Any], path: Path, name: str) -> Statement:
    """A folder of timm: the name of its architecture implies what its tensors do not say."""
    architecture = config.get("architecture")
    arguments = config.get("model_args") or {}
    if not isinstance(architecture, str) or not isinstance(arguments, dict):
        raise BackboneError(f"'{path}' must name a timm architecture and its model_args, found {architecture!r}")
    facts = _timm_facts(architecture, path)
    try:
        if "num_heads" in arguments:
            facts["heads"] = _whole(arguments["num_heads"], None, top=1 << 10)
        if isinstance(arguments.get("act_layer"), str):
            facts["activation"] = _activation(arguments["act_layer"].lower())
    except (TypeError, ValueError) as error:
        raise BackboneError(f"'{path}' states impossible model_args: {error}") from error
    dinov2 = "dinov2" in architecture
    suggestion = _OPENAI if "clip" in architecture and "siglip" not in architecture else _IMAGENET
    transform = read_timm(config, path)
    return Statement(name, facts, transform, ImageTransform() if dinov2 else suggestion, assume=dinov2)


_TIMM_NAME = re.compile(
    r"(vit|deit|deit3)_(tiny|small|medium|base|large|huge|huge_plus|giant|gigantic|giantopt|so150m|so400m|7b)(_distilled)?"
    r"(_patch\d+)(_(reg\d+|gap|clip|quickgelu|siglip|dinov2|dinov3|qkvb|dino|mae|augreg|in21k|in1k|\d+))*"
)  # fmt: skip
"""Architectures of timm that are this program's ViT. Others share names of tensors, but compute something else."""

_TANH_SIGLIP = (
    "patch32_siglip_256",
    "large_patch16_siglip_512",
    "so400m_patch16_siglip_256",
    "so400m_patch16_siglip_384",
)
"""SigLIP towers for which timm uses GELU's tanh approximation."""


def _timm_facts(architecture: str, path: Path) -> dict[str, Any]:
    """What the name of a timm architecture implies.

    Raises:
        BackboneError: If it is not one of those that the ViT of this program computes.
    """
    base = architecture.split(".")[0]
    if not _TIMM_NAME.fullmatch(base):
        raise BackboneError(
            f"'{path}' describes the timm architecture {architecture!r}, which is not supported; supported are plain "
            "vision transformers (vit_*, deit_*), with registers, of CLIP, SigLIP, DINOv2 and DINOv3"
        )
    facts: dict[str, Any] = {"positions": "antialias", "eps": 1e-6}
    if "_clip" in base or "dinov3" in base:
        facts["eps"] = 1e-5
    if "quickgelu" in base:
        facts["activation"] = "quick_gelu"
    if base.endswith(_TANH_SIGLIP):
        facts["activation"] = "gelu_tanh"
    if "dinov3" in base:
        facts["rope_theta"] = 100.0
    return facts


def _from_open_clip(config: Mapping[str, Any], path: Path, name: str) -> Statement:
    """A folder of open_clip: its own vision tower, or one of timm."""
    try:
        model = config["model_cfg"]
        vision = model["vision_cfg"]
        trunk = vision.get("timm_model_name")
        if trunk is not None:
            facts = _timm_facts(str(trunk), path)
        else:
            width = _whole(vision.get("width"), 768, top=1 << 16)
            facts = {
                "width": width,
                "heads": width // _whole(vision.get("head_width"), 64, top=1 << 16),
                "activation": _open_clip_activation(model, vision),
                "eps": _epsilon(vision.get("norm_kwargs", {}).get("eps", 1e-5)),
                "positions": "antialias",
            }
        return Statement(name, facts, read_open_clip(config, path), _OPENAI)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(f"'{path}' states impossible sizes: {error!r}") from error


def _open_clip_activation(model: Mapping[str, Any], vision: Mapping[str, Any]) -> str:
    """The activation function of open_clip's own vision tower."""
    options = vision.get("act_kwargs") or {}
    if model.get("quick_gelu") and not options:
        return "quick_gelu"
    known = {(): "gelu", (("approximate", "none"),): "gelu", (("approximate", "tanh"),): "gelu_tanh"}
    if model.get("quick_gelu") or tuple(options.items()) not in known:
        raise ValueError(f"unknown act_kwargs {options!r}")
    return known[tuple(options.items())]


def _whole(value: Any, default: int | None, *, top: int, least: int = 1) -> int:  # noqa: ANN401 - checked here
    """A whole number in a range."""
    value = default if value is None else value
    if type(value) is not int or not least <= value <= top:
        raise ValueError(f"expected a whole number of {least} to {top}, found {value!r}")
    return int(value)


def _epsilon(value: Any, top: float = 1.0) -> float:  # noqa: ANN401 - checked here
    """A positive number."""
    if not isinstance(value, int | float) or not 0 < value <= top:
        raise ValueError(f"expected a number above 0 and at most {top:g}, found {value!r}")
    return float(value)


def _activation(name: Any) -> str:  # noqa: ANN401 - checked here
    """One of our activation functions."""
    if not isinstance(name, str) or name not in _ACTIVATION_NAMES:
        raise ValueError(f"unknown activation {name!r}; known are {', '.join(sorted(_ACTIVATION_NAMES))}")
    return _ACTIVATION_NAMES[name]
