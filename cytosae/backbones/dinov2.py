"""DINOv2's own names and shapes, and checkpoints that state their architecture themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cytosae.backbones.errors import BackboneError
from cytosae.backbones.vit import Architecture

STATED_FIELDS = ("name", "width", "depth", "heads", "patch_size", "mlp_ratio", "n_registers", "swiglu")
"""What a checkpoint's own `architecture` can contain: a network of DINOv2's kind."""


def expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor under DINOv2's names, apart from `pos_embed` and the optional `mask_token`."""
    width, hidden, patch = architecture.width, architecture.hidden, architecture.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if architecture.n_registers:
        shapes["register_tokens"] = (1, architecture.n_registers, width)
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    if architecture.swiglu:
        linear |= {"mlp.w12": (2 * hidden, width), "mlp.w3": (width, hidden)}
    else:
        linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for block in range(architecture.depth):
        prefix = f"blocks.{block}."
        for norm in ("norm1", "norm2"):
            shapes |= {f"{prefix}{norm}.weight": (width,), f"{prefix}{norm}.bias": (width,)}
        for scale in ("ls1", "ls2"):
            shapes[f"{prefix}{scale}.gamma"] = (width,)
        for layer, shape in linear.items():
            shapes |= {f"{prefix}{layer}.weight": shape, f"{prefix}{layer}.bias": shape[:1]}
    return shapes


def read_stated(stated: Mapping[str, Any], path: Path) -> Architecture:
    """The architecture that a checkpoint states, checked.

    Raises:
        BackboneError: If a field is unknown, missing, of another type or out of range.
    """
    values = dict(stated)
    values["name"] = values.get("name") or path.stem
    kinds = {"name": str, "swiglu": bool}
    wrong = [
        f"{name}={value!r}"
        for name, value in values.items()
        if name not in STATED_FIELDS
        or not isinstance(value, kinds.get(name, int))
        or (name != "swiglu" and isinstance(value, bool))
    ]
    if not {"width", "depth", "heads"} <= set(values) or not set(values) <= set(STATED_FIELDS):
        raise BackboneError(f"'{path}' states the architecture {stated!r}; expected {', '.join(STATED_FIELDS)}")
    ranges = {"width": 1 << 16, "depth": 1000, "heads": 1 << 10, "patch_size": 224, "mlp_ratio": 64}
    fits = not wrong and all(1 <= values.get(key, 1) <= top for key, top in ranges.items())
    if not fits or values["width"] % values["heads"] or not 0 <= values.get("n_registers", 0) <= 64:
        raise BackboneError(f"'{path}' states an impossible architecture: {', '.join(wrong) or values}")
    return Architecture(**values, positions="antialias" if values.get("n_registers") else "dinov2")
