"""Known encoders: what their tensors do not say, such as attention heads, and how they want their images.

Numbers are from the encoders' own code and model cards. docs/encoders.md tells which were compared with what.
"""

import dataclasses
from collections.abc import Mapping

from cytosae.backbones.preprocessing import CLIP_MEAN, CLIP_STD, HALF, ImageTransform
from cytosae.backbones.vit import Architecture

_DINOV2 = {
    "dinov2_vits14": Architecture("dinov2_vits14", 384, 12, 6),
    "dinov2_vitb14": Architecture("dinov2_vitb14", 768, 12, 12),
    "dinov2_vitl14": Architecture("dinov2_vitl14", 1024, 24, 16),
    "dinov2_vitg14": Architecture("dinov2_vitg14", 1536, 40, 24, swiglu=True),
}

DINOV2: dict[str, Architecture] = _DINOV2 | {
    f"{name}_reg": dataclasses.replace(size, name=f"{name}_reg", n_registers=4, positions="antialias")
    for name, size in _DINOV2.items()
}
"""DINOv2 with and without registers. DinoBloom-S/B/L/G are the four without."""


def _dinov3(name: str, width: int, depth: int, heads: int, hidden: int, *, swiglu: bool = False) -> Architecture:
    return Architecture(
        name, width, depth, heads, patch_size=16, n_registers=4, swiglu=swiglu, mlp_hidden=hidden, eps=1e-5,
        rope_theta=100.0,
    )  # fmt: skip


def _plain(name: str, width: int, depth: int, heads: int, patch_size: int) -> Architecture:
    """A ViT of DINO's or timm's first kind: a CLS token, no LayerScale."""
    return Architecture(name, width, depth, heads, patch_size, layer_scale=False)


def _timm(
    name: str, width: int, depth: int, heads: int, patch_size: int, n_registers: int = 0, gated: int | None = None
) -> Architecture:
    """An encoder published in timm's form, trained with DINOv2's method; `gated` is the width of a gated MLP."""
    return Architecture(
        name, width, depth, heads, patch_size, n_registers=n_registers, swiglu=gated is not None, mlp_hidden=gated,
        positions="antialias",
    )  # fmt: skip


def _clip(name: str, width: int, depth: int, heads: int, patch_size: int, activation: str) -> Architecture:
    return Architecture(
        name, width, depth, heads, patch_size, activation=activation, eps=1e-5, layer_scale=False, pre_norm=True,
        patch_bias=False, positions="antialias",
    )  # fmt: skip


_CLIP_SIZES = {"clip_vitb32": (768, 12, 12, 32), "clip_vitb16": (768, 12, 12, 16), "clip_vitl14": (1024, 24, 16, 14)}

