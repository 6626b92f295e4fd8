"""DINOv2 and DinoBloom checkpoints, checked strictly and loaded into transformers' Dinov2 classes."""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cytosae.backbones.images import IMAGE_SIZE

State = Mapping[str, torch.Tensor]

_MAX_LISTED = 12


class BackboneError(ValueError):
    """A vision transformer cannot be used; the message states what was found and what was expected."""


class BackboneNotFoundError(BackboneError, FileNotFoundError):
    """The file or folder does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class VitArchitecture:
    """Shape of a DINOv2 network."""

    name: str
    """Name on the command line."""
    width: int
    """Channels D."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    patch_size: int = 14
    """Pixels along a patch's side."""
    mlp_ratio: int = 4
    """Hidden width of the MLP over D."""
    n_registers: int = 0
    """Register tokens."""
    swiglu: bool = False
    """Whether the MLP is a SwiGLU, as in the giant network."""

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP; a SwiGLU has two thirds of it, rounded up to a multiple of 8, as DINOv2 does."""
        hidden = self.width * self.mlp_ratio
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.swiglu else hidden


_SIZES = {
    "dinov2_vits14": VitArchitecture("dinov2_vits14", 384, 12, 6),
    "dinov2_vitb14": VitArchitecture("dinov2_vitb14", 768, 12, 12),
    "dinov2_vitl14": VitArchitecture("dinov2_vitl14", 1024, 24, 16),
    "dinov2_vitg14": VitArchitecture("dinov2_vitg14", 1536, 40, 24, swiglu=True),
}

VIT_ARCHITECTURES: dict[str, VitArchitecture] = {
    **_SIZES,
    **{
        f"{name}_reg": VitArchitecture(
            f"{name}_reg", size.width, size.depth, size.heads, n_registers=4, swiglu=size.swiglu
        )
        for name, size in _SIZES.items()
    },
}
"""Known networks by name. DinoBloom-S/B/L/G are the four without registers."""


def read_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Tensors of a checkpoint under DINOv2's own names, memory-mapped where possible.

    Accepts `{'teacher': {'backbone.<key>': ...}}` (heads are dropped), `{'state_dict': ...}` and a bare state dict.
    Keys of chunked blocks (`blocks.<chunk>.<i>.`, i counted through the whole network) lose the chunk.

    Returns:
        The tensors, and the architecture that the file states, if any.

    Raises:
        BackboneError: If the file is damaged, is not a checkpoint, or contains Python objects.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            value: Any = load_file(path)
        else:
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise BackboneError(
            f"'{path}' contains Python objects or is not a torch checkpoint; nothing in it was executed. Save the "
            "tensors alone: torch.save(model.state_dict(), PATH)"
        ) from error
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BackboneError(f"'{path}' is not a readable checkpoint: {first}") from error
    stated = value.get("architecture") if isinstance(value, dict) else None
    if isinstance(value, dict) and isinstance(value.get("teacher"), dict):
        value = _strip_teacher(value["teacher"], path)
    elif isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict) or not all(isinstance(item, torch.Tensor) for item in value.values()):
        found = _listed(sorted(map(str, value))) if isinstance(value, dict) else type(value).__name__
        raise BackboneError(f"'{path}' does not contain a state dict of tensors; found {found}")
    if stated is not None and not isinstance(stated, dict):
        raise BackboneError(f"'{path}' states its architecture as a {type(stated).__name__}, expected a dict")
    # A key that is not a string matches nothing and is reported as unknown.
    plain = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", str(key)): item for key, item in value.items()}
    if len(plain) != len(value):
        raise BackboneError(
            f"'{path}' numbers its blocks in an unknown way: {len(value)} keys become {len(plain)} without the chunk's "
            "number in blocks.<chunk>.<i>. Save it with plain names, blocks.<i>."
        )
    return plain, stated


def choose_architecture(
    state: State, stated: Mapping[str, Any] | None, name: str | None, path: Path
) -> VitArchitecture:
    """The architecture that the file states, that has the name, or that fits the shapes, in this order.

    If the file states its architecture, the name is only a label. Real DINOv2 and DinoBloom files do not state one, so
    for them the name decides.

    Raises:
        BackboneError: If the statement is invalid, the name is unknown, or the shapes fit no known network.
    """
    if stated is not None:
        return _stated_architecture(stated, path)
    if name is not None:
        known = name[:-1] if name.endswith("_reg4") else name
        if known not in VIT_ARCHITECTURES:
            raise BackboneError(f"model_name {name!r} is unknown; known are {', '.join(VIT_ARCHITECTURES)}")
        return VIT_ARCHITECTURES[known]
    guess = guess_architecture(state)
    if guess is None:
        width = tuple(state["cls_token"].shape) if "cls_token" in state else "none"
        raise BackboneError(
            f"'{path}' fits no known network (cls_token: {width}); known are {', '.join(VIT_ARCHITECTURES)}. "
            "Is it a DINOv2 or DinoBloom checkpoint?"
        )
    return guess


def guess_architecture(state: State) -> VitArchitecture | None:
    """The known network with the width and registers of the state; None if there is none."""
    cls, registers = state.get("cls_token"), state.get("register_tokens")
    width = cls.shape[-1] if cls is not None and cls.ndim == 3 else 0
    n_registers = registers.shape[1] if registers is not None and registers.ndim == 3 else 0
    return next(
        (item for item in VIT_ARCHITECTURES.values() if (item.width, item.n_registers) == (width, n_registers)), None
    )


def expected_shapes(architecture: VitArchitecture) -> dict[str, tuple[int, ...]]:
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


def check_state(state: State, architecture: VitArchitecture, path: Path) -> None:
    """Check every key and shape, including those of blocks that will be dropped.

    Raises:
        BackboneError: If a key is missing or unknown, or a tensor has another shape or is not a dense floating-point
            tensor; the message lists all problems.
    """
    expected = expected_shapes(architecture)
    optional = {"pos_embed", "mask_token"}
    problems = [f"missing {key}" for key in [*expected, "pos_embed"] if key not in state]
    problems += [f"unknown {key}" for key in state if key not in expected and key not in optional]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    problems += [
        f"{key} is a {item.layout} tensor of {item.dtype} on {item.device}, expected a dense floating-point tensor"
        for key, item in state.items()
        if not item.is_floating_point() or item.layout is not torch.strided or item.device.type != "cpu"
    ]
    if "pos_embed" in state:
        shape = tuple(state["pos_embed"].shape)
        side = round((shape[1] - 1) ** 0.5) if len(shape) == 3 and shape[1] > 1 else 0
        if not side or shape != (1, side * side + 1, architecture.width):
            problems.append(f"pos_embed has shape {shape}, expected (1, 1 + a square, {architecture.width})")
    if problems:
        guess = guess_architecture(state)
        # Another name does not help if the file states its architecture.
        helps = guess not in (None, architecture) and architecture in VIT_ARCHITECTURES.values()
        hint = f" (this looks like {guess.name}: pass --model_name {guess.name})" if guess and helps else ""
        raise BackboneError(f"'{path}' is not {architecture.name}{hint}: {'; '.join(problems)}")


def interpolate_positions(table: torch.Tensor, grid: tuple[int, int], *, with_registers: bool) -> torch.Tensor:
    """The position table interpolated to another grid of patches, as DINOv2 does it.

    Bicubic in float32. Networks without registers use no antialiasing and the scale factor `(side + 0.1) / sqrt(N)`;
    networks with registers use antialiasing and the exact size. The formula is `interpolate_pos_encoding` of DINOv2's
    `dinov2/models/vision_transformer.py`, the settings those of its published models, `dinov2/hub/backbones.py`.

    Args:
        table: Shape `(1, 1 + N, D)`, where N is a square; the CLS token comes first.
        grid: Requested patch rows and columns.
        with_registers: Whether the network has register tokens.

    Returns:
        Float32, shape `(1, 1 + rows * columns, D)`; the same numbers if the grid fits already.
    """
    n, width = table.shape[1] - 1, table.shape[2]
    table = table.float()
    if n == grid[0] * grid[1] and grid[0] == grid[1]:
        return table
    side = round(n**0.5)
    patches = table[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
    if with_registers:
        patches = nn.functional.interpolate(patches, size=grid, mode="bicubic", antialias=True)
    else:
        scale = [float(wanted + 0.1) / side for wanted in grid]
        patches = nn.functional.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    if tuple(patches.shape[-2:]) != grid:
        raise BackboneError(
            f"a position table of {side} x {side} was interpolated to {tuple(patches.shape[-2:])}, expected {grid}"
        )
    return torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).reshape(1, -1, width)], dim=1)


def load_model(
    state: State, architecture: VitArchitecture, n_blocks: int, grid: tuple[int, int], path: Path
) -> nn.Module:
    """Build transformers' model of the first blocks with the checkpoint's weights in float32.

    Raises:
        BackboneError: If the model of the installed transformers has unexpected parameters.
    """
    model = _make_empty_model(architecture, n_blocks, grid)
    targets = model.state_dict()
    mapped = _map_embeddings(state, architecture, grid)
    for block in range(n_blocks):
        mapped |= _map_block(state, architecture, block, set(targets))
    if "embeddings.mask_token" in targets:
        mapped["embeddings.mask_token"] = torch.zeros(targets["embeddings.mask_token"].shape)
    # Copied: a float32 weight would otherwise remain a view of the mapped file and change with it.
    copies = {name: tensor.to(torch.float32, copy=True) for name, tensor in mapped.items()}
    try:
        model.load_state_dict(copies, assign=True)
    except RuntimeError as error:
        raise BackboneError(
            f"the installed transformers has other parameter names in {type(model).__name__}: {error}"
        ) from error
    return model


def _make_empty_model(architecture: VitArchitecture, n_blocks: int, grid: tuple[int, int]) -> nn.Module:
    """The transformers model on the meta device."""
    import transformers

    options: dict[str, Any] = {
        "hidden_size": architecture.width,
        "num_hidden_layers": n_blocks,
        "num_attention_heads": architecture.heads,
        "mlp_ratio": architecture.mlp_ratio,
        "use_swiglu_ffn": architecture.swiglu,
        "image_size": grid[0] * architecture.patch_size,
        "patch_size": architecture.patch_size,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "attn_implementation": "sdpa",
    }
    with torch.device("meta"):
        if architecture.n_registers:
            config = transformers.Dinov2WithRegistersConfig(**options, num_register_tokens=architecture.n_registers)
            return transformers.Dinov2WithRegistersModel(config)  # type: ignore[no-any-return]
        return transformers.Dinov2Model(transformers.Dinov2Config(**options))  # type: ignore[no-any-return]


def _map_embeddings(state: State, architecture: VitArchitecture, grid: tuple[int, int]) -> dict[str, torch.Tensor]:
    """All parameters outside the blocks, under transformers' names."""
    positions = interpolate_positions(state["pos_embed"], grid, with_registers=architecture.n_registers > 0)
    mapped = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.position_embeddings": positions,
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    if architecture.n_registers:
        mapped["embeddings.register_tokens"] = state["register_tokens"]
    return mapped


