"""From a checkpoint to everything about its encoder: architecture, tensors by our names, preprocessing of images."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cytosae.backbones.dinov2 import read_stated
from cytosae.backbones.errors import BackboneError, listed, shown
from cytosae.backbones.huggingface import read_transformers_config
from cytosae.backbones.layouts import (
    OPEN_CLIP,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_DINOV3,
    TRANSFORMERS_VIT,
    FoundEncoder,
    find_encoder,
    join_parts,
)
from cytosae.backbones.preprocessing import MAX_IMAGE_SIZE, ImageTransform, StatedTransform, as_options
from cytosae.backbones.registry import (
    ARCHITECTURES,
    DINOV2,
    find_architecture,
    known_transform,
)
from cytosae.backbones.shapes import (
    Shapes,
    check_shapes,
    check_types,
    count_parameters,
    count_position_prefix,
    fitting_architectures,
    infer_architecture,
    table_side,
)
from cytosae.backbones.statement import INCEPTION, OPENAI, SIGLIP, Statement
from cytosae.backbones.timm import read_open_clip_config, read_timm_config
from cytosae.backbones.vit import Architecture, PositionRule
from cytosae.backbones.weights import Checkpoint

MAX_PARAMETERS = 1 << 33
"""More than any vision transformer has; sizes in a file are checked before memory is taken."""

_LAYOUT_SUGGESTIONS = {
    TRANSFORMERS_VIT.name: INCEPTION,
    TRANSFORMERS_CLIP.name: SIGLIP,
    TRANSFORMERS_DINOV3.name: ImageTransform(resample="bicubic"),
    OPEN_CLIP.name: OPENAI,
}
"""What encoders of a layout usually want."""


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
    check_types(found, checkpoint.path)
    shapes = join_parts({ours: tensor.to("meta") for ours, tensor in found.tensors.items()})
    inferred = infer_architecture(shapes, found, checkpoint.path)
    if count_parameters(shapes) > MAX_PARAMETERS:
        raise BackboneError(
            f"'{checkpoint.path}' states {count_parameters(shapes):,} parameters, more than the {MAX_PARAMETERS:,} "
            "that are read"
        )
    if checkpoint.stated is not None:
        architecture = read_stated(checkpoint.stated, checkpoint.path)
        statement = Statement(architecture.name, suggestion=ImageTransform(), assume=True)
    elif checkpoint.config:
        statement = _read_description(checkpoint)
        architecture = dataclasses.replace(inferred, **statement.facts)
    else:
        statement, architecture = _recognise(inferred, shapes, found, name, options, checkpoint.path)
    side = table_side(shapes, architecture)
    if not architecture.heads:
        raise _unknown(architecture, found, checkpoint.path)
    check_shapes(shapes, architecture, found, checkpoint.path, described=bool(checkpoint.config))
    transform, note = _choose_transform(statement, options, side, architecture, checkpoint)
    notes = [f"left out, not part of the encoder: {listed(list(found.left_out))}"] if found.left_out else []
    if found.n_encoders > 1:
        notes.append(f"of {found.n_encoders} encoders in the file, '{shown(found.prefix)}' is used")
    label = name or statement.name
    if name is not None:
        notes += _name_notes(name, architecture, fitting_architectures(inferred, shapes, found), checkpoint)
    return Encoder(
        checkpoint.path,
        dataclasses.replace(architecture, name=label),
        found,
        count_position_prefix(shapes, architecture),
        transform,
        tuple(filter(None, [*notes, statement.note, *note])),
    )


def _name_notes(
    name: str, architecture: Architecture, matches: list[Architecture], checkpoint: Checkpoint
) -> list[str]:
    """A note on a name of the user's that contradicts what the checkpoint itself says, where it decides nothing."""
    if checkpoint.stated is not None:
        found = architecture.name if name != architecture.name else None
    elif checkpoint.config:
        known = find_architecture(name)
        contradicts = known is not None and known not in matches
        found = (matches[0].name if matches else architecture.describe()) if contradicts else None
    else:
        return []
    return [] if found is None else [f"model_name {shown(name)} is only a label: the checkpoint is {shown(found, 200)}"]