_OTHERS = (
    _dinov3("dinov3_vits16", 384, 12, 6, 1536),
    _dinov3("dinov3_vits16plus", 384, 12, 6, 1536, swiglu=True),
    _dinov3("dinov3_vitb16", 768, 12, 12, 3072),
    _dinov3("dinov3_vitl16", 1024, 24, 16, 4096),
    _dinov3("dinov3_vith16plus", 1280, 32, 20, 5120, swiglu=True),
    _dinov3("dinov3_vit7b16", 4096, 40, 32, 8192, swiglu=True),
    _plain("dino_vitt16", 192, 12, 3, 16),
    _plain("dino_vits16", 384, 12, 6, 16),
    _plain("dino_vits8", 384, 12, 6, 8),
    _plain("dino_vitb16", 768, 12, 12, 16),
    _plain("dino_vitb8", 768, 12, 12, 8),
    _plain("mae_vitb16", 768, 12, 12, 16),
    _plain("mae_vitl16", 1024, 24, 16, 16),
    _plain("mae_vith14", 1280, 32, 16, 14),
    _plain("lunit_vits16", 384, 12, 6, 16),
    _plain("lunit_vits8", 384, 12, 6, 8),
    dataclasses.replace(_plain("kaiko_vits16", 384, 12, 6, 16), positions="antialias"),
    dataclasses.replace(_plain("kaiko_vits8", 384, 12, 6, 8), positions="antialias"),
    dataclasses.replace(_plain("kaiko_vitb16", 768, 12, 12, 16), positions="antialias"),
    dataclasses.replace(_plain("kaiko_vitb8", 768, 12, 12, 8), positions="antialias"),
    _timm("kaiko_vitl14", 1024, 24, 16, 14, 4),
    _timm("uni", 1024, 24, 16, 16),
    _timm("uni2_h", 1536, 24, 24, 14, 8, 4096),
    _timm("virchow", 1280, 32, 16, 14, 0, 3416),
    _timm("virchow2", 1280, 32, 16, 14, 4, 3416),
    _timm("h_optimus_0", 1536, 40, 24, 14, 4, 4096),
    _timm("h_optimus_1", 1536, 40, 24, 14, 4, 4096),
    _timm("h0_mini", 768, 12, 12, 14, 4, 2048),
    _timm("gigapath", 1536, 40, 24, 16, 0, 4096),
    dataclasses.replace(_plain("conch", 768, 12, 12, 16), positions="antialias"),
    dataclasses.replace(_plain("biomedclip", 768, 12, 12, 16), positions="antialias"),
    *(
        _clip(f"{name}{ending}", *sizes, activation)
        for name, sizes in _CLIP_SIZES.items()
        for ending, activation in (("", "gelu"), ("_quickgelu", "quick_gelu"))
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = DINOV2 | {item.name: item for item in _OTHERS}
"""Known encoders by name."""

_H_OPTIMUS = ImageTransform(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517), resample="bicubic")
_LUNIT = ImageTransform(
    mean=(0.70322989, 0.53606487, 0.66096631), std=(0.21716536, 0.26081574, 0.20723464), resample="bicubic"
)
_KAIKO = ImageTransform(mean=HALF, std=HALF, resample="bicubic")
_CLIP = ImageTransform(mean=CLIP_MEAN, std=CLIP_STD, resample="bicubic")

_TRANSFORMS = {
    **{name: _H_OPTIMUS for name in ("h_optimus_0", "h_optimus_1", "h0_mini")},
    **{name: _LUNIT for name in ("lunit_vits16", "lunit_vits8")},
    **{name: _KAIKO for name in ("kaiko_vits16", "kaiko_vits8", "kaiko_vitb16", "kaiko_vitb8", "kaiko_vitl14")},
    **{name: _CLIP for name in ARCHITECTURES if name.startswith("clip_")},
    **{name: ImageTransform() for name in DINOV2},
    "conch": dataclasses.replace(_CLIP, size=448),
    "biomedclip": _CLIP,
    "uni": ImageTransform(),
    "uni2_h": ImageTransform(),
}

_GRIDS = {"conch": 28, "kaiko_vitl14": 16, "h0_mini": 16, "h_optimus_0": 16, "h_optimus_1": 16, "biomedclip": 14}
"""Sides of position tables that tell some encoders from others of the same shapes."""

_OPEN_CLIP_TRUNKS = ("conch", "biomedclip")
"""Encoders that are the vision half of an open_clip model, with timm's names under `visual.trunk.`."""

_WIDTHS = {(item.width, item.depth, item.rope_theta is not None): item.heads for item in ARCHITECTURES.values()}


def known_transform(name: str) -> ImageTransform:
    """How a known encoder wants its images; ImageNet's numbers and Pillow's bicubic filter if nothing else is known."""
    return _TRANSFORMS.get(name, ImageTransform(resample="bicubic"))


def find_architecture(name: str) -> Architecture | None:
    """The known encoder of a name; `_reg4` is another spelling of `_reg`."""
    return ARCHITECTURES.get(name.removesuffix("4") if name.endswith("_reg4") else name)


def usual_heads(width: int, depth: int, *, rotary: bool) -> int | None:
    """Attention heads of all known encoders of these sizes; None if there are none."""
    return _WIDTHS.get((width, depth, rotary))


def matching_architectures(
    inferred: Architecture, side: int | None, *, in_open_clip: bool, own_names: bool
) -> list[Architecture]:
    """Known encoders with the shapes of a checkpoint.

    Args:
        inferred: What its tensors say.
        side: Patches along a side of its position table; None if it has none.
        in_open_clip: Whether the encoder is the vision half of an open_clip model with a timm trunk.
        own_names: Whether only DINOv2 names its tensors like this.
    """
    choices = DINOV2 if own_names else ARCHITECTURES
    known = [item for item in choices.values() if (item.name in _OPEN_CLIP_TRUNKS) == in_open_clip]
    return [item for item in known if _same_shapes(item, inferred, _GRIDS.get(item.name), side)]


def _same_shapes(known: Architecture, inferred: Architecture, grid: int | None, side: int | None) -> bool:
    """Whether a known encoder has the shapes of a checkpoint."""
    shapes = ("width", "depth", "patch_size", "n_registers", "n_cls", "swiglu", "hidden", "layer_scale", "pre_norm")
    rotary = (known.rope_theta is None) == (inferred.rope_theta is None)
    fits = rotary and all(getattr(known, name) == getattr(inferred, name) for name in shapes)
    return fits and grid in (None, side)
