"""What the shapes of an encoder's tensors say, and whether they are those of an architecture."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from cytosae.backbones.errors import BackboneError, listed
from cytosae.backbones.layouts import TRANSFORMERS_DINOV3, FoundEncoder, masked_bias, saved_parts
from cytosae.backbones.preprocessing import MAX_IMAGE_SIZE
from cytosae.backbones.registry import ARCHITECTURES, matching_architectures, usual_heads
from cytosae.backbones.vit import Architecture, VisionTransformer

Shapes = Mapping[str, torch.Tensor]
"""Tensors by our names, without their numbers (on torch's meta device)."""


def infer_architecture(shapes: Shapes, found: FoundEncoder, path: Path) -> Architecture:
    """What the shapes of the tensors say; heads are those of known encoders of the size, or 0 if there are none.

    Raises:
        BackboneError: If there is no first block, or blocks are missing in between.
    """
    patch = shapes["patch_embed.weight"]
    down, up = shapes.get("blocks.0.mlp.fc2.weight"), shapes.get("blocks.0.mlp.fc1.weight")
    problem = _structural_problem(shapes, found)
    if problem or down is None or up is None:
        unknown = f"; unknown {listed(list(found.unknown))}" if found.unknown else ""
        raise BackboneError(
            f"'{path}' is not a vision transformer as {found.layout.name} saves them: {problem}{unknown}"
        )
    width, depth, registers = patch.shape[0], len(_block_numbers(shapes)), shapes.get("registers")
    rotary = "positions" not in shapes and _is_dinov3(found)
    heads = usual_heads(width, depth, rotary=rotary) or 0
    if rotary and "rope_periods" in shapes:
        heads = width // max(1, 4 * shapes["rope_periods"].numel())
    return Architecture(
        "", width, depth, heads,
        patch_size=patch.shape[2],
        n_registers=registers.shape[-2] if registers is not None and registers.ndim >= 2 else 0,
        swiglu=up.shape[0] == 2 * down.shape[1],
        n_cls=int("cls_token" in shapes),
        mlp_hidden=down.shape[1],
        eps=1e-5 if rotary else 1e-6,
        layer_scale="blocks.0.ls1" in shapes,
        pre_norm="norm_pre.weight" in shapes,
        qkv_bias="blocks.0.attn.qkv.bias" in shapes,
        patch_bias="patch_embed.bias" in shapes,
        rope_theta=100.0 if rotary else None,
    )  # fmt: skip


def _is_dinov3(found: FoundEncoder) -> bool:
    """Whether a file without a position table is DINOv3's; a table can also just be missing.

    Its own files contain the periods of rotary positions; timm and transformers name its tensors in ways of their own.
    """
    timm = found.names.get("blocks.0.ls1", "").endswith("gamma_1")
    return "rope_periods" in found.tensors or timm or found.layout is TRANSFORMERS_DINOV3


def fitting_architectures(inferred: Architecture, shapes: Shapes, found: FoundEncoder) -> list[Architecture]:
    """Known encoders with the shapes of a checkpoint.

    Args:
        inferred: What `infer_architecture` says.
        shapes: The tensors, parts joined.
        found: The file's tensors.
    """
    return matching_architectures(
        inferred, table_side(shapes, inferred), in_open_clip=found.is_open_clip_trunk, own_names=found.has_own_names
    )


def count_parameters(shapes: Shapes) -> int:
    """Numbers in all tensors."""
    return sum(item.numel() for item in shapes.values())


def _structural_problem(shapes: Shapes, found: FoundEncoder) -> str:
    """Why the tensors are not those of a vision transformer, if they are not."""
    patch, numbers = shapes["patch_embed.weight"], _block_numbers(shapes)
    if patch.ndim != 4 or patch.shape[2] != patch.shape[3] or not 1 <= patch.shape[2] <= MAX_IMAGE_SIZE:
        return f"its patch embedding has shape {tuple(patch.shape)}, expected (width, 3, patch, patch)"
    if numbers != list(range(len(numbers))):
        gap = next(index for index, number in enumerate(numbers) if index != number)
        there = next(saved for ours, saved in found.names.items() if ours.startswith(f"blocks.{numbers[-1]}."))
        prefix = there.partition(f".{numbers[-1]}.")[0]
        return f"missing all of {prefix}.{gap}, but there is {prefix}.{numbers[-1]}"
    layers = ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight")
    missing = [name for name in layers if name not in shapes or shapes[name].ndim != 2]
    problems = [problem for name in missing for problem in _problems(name, None, shapes, found)]
    return listed(problems)


def _block_numbers(shapes: Shapes) -> list[int]:
    """Numbers of the blocks that there are, in order."""
    return sorted({int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")})


def table_side(shapes: Shapes, architecture: Architecture) -> int | None:
    """Patches along a side of the position table; None if there is none or it is no square."""
    if "positions" not in shapes or architecture.rope_theta is not None or shapes["positions"].ndim < 2:
        return None
    n_rows = shapes["positions"].shape[-2]
    for n_prefix in dict.fromkeys((architecture.n_prefix, architecture.n_cls, 0)):
        side = math.isqrt(max(0, n_rows - n_prefix))
        if side and side * side == n_rows - n_prefix:
            return side
    return None


def count_position_prefix(shapes: Shapes, architecture: Architecture) -> int:
    """Rows of the position table that belong to tokens before the patches: all of them, CLS alone, or none."""
    side = table_side(shapes, architecture)
    return 0 if side is None else shapes["positions"].shape[-2] - side * side


def check_types(found: FoundEncoder, path: Path) -> None:
    """Check that all tensors are dense floating-point numbers in main memory.

    Raises:
        BackboneError: If one is not.
    """
    problems = [
        f"{found.names[ours]} is a {item.layout} tensor of {item.dtype} on {item.device}, expected a dense "
        "floating-point tensor"
        for ours, item in found.tensors.items()
        if not item.is_floating_point() or item.layout is not torch.strided or item.device.type != "cpu"
    ]
    if problems:
        raise BackboneError(f"'{path}' cannot be used: {listed(problems)}")


def check_finite(found: FoundEncoder, n_blocks: int, path: Path) -> None:
    """Check that the tensors of the first blocks, and those outside the blocks, are numbers that float32 represents.

    Args:
        found: The file's tensors, of checked types.
        n_blocks: Blocks that are used.
        path: The checkpoint, for messages.

    Raises:
        BackboneError: If one contains NaN or infinity.
    """
    bad = []
    for ours, tensor in found.tensors.items():
        parts = ours.split(".")
        if (parts[0] == "blocks" and int(parts[1]) >= n_blocks) or ours.endswith(".bias_mask") or not tensor.numel():
            continue
        mask = found.tensors.get(f"{ours}_mask")
        used = tensor if mask is None else masked_bias(tensor, mask)
        low, high = (used if used.dtype.itemsize > 1 else used.float()).aminmax()
        if not (torch.isfinite(low.float()) and torch.isfinite(high.float())):
            bad.append(found.names[ours])
    if bad:
        raise BackboneError(f"weights in '{path}' contain NaN or infinity: {listed(bad)}")


def check_shapes(
    shapes: Shapes, architecture: Architecture, found: FoundEncoder, path: Path, *, described: bool
) -> None:
    """Check every tensor against an architecture.

    Args:
        shapes: The tensors, parts joined.
        architecture: What they should be.
        found: Their names in the file.
        path: The checkpoint, for messages.
        described: Whether a description beside the weights says what they should be.

    Raises:
        BackboneError: If a tensor is missing, unknown, or has another shape.
    """
    if architecture.heads < 1 or architecture.width % architecture.heads:
        raise BackboneError(
            f"'{path}' cannot have {architecture.heads} attention heads: its width {architecture.width} is no multiple "
            "of them"
        )
    expected = _expected_shapes(architecture, found)
    missing = [name for name in expected if name not in shapes]
    if architecture.rope_theta is None and "positions" not in shapes:
        missing.append("positions")
    known = {*expected, "positions" if architecture.rope_theta is None else "rope_periods"}
    known |= {part for name in missing for part in saved_parts(name, found.tensors)}
    problems = [problem for name in missing for problem in _problems(name, expected.get(name), shapes, found)]
    problems += [f"unknown {name}" for name in found.unknown]
    problems += [f"unknown {found.names.get(name, name)}" for name in shapes if name not in known]
    problems += [
        problem
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name].shape) != shape
        for problem in _problems(name, shape, shapes, found)
    ]
    problems += _position_problems(shapes, architecture, found)
    if problems:
        kind = "what its description says" if described else "a whole network"
        expectation = architecture.name or f"{kind} ({found.layout.name})"
        raise BackboneError(
            f"'{path}' is not {expectation}{_hint(shapes, architecture, found, path)}: {listed(problems)}"
        )


def _expected_shapes(architecture: Architecture, found: FoundEncoder) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by our names, apart from positions."""
    with torch.device("meta"):
        network = VisionTransformer(architecture, n_blocks=architecture.depth, grid=(1, 1))
    drop = ("prefix", "positions", "rope_cos", "rope_sin")
    shapes = {name: tuple(item.shape) for name, item in network.state_dict().items() if name not in drop}
    batch = () if found.layout.bare_tokens else (1, 1)
    if architecture.n_cls:
        shapes["cls_token"] = (*batch, architecture.width)
    if architecture.n_registers or "registers" in found.tensors:
        shapes["registers"] = (1, architecture.n_registers, architecture.width)
    return shapes


def _position_problems(shapes: Shapes, architecture: Architecture, found: FoundEncoder) -> list[str]:
    """What is wrong with the position table or the periods of rotary positions."""
    problems, width = [], architecture.width
    table = shapes.get("positions")
    if table is not None and architecture.rope_theta is None:
        ndim = 2 if found.layout.bare_tokens else 3
        side = table_side(shapes, architecture)
        if table.ndim != ndim or table.shape[-1] != width or (ndim == 3 and table.shape[0] != 1) or side is None:
            wanted = "1 + a square" if architecture.n_cls else "a square"
            shape = f"({wanted}, {width})" if ndim == 2 else f"(1, {wanted}, {width})"
            problems.append(f"{found.names['positions']} has shape {tuple(table.shape)}, expected {shape}")
    periods = shapes.get("rope_periods")
    if periods is not None and tuple(periods.shape) != (width // architecture.heads // 4,):
        problems.append(f"{found.names['rope_periods']} has shape {tuple(periods.shape)}")
    return problems


def _problems(ours: str, shape: tuple[int, ...] | None, shapes: Shapes, found: FoundEncoder) -> list[str]:
    """What is wrong with a tensor that is missing or has another shape, by the names in the file.

    Args:
        ours: Its name, parts joined.
        shape: Its shape if it is known.
        shapes: The tensors, parts joined.
        found: The file's tensors.
    """
    if ours in found.names:
        return [f"{found.names[ours]} has shape {tuple(shapes[ours].shape)}, expected {shape}"]
    parts, problems = saved_parts(ours, found.tensors), []
    n_parts = 3 if ".attn.qkv." in ours else len(parts)
    size = None if shape is None or not parts else (shape[0] // n_parts, *shape[1:])
    for part in parts:
        if part not in found.tensors:
            problems.append(f"missing {_saved_name(part, found)}")
        elif tuple(found.tensors[part].shape) != size:
            expected = "" if size is None else f", expected {size}"
            problems.append(f"{found.names[part]} has shape {tuple(found.tensors[part].shape)}{expected}")
    # The parts of a bias are not joined either where those of the weight are at fault.
    is_explained = problems or (parts and f"{ours.removesuffix('.bias')}.weight" not in shapes)
    return problems if is_explained else [f"missing {_saved_name(ours, found)}"]


def _saved_name(ours: str, found: FoundEncoder) -> str:
    """The name under which a missing tensor was looked for, as the file names its neighbours."""
    for name, saved in found.names.items():
        # The same tensor of another block shows how this layout calls it.
        parts, other = ours.split("."), name.split(".")
        if parts[0] == "blocks" == other[0] and parts[2:] == other[2:]:
            return saved.replace(f".{other[1]}.", f".{parts[1]}.", 1)
    plain = {"cls_token": "cls_token", "registers": "register_tokens", "positions": "pos_embed"}
    return plain.get(ours, ours)


def _hint(shapes: Shapes, architecture: Architecture, found: FoundEncoder, path: Path) -> str:
    """The name of a known encoder that fits better, if the name was the user's to choose."""
    if architecture not in ARCHITECTURES.values():
        return ""
    matches = fitting_architectures(infer_architecture(shapes, found, path), shapes, found)
    if not matches or architecture in matches:
        return ""
    return f" (this looks like {matches[0].name}: pass --model_name {matches[0].name})"
