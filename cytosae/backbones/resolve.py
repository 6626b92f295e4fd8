"""From a checkpoint to everything about its encoder: architecture, tensors by our names, preprocessing of images."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cytosae.backbones.dinov2 import read_stated
from cytosae.backbones.errors import BackboneError
from cytosae.backbones.layouts import FoundEncoder, find_encoder, join_parts
from cytosae.backbones.positions import fit_positions, rotary_angles, rotary_periods
from cytosae.backbones.preprocessing import ImageTransform, StatedTransform, as_options
from cytosae.backbones.registry import (
    ARCHITECTURES,
    DINOV2,
    find_architecture,
    known_transform,
    matching_architectures,
    usual_heads,
)
from cytosae.backbones.statements import Statement, read_statement
from cytosae.backbones.vit import Architecture, VisionTransformer
from cytosae.backbones.weights import Checkpoint, listed

_TOKEN_NAMES = ("cls_token", "registers", "positions", "rope_periods")
"""Tensors that have no parameter of their own in `VisionTransformer`."""


@dataclass(frozen=True)
class Encoder:
    """A vision transformer in a checkpoint, checked against its description."""

    path: Path
    """File or folder."""
    architecture: Architecture
    """What it consists of."""
    found: FoundEncoder
    """Its tensors."""
    n_position_prefix: int
    """Rows of the position table that belong to tokens before the patches."""
    transform: ImageTransform
    """How it wants its images."""
    notes: tuple[str, ...]
    """What a user should know: parts left out, what was assumed."""

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns of its images."""
        side = self.transform.size // self.architecture.patch_size
        return side, side


def resolve_encoder(checkpoint: Checkpoint, name: str | None, options: StatedTransform) -> Encoder:
    """Decide what a checkpoint is, and check every tensor of it, those of blocks that will be dropped included.

    What decides is, in this order: the architecture that the file states, the description beside the weights, the
    name, and the shapes.

    Args:
        checkpoint: The checkpoint.
        name: Name of a known encoder where nothing states the architecture, else only a label.
        options: What the user states of the images; it takes precedence.

    Raises:
        BackboneError: If no encoder is found, it contradicts its description, or nothing says how it wants its images.
    """
    found = find_encoder(checkpoint)
    _check_types(found, checkpoint.path)
    shapes = join_parts({ours: tensor.to("meta") for ours, tensor in found.tensors.items()})
    inferred = _infer(shapes, found, checkpoint.path)
    if checkpoint.stated is not None:
        architecture = read_stated(checkpoint.stated, checkpoint.path)
        statement = Statement(architecture.name, suggestion=ImageTransform(), assume=True)
    elif (described := read_statement(checkpoint)) is not None:
        statement, architecture = described, dataclasses.replace(inferred, **described.facts)
    else:
        statement, architecture = _recognise(inferred, shapes, found, name, options, checkpoint.path)
    side = _table_side(shapes, architecture)
    if not architecture.heads:
        raise _unknown(architecture, found, checkpoint.path)
    _check_shapes(shapes, architecture, found, checkpoint.path)
    transform, note = _choose_transform(statement, options, side, architecture, checkpoint)
    notes = [f"left out, no token depends on them: {listed(list(found.left_out))}"] if found.left_out else []
    label = name or statement.name
    return Encoder(
        checkpoint.path,
        dataclasses.replace(architecture, name=label),
        found,
        _position_prefix(shapes, architecture),
        transform,
        tuple(filter(None, [*notes, statement.note, *note])),
    )


def build_network(encoder: Encoder, n_blocks: int) -> VisionTransformer:
    """The first blocks of an encoder, with weights in float32; the tensors of later blocks are not read."""
    kept = {f"blocks.{index}" for index in range(n_blocks)}
    tensors = join_parts(
        {
            name: tensor
            for name, tensor in encoder.found.tensors.items()
            if not name.startswith("blocks.") or ".".join(name.split(".")[:2]) in kept
        }
    )
    with torch.device("meta"):
        network = VisionTransformer(encoder.architecture, n_blocks=n_blocks, grid=encoder.grid)
    weights = {name: tensor for name, tensor in tensors.items() if name not in _TOKEN_NAMES}
    weights |= _token_weights(tensors, encoder)
    # Copied: a float32 weight would otherwise remain a view of the mapped file and change with it.
    network.load_state_dict({name: item.to(torch.float32, copy=True) for name, item in weights.items()}, assign=True)
    return network.requires_grad_(False)


