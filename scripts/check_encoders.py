"""Check the vision transformer against the real timm, open_clip and transformers, in an environment of their own.

    python3 -m venv .venv-encoders
    .venv-encoders/bin/pip install -c constraints.txt torch numpy pillow safetensors
    .venv-encoders/bin/pip install --no-deps timm open_clip_torch torchvision
    .venv-encoders/bin/pip install transformers pyyaml ftfy regex tqdm
    PYTHONPATH=. .venv-encoders/bin/python scripts/check_encoders.py

Builds every network with random weights, saves it as its package does, loads it with ours and compares the tokens of
two blocks for random pixels, also at another size of images. A line each; exit code 1 if one differs by more than 1e-5.
"""

import itertools
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

# torchvision does not import beside the CPU build of torch unless its operators are declared.
_OPERATORS = torch.library.Library("torchvision", "DEF")
_OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
_OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import open_clip  # noqa: E402
import timm  # noqa: E402
import transformers  # noqa: E402
from timm.models import save_for_hf  # noqa: E402

from cytosae.backbones.backbone import describe_backbone, load_backbone  # noqa: E402
from cytosae.backbones.preprocessing import StatedTransform  # noqa: E402

_GATED = {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": torch.nn.SiLU}

# Fewer blocks than the published networks have, all else as published; every block is alike.
_TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "UNI": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "UNI2-h": (
        "vit_giant_patch14_224",
        {"init_values": 1e-5, "embed_dim": 1536, "num_heads": 24, "mlp_ratio": 2.66667 * 2, "reg_tokens": 8,
         "no_embed_class": True, **_GATED},
    ),
    "Virchow": ("vit_huge_patch14_224", {"init_values": 1e-5, "mlp_ratio": 5.3375, **_GATED}),
    "Virchow2": ("vit_huge_patch14_224", {"init_values": 1e-5, "mlp_ratio": 5.3375, "reg_tokens": 4, **_GATED}),
    "H-optimus": ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5}),
    "H0-mini": ("vit_base_patch14_reg4_dinov2", {"img_size": 224, "mlp_ratio": 2.66667 * 2, **_GATED}),
    "Prov-GigaPath": (
        "vit_giant_patch14_dinov2", {"img_size": 224, "patch_size": 16, "init_values": 1e-5},
    ),
    "Kaiko S/8": ("vit_small_patch8_224", {}),
    "Kaiko B/16": ("vit_base_patch16_224", {}),
    "Kaiko L/14": ("vit_large_patch14_reg4_dinov2", {"img_size": 224}),
    "DINOv2 S": ("vit_small_patch14_dinov2", {}),
    "DINOv2 S reg4": ("vit_small_patch14_reg4_dinov2", {}),
    "DINOv2 g": ("vit_giant_patch14_dinov2", {}),
    "DINO ViT-Tiny": ("vit_tiny_patch16_224", {}),
    "DINOv3 S/16": ("vit_small_patch16_dinov3", {}),
    "DINOv3 B/16 with biases": ("vit_base_patch16_dinov3_qkvb", {}),
    "DINOv3 H+/16": ("vit_huge_plus_patch16_dinov3", {}),
    "CLIP B/32": ("vit_base_patch32_clip_224", {}),
    "CLIP L/14, QuickGELU": ("vit_large_patch14_clip_quickgelu_336", {}),
    "SigLIP B/16": ("vit_base_patch16_siglip_224", {}),
    "SigLIP L/16 512 (tanh)": ("vit_large_patch16_siglip_512", {}),
    "SigLIP so400m/14 384": ("vit_so400m_patch14_siglip_384", {}),
    "DeiT III S/16": ("deit3_small_patch16_224", {}),
    "DeiT S/16, distilled": ("deit_small_distilled_patch16_224", {}),
    "SigLIP 2 giantopt/16": ("vit_giantopt_patch16_siglip_256", {}),
    "SigLIP B/32 256, no head (tanh)": ("vit_base_patch32_siglip_gap_256", {}),
    "CLIP g/14": ("vit_giant_patch14_clip_224", {}),
    "ViT so150m/16": ("vit_so150m_patch16_reg4_gap_256", {}),
}  # fmt: skip
_OPEN_CLIP = ("ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14-336", "ViT-B-16-SigLIP")
_DEPTH = 3

_B = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_L = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
_TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Dinov2 B/14": ("Dinov2", {"hidden_size": 768, "num_attention_heads": 12, "image_size": 518}),
    "Dinov2 g/14 (Midnight)": (
        "Dinov2", {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True, "image_size": 518}
    ),
    "Phikon-v2 (Dinov2 L/16)": ("Dinov2", {"hidden_size": 1024, "num_attention_heads": 16, "patch_size": 16}),
    "Dinov2WithRegisters B/14 (Hibou)": (
        "Dinov2WithRegisters",
        {"hidden_size": 768, "num_attention_heads": 12, "num_register_tokens": 4, "image_size": 518, "patch_size": 14},
    ),
    "DINOv3 B/16": ("DINOv3ViT", {**_B, "num_register_tokens": 4}),
    "DINOv3 H+/16": (
        "DINOv3ViT",
        {"hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120, "use_gated_mlp": True,
         "hidden_act": "silu", "num_register_tokens": 4},
    ),
    "ViT B/16 (Phikon)": ("ViT", _B),
    "DeiT B/16, distilled": ("DeiT", _B),
    "I-JEPA B/16": ("IJepa", _B),
    "CLIP L/14 at 336": ("CLIPVision", {**_L, "patch_size": 14, "image_size": 336}),
    "SigLIP so400m/14 at 384": (
        "SiglipVision",
        {"hidden_size": 1152, "num_attention_heads": 16, "intermediate_size": 4304, "patch_size": 14,
         "image_size": 384},
    ),
}  # fmt: skip