def _read_description(checkpoint: Checkpoint) -> Statement:
    """What the description beside the weights states.

    Raises:
        BackboneError: If it is impossible, or of a kind of network that is not known.
    """
    config, folder = checkpoint.config, checkpoint.folder
    name = folder.resolve().name
    if list(config) == ["open_clip_config.json"]:
        return read_open_clip_config(config["open_clip_config.json"], folder / "open_clip_config.json", name)
    if config.get("model_type") == "timm_wrapper" or ("architecture" in config and "model_type" not in config):
        return read_timm_config(config, folder / "config.json", name)
    return read_transformers_config(config, folder, name)


def _recognise(
    inferred: Architecture,
    shapes: Shapes,
    found: FoundEncoder,
    name: str | None,
    options: StatedTransform,
    path: Path,
) -> tuple[Statement, Architecture]:
    """An encoder that nothing describes: by its name, or by its shapes.

    Raises:
        BackboneError: If the name is unknown, or if the shapes do not decide.
    """
    side = table_side(shapes, inferred)
    if name is not None and name != _plain_name(inferred):
        known = find_architecture(name)
        if known is None:
            raise BackboneError(f"model_name {name!r} is unknown; known are {', '.join(ARCHITECTURES)}")
        return _known(known, side), _as_saved(known, inferred, found)
    matches = fitting_architectures(inferred, shapes, found)
    own = {(known_transform(item.name), item.activation, item.eps) for item in matches}
    if len(own) == 1:
        note = f"recognised as {matches[0].name} by its shapes; if it is another encoder, say how it wants its images"
        statement = dataclasses.replace(_known(matches[0], side), note="" if matches[0].name in DINOV2 else note)
        return statement, _as_saved(matches[0], inferred, found)
    if matches and len({(item.heads, item.activation, item.eps) for item in matches}) == 1 and options.mean:
        return Statement(_plain_name(inferred)), _as_saved(matches[0], inferred, found)
    if matches:
        names = ", ".join(item.name for item in matches)
        raise BackboneError(
            f"'{path}' has the shapes of several encoders, which differ in their preprocessing or activation "
            f"function; known are {names}. Say which with --model_name"
        )
    suggestion = _LAYOUT_SUGGESTIONS.get(found.layout.name, ImageTransform(resample="bicubic"))
    if found.layout is TRANSFORMERS_CLIP and inferred.pre_norm:
        suggestion = OPENAI
    return Statement(_plain_name(inferred), suggestion=suggestion), _as_saved(inferred, inferred, found)


def _known(architecture: Architecture, side: int | None) -> Statement:
    """What the registry says of an encoder; a position table of another size says that it was trained at that size."""
    transform = known_transform(architecture.name)
    if side is not None and architecture.name not in DINOV2:
        transform = dataclasses.replace(transform, size=side * architecture.patch_size)
    stated = StatedTransform(**dataclasses.asdict(transform))
    is_dinov2 = architecture.name in DINOV2
    return Statement(
        architecture.name, transform=StatedTransform() if is_dinov2 else stated, suggestion=transform, assume=is_dinov2
    )


def _as_saved(known: Architecture, inferred: Architecture, found: FoundEncoder) -> Architecture:
    """An encoder with what depends on the program that saved it: biases of DINOv3, rules, constants."""
    if known.rope_theta is not None:
        return dataclasses.replace(known, qkv_bias=inferred.qkv_bias)
    if found.layout is TRANSFORMERS_VIT:
        rule: PositionRule = "antialias" if inferred.n_registers else "plain"
        return dataclasses.replace(known, positions=rule, eps=1e-6 if inferred.layer_scale else 1e-12)
    if found.layout is TRANSFORMERS_CLIP:
        activation = known.activation if inferred.pre_norm else "gelu_tanh"
        eps = 1e-5 if inferred.pre_norm else 1e-6
        return dataclasses.replace(known, positions="plain", activation=activation, eps=eps)
    if found.layout is OPEN_CLIP:
        return dataclasses.replace(known, positions="antialias", eps=1e-5)
    if known.name not in ARCHITECTURES:
        return dataclasses.replace(known, positions="antialias")
    return known


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
        nearest = min(transform.size, MAX_IMAGE_SIZE - patch) // patch * patch
        raise BackboneError(
            f"patches of {patch} pixels do not tile images of {transform.size} pixels of '{path}'. Choose a multiple, "
            f"such as --image-size {nearest} or {nearest + patch}"
        )
    return transform, notes