def _map_block(state: State, architecture: VitArchitecture, block: int, targets: set[str]) -> dict[str, torch.Tensor]:
    """Parameters of one block under the names of the installed transformers.

    The fused `qkv` is split. Transformers 5 renamed the attention layers and split the SwiGLU into its halves.
    """
    source, target = f"blocks.{block}.", f"encoder.layer.{block}."

    def pick(*names: str) -> str:
        return next((target + name for name in names if f"{target}{name}.weight" in targets), target + names[0])

    mapped = {f"{target}layer_scale{number}.lambda1": state[f"{source}ls{number}.gamma"] for number in (1, 2)}
    for kind in ("weight", "bias"):
        for norm in ("norm1", "norm2"):
            mapped[f"{target}{norm}.{kind}"] = state[f"{source}{norm}.{kind}"]
        query, key, value = state[f"{source}attn.qkv.{kind}"].chunk(3)
        mapped[f"{pick('attention.q_proj', 'attention.attention.query')}.{kind}"] = query
        mapped[f"{pick('attention.k_proj', 'attention.attention.key')}.{kind}"] = key
        mapped[f"{pick('attention.v_proj', 'attention.attention.value')}.{kind}"] = value
        mapped[f"{pick('attention.o_proj', 'attention.output.dense')}.{kind}"] = state[f"{source}attn.proj.{kind}"]
        if not architecture.swiglu:
            for layer in ("fc1", "fc2"):
                mapped[f"{target}mlp.{layer}.{kind}"] = state[f"{source}mlp.{layer}.{kind}"]
        elif f"{target}mlp.gate_proj.weight" in targets:
            gate, up = state[f"{source}mlp.w12.{kind}"].chunk(2)
            mapped |= {f"{target}mlp.gate_proj.{kind}": gate, f"{target}mlp.up_proj.{kind}": up}
            mapped[f"{target}mlp.down_proj.{kind}"] = state[f"{source}mlp.w3.{kind}"]
        else:
            mapped[f"{target}mlp.weights_in.{kind}"] = state[f"{source}mlp.w12.{kind}"]
            mapped[f"{target}mlp.weights_out.{kind}"] = state[f"{source}mlp.w3.{kind}"]
    return mapped