def main() -> None:
    """Check every network."""
    torch.manual_seed(0)
    differing = 0
    for name, errors in itertools.chain(_check_timm(), _check_open_clip(), _check_transformers()):
        same = all(error < 1e-5 for error in errors.values())
        differing += not same
        figures = ", ".join(f"{where} {error:.1e}" for where, error in errors.items())
        print(f"{name}: {'same' if same else 'DIFFERENT'}, relative error {figures}", flush=True)
    versions = (("timm", timm), ("open_clip", open_clip), ("transformers", transformers), ("torch", torch))
    print(", ".join(f"{name} {module.__version__}" for name, module in versions))
    sys.exit(1 if differing else 0)


def _check_timm() -> Iterator[tuple[str, dict[str, float]]]:
    """Networks of timm, saved as it pushes them to the hub."""
    for name, (architecture, options) in _TIMM.items():
        model = timm.create_model(architecture, depth=_DEPTH, num_classes=0, **options).eval()
        _randomise(model)
        with tempfile.TemporaryDirectory() as folder:
            # timm itself saves the other arguments; layers are saved by name.
            layers = {"mlp_layer": "swiglu_packed", "act_layer": "silu"} if "mlp_layer" in options else {}
            save_for_hf(model, folder, model_args={"depth": _DEPTH, **layers})
            yield f"timm {name}", _compare(model, model.blocks, Path(folder))


def _check_open_clip() -> Iterator[tuple[str, dict[str, float]]]:
    """Vision towers of open_clip, saved as a folder of its own form."""
    for name in _OPEN_CLIP:
        model = open_clip.create_model(name, pretrained=None).eval()
        _randomise(model.visual)
        config = {
            "model_cfg": open_clip.get_model_config(name),
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
        }
        blocks = model.visual.trunk.blocks if hasattr(model.visual, "trunk") else model.visual.transformer.resblocks
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "open_clip_config.json").write_text(json.dumps(config))
            torch.save(model.state_dict(), Path(folder) / "open_clip_pytorch_model.bin")
            yield f"open_clip {name}", _compare(model.visual, blocks, Path(folder), other_sizes=False)


def _check_transformers() -> Iterator[tuple[str, dict[str, float]]]:
    """Models of transformers, saved by themselves."""
    for name, (kind, options) in _TRANSFORMERS.items():
        config = getattr(transformers, f"{kind}Config")(**options, num_hidden_layers=_DEPTH)
        model = getattr(transformers, f"{kind}Model")(config).eval()
        _randomise(model)
        (blocks,) = [item for item in model.modules() if isinstance(item, torch.nn.ModuleList) and len(item) == _DEPTH]
        size = config.image_size
        stated = {"size": {"height": size, "width": size}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            (Path(folder) / "preprocessor_config.json").write_text(json.dumps(stated))
            yield f"transformers {name}", _compare(model, blocks, Path(folder), other_sizes=False)


def _randomise(model: torch.nn.Module) -> None:
    """Make every parameter matter: new biases are 0, gains 1, and LayerScale 1e-5."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 + (0.3 if parameter.ndim == 1 else 0))


def _compare(
    model: torch.nn.Module, blocks: torch.nn.ModuleList, folder: Path, *, other_sizes: bool = True
) -> dict[str, float]:
    """Relative error of the last two blocks' tokens, and of those of larger images if the network takes them."""
    info = describe_backbone(folder, name=None, block=-2)
    errors = {}
    for block in (-2, -1):
        errors[f"block {block}"] = _error(model, blocks, folder, info.image_size, block)
    if other_sizes and getattr(model, "pos_embed", None) is not None:
        model.set_input_size(img_size=(size := (info.grid[0] + 4) * info.patch_size, size))  # type: ignore[operator]
        errors[f"{size} pixels"] = _error(model, blocks, folder, size, -2)
    return errors


def _error(model: torch.nn.Module, blocks: torch.nn.ModuleList, folder: Path, size: int, block: int) -> float:
    """Norm of the difference of one block's tokens over the norm of theirs."""
    pixels = torch.randn(1, 3, size, size)
    caught: list[torch.Tensor] = []
    hook = blocks[block].register_forward_hook(lambda module, inputs, output: caught.append(output))
    with torch.inference_mode():
        model(pixels)
        hook.remove()
        info = describe_backbone(folder, name=None, block=block, preprocessing=StatedTransform(size=size))
        found = load_backbone(folder, info)(pixels)
    return float((found - caught[0]).norm() / caught[0].norm())


if __name__ == "__main__":
    main()