def _token_weights(tensors: Mapping[str, torch.Tensor], encoder: Encoder) -> dict[str, torch.Tensor]:
    """Tokens before the patches with their positions added, and the positions of the patches."""
    architecture, width = encoder.architecture, encoder.architecture.width
    tokens = [tensors[name].reshape(-1, width).float() for name in ("cls_token", "registers") if name in tensors]
    prefix = torch.cat(tokens) if tokens else torch.empty(0, width)
    if architecture.rope_theta is not None:
        periods = tensors.get("rope_periods", rotary_periods(architecture.rope_theta, width // architecture.heads))
        cos, sin = rotary_angles(encoder.grid, periods, n_prefix=architecture.n_prefix)
        return {"prefix": prefix, "rope_cos": cos, "rope_sin": sin}
    table = tensors["positions"].reshape(1, -1, width)
    rows, positions = fit_positions(
        table, encoder.grid, n_prefix=encoder.n_position_prefix, rule=architecture.positions
    )
    prefix = prefix.clone()
    prefix[: len(rows)] += rows
    return {"prefix": prefix, "positions": positions}


def _infer(shapes: Mapping[str, torch.Tensor], found: FoundEncoder, path: Path) -> Architecture:
    """What the shapes of the tensors say; heads are those of known encoders of the size, or 1 if there are none."""
    patch = shapes["patch_embed.weight"]
    depth = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")), default=-1)
    down, up = shapes.get("blocks.0.mlp.fc2.weight"), shapes.get("blocks.0.mlp.fc1.weight")
    if patch.ndim != 4 or not depth or down is None or up is None or min(down.ndim, up.ndim) != 2:
        missing = [name for name in ("blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight") if name not in shapes]
        what = (
            f"missing {'; missing '.join(missing)}" if missing else f"its patch embedding has {patch.ndim} dimensions"
        )
        raise BackboneError(
            f"'{path}' is not a vision transformer as {found.layout.name} saves them: {what}"
            + (f"; unknown {listed(list(found.unknown))}" if found.unknown else "")
        )
    width, rotary = patch.shape[0], "positions" not in shapes and "rope_periods" in shapes
    registers = shapes.get("registers")
    rotary = rotary or ("positions" not in shapes and registers is not None)
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


def _recognise(
    inferred: Architecture,
    shapes: Mapping[str, torch.Tensor],
    found: FoundEncoder,
    name: str | None,
    options: StatedTransform,
    path: Path,
) -> tuple[Statement, Architecture]:
    """An encoder that nothing describes: by its name, or by its shapes.

    Raises:
        BackboneError: If the name is unknown, or if the shapes do not decide.
    """
    if name is not None and name != _plain_name(inferred):
        known = find_architecture(name)
        if known is None:
            raise BackboneError(f"model_name {name!r} is unknown; known are {', '.join(ARCHITECTURES)}")
        return _known(known), _as_saved(known, inferred)
    side = _table_side(shapes, inferred)
    matches = matching_architectures(inferred, side, in_open_clip=found.prefix.endswith("visual.trunk."))
    if found.layout.bare_tokens and not inferred.pre_norm:
        matches = []
    own = {(known_transform(item.name), item.activation, item.eps) for item in matches}
    if len(own) == 1:
        note = f"recognised as {matches[0].name} by its shapes; if it is another encoder, say how it wants its images"
        statement = dataclasses.replace(_known(matches[0]), note="" if matches[0].name in DINOV2 else note)
        return statement, _as_saved(matches[0], inferred)
    if matches and len({(item.heads, item.activation, item.eps) for item in matches}) == 1 and options.mean:
        return Statement(_plain_name(inferred)), dataclasses.replace(matches[0], positions="antialias")
    if matches:
        names = ", ".join(item.name for item in matches)
        raise BackboneError(
            f"'{path}' has the shapes of several encoders, which differ in their preprocessing or activation "
            f"function; known are {names}. Say which with --model_name"
        )
    rule = found.layout.name.startswith("transformers")
    return Statement(_plain_name(inferred)), dataclasses.replace(inferred, positions="plain" if rule else "antialias")


def _known(architecture: Architecture) -> Statement:
    """What the registry says of an encoder."""
    transform = known_transform(architecture.name)
    stated = StatedTransform(**dataclasses.asdict(transform))
    is_dinov2 = architecture.name in DINOV2
    return Statement(
        architecture.name, transform=StatedTransform() if is_dinov2 else stated, suggestion=transform, assume=is_dinov2
    )


def _as_saved(known: Architecture, inferred: Architecture) -> Architecture:
    """A known encoder, with a bias of queries, keys and values or without one, as DINOv3's are saved."""
    return dataclasses.replace(known, qkv_bias=inferred.qkv_bias) if known.rope_theta else known


def _plain_name(architecture: Architecture) -> str:
    """A name for an encoder that has none, from its shapes, so that it does not change with the file's place."""
    return f"vit_{architecture.width}x{architecture.depth}_patch{architecture.patch_size}"


def _unknown(inferred: Architecture, found: FoundEncoder, path: Path) -> BackboneError:
    """The error for sizes whose number of attention heads is not known."""
    near = min(
        ARCHITECTURES.values(), key=lambda item: abs(item.width - inferred.width) + 8 * abs(item.depth - inferred.depth)
    )
    return BackboneError(
        f"'{path}' fits no known network: {inferred.depth} blocks of width {inferred.width} with patches of "
        f"{inferred.patch_size} pixels, saved as {found.layout.name} does; nearest is {near.name} ({near.depth} blocks "
        f"of width {near.width}, patches of {near.patch_size}). Tensors do not say how many attention heads there are: "
        "pass a folder whose config.json states them (num_attention_heads, or model_args.num_heads in timm's)"
    )


def _table_side(shapes: Mapping[str, torch.Tensor], architecture: Architecture) -> int | None:
    """Patches along a side of the position table; None if there is none or it is no square."""
    if "positions" not in shapes or architecture.rope_theta is not None or shapes["positions"].ndim < 2:
        return None
    n_rows = shapes["positions"].shape[-2]
    for n_prefix in dict.fromkeys((architecture.n_prefix, architecture.n_cls, 0)):
        side = math.isqrt(max(0, n_rows - n_prefix))
        if side and side * side == n_rows - n_prefix:
            return side
    return None


def _position_prefix(shapes: Mapping[str, torch.Tensor], architecture: Architecture) -> int:
    """Rows of the position table that belong to tokens before the patches: all of them, CLS alone, or none."""
    side = _table_side(shapes, architecture)
    return 0 if side is None else shapes["positions"].shape[-2] - side * side


def _check_types(found: FoundEncoder, path: Path) -> None:
    """Raise if a tensor is not made of dense floating-point numbers."""
    problems = [
        f"{found.names[ours]} is a {item.layout} tensor of {item.dtype} on {item.device}, expected a dense "
        "floating-point tensor"
        for ours, item in found.tensors.items()
        if not item.is_floating_point() or item.layout is not torch.strided or item.device.type != "cpu"
    ]
    if problems:
        raise BackboneError(f"'{path}' cannot be used: {listed(problems)}")


def _check_shapes(
    shapes: Mapping[str, torch.Tensor], architecture: Architecture, found: FoundEncoder, path: Path
) -> None:
    """Raise if a tensor is missing, unknown, or has another shape than the architecture's."""
    if architecture.heads < 1 or architecture.width % architecture.heads:
        raise BackboneError(
            f"'{path}' cannot have {architecture.heads} attention heads: its width {architecture.width} is no multiple "
            "of them"
        )
    expected = _expected_shapes(architecture, found)
    named = {ours: found.names.get(ours, ours) for ours in [*expected, *shapes]}
    missing = [name for name in expected if name not in shapes]
    if architecture.rope_theta is None and "positions" not in shapes:
        missing.append("positions")
        named["positions"] = "a position table"
    optional = {"positions"} if architecture.rope_theta is None else {"rope_periods"}
    problems = [f"missing {_saved_name(name, found)}" for name in missing]
    problems += [f"unknown {name}" for name in found.unknown]
    problems += [f"unknown {named[name]}" for name in shapes if name not in expected and name not in optional]
    problems += [
        f"{named[name]} has shape {tuple(shapes[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in shapes and tuple(shapes[name].shape) != shape
    ]
    problems += _position_problems(shapes, architecture, found)
    if problems:
        described = architecture.name or f"what its description says ({found.layout.name})"
        raise BackboneError(
            f"'{path}' is not {described}{_hint(shapes, architecture, found, path)}: {listed(problems)}"
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


def _position_problems(
    shapes: Mapping[str, torch.Tensor], architecture: Architecture, found: FoundEncoder
) -> list[str]:
    """What is wrong with the position table or the periods of rotary positions."""
    problems, width = [], architecture.width
    table = shapes.get("positions")
    if table is not None and architecture.rope_theta is None:
        ndim = 2 if found.layout.bare_tokens else 3
        side = _table_side(shapes, architecture)
        if table.ndim != ndim or table.shape[-1] != width or (ndim == 3 and table.shape[0] != 1) or side is None:
            wanted = "1 + a square" if architecture.n_cls else "a square"
            shape = f"({wanted}, {width})" if ndim == 2 else f"(1, {wanted}, {width})"
            problems.append(f"{found.names['positions']} has shape {tuple(table.shape)}, expected {shape}")
    periods = shapes.get("rope_periods")
    if periods is not None and tuple(periods.shape) != (width // architecture.heads // 4,):
        problems.append(f"{found.names['rope_periods']} has shape {tuple(periods.shape)}")
    return problems


def _saved_name(ours: str, found: FoundEncoder) -> str:
    """The name under which a missing tensor was looked for, as the file names its neighbours."""
    for name, saved in found.names.items():
        # The same tensor of another block shows how this layout calls it.
        parts, other = ours.split("."), name.split(".")
        if parts[0] == "blocks" == other[0] and parts[2:] == other[2:]:
            return saved.replace(f".{other[1]}.", f".{parts[1]}.", 1)
    plain = {"cls_token": "cls_token", "registers": "register_tokens", "positions": "pos_embed"}
    return plain.get(ours, ours)


def _hint(shapes: Mapping[str, torch.Tensor], architecture: Architecture, found: FoundEncoder, path: Path) -> str:
    """The name of a known encoder that fits better, if the name was the user's to choose."""
    if architecture not in ARCHITECTURES.values():
        return ""
    inferred = _infer(shapes, found, path)
    matches = matching_architectures(
        inferred, _table_side(shapes, inferred), in_open_clip=found.prefix.endswith("visual.trunk.")
    )
    if not matches or architecture in matches:
        return ""
    return f" (this looks like {matches[0].name}: pass --model_name {matches[0].name})"


def _choose_transform(
    statement: Statement, options: StatedTransform, side: int | None, architecture: Architecture, checkpoint: Checkpoint
) -> tuple[ImageTransform, list[str]]:
    """How the images are prepared, and a note if that was assumed.

    Raises:
        BackboneError: If nothing says it, or if the size has no patches.
    """
    path, patch = checkpoint.path, architecture.patch_size
    stated = options.filled_from(statement.transform)
    notes: list[str] = []
    if statement.assume:
        if checkpoint.config and (stated.mean is None or stated.std is None):
            assumed = as_options(statement.suggestion)
            notes.append(f"'{path}' does not say how its images are normalised; assuming DINOv2's {assumed}")
        stated = stated.filled_from(statement.suggestion)
    elif side is not None:
        stated = stated.filled_from(StatedTransform(size=side * patch))
    transform = stated.complete()
    if transform is None:
        suggestion = dataclasses.replace(statement.suggestion, size=stated.size or statement.suggestion.size)
        raise BackboneError(
            f"'{path}' does not say how its images are prepared (no preprocessor_config.json, processor_config.json or "
            f"pretrained_cfg states size, mean and standard deviation), and guessing would change every token. "
            f"Its family usually wants: {as_options(suggestion)}"
        )
    if transform.size < patch:
        raise BackboneError(f"images of {transform.size} pixels are smaller than a patch of '{path}' ({patch} pixels)")
    # SigLIP so400m has patches of 14 on 384 pixels: 27 of them, and 6 pixels that nothing sees. That is its own size.
    own = transform.size == statement.transform.size and side == transform.size // patch
    if transform.size % patch and not own:
        nearest = transform.size // patch * patch
        raise BackboneError(
            f"patches of {patch} pixels do not tile images of {transform.size} pixels of '{path}'. Choose a multiple, "
            f"such as --image-size {nearest} or {nearest + patch}"
        )
    return transform, notes