def _stated_architecture(stated: Mapping[str, Any], path: Path) -> VitArchitecture:
    """The architecture that a file states, checked."""
    known = {field.name: field.type for field in fields(VitArchitecture)}
    values = dict(stated)
    values["name"] = values.get("name") or path.stem
    kinds = {"name": str, "swiglu": bool}
    wrong = [
        f"{name}={value!r}"
        for name, value in values.items()
        if name not in known
        or not isinstance(value, kinds.get(name, int))
        or (name != "swiglu" and isinstance(value, bool))
    ]
    try:
        architecture = VitArchitecture(**values)
    except TypeError:
        raise BackboneError(f"'{path}' states the architecture {stated!r}; expected {', '.join(known)}") from None
    ranges = {"width": 1 << 16, "depth": 1000, "heads": 1 << 10, "patch_size": IMAGE_SIZE, "mlp_ratio": 64}
    fits = all(1 <= getattr(architecture, key) <= top for key, top in ranges.items()) if not wrong else False
    if not fits or architecture.width % architecture.heads or not 0 <= architecture.n_registers <= 64:
        raise BackboneError(f"'{path}' states an impossible architecture: {', '.join(wrong) or values}")
    if IMAGE_SIZE % architecture.patch_size:
        raise BackboneError(
            f"'{path}' states patches of {architecture.patch_size} pixels, which do not tile an image of {IMAGE_SIZE}"
        )
    return architecture


def _strip_teacher(teacher: Mapping[Any, Any], path: Path) -> dict[str, Any]:
    """The backbone of a training checkpoint under bare names; unexpected keys are kept for the check to find."""
    names = [str(key) for key in teacher]
    if not any(name.startswith("backbone.") for name in names):
        raise BackboneError(f"'{path}' has a 'teacher' without 'backbone.' keys: {_listed(sorted(names))}")
    return {
        name.removeprefix("backbone.") if name.startswith("backbone.") else f"teacher.{name}": item
        for name, item in zip(names, teacher.values(), strict=True)
        if not name.startswith(("dino_head", "ibot_head"))
    }


def _is_zip(path: Path) -> bool:
    """Whether a file has torch's zip format, which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _listed(items: list[str]) -> str:
    """The first items of a list, and the number of the others."""
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return "; ".join(items[:_MAX_LISTED]) + more
