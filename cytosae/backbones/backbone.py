"""Backbones: vision transformers loaded from a path, cut after the requested block, every key checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from cytosae.backbones.errors import BackboneError
from cytosae.backbones.images import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD
from cytosae.backbones.layouts import join_parts
from cytosae.backbones.positions import fit_positions, rotary_angles, rotary_periods
from cytosae.backbones.preprocessing import StatedTransform
from cytosae.backbones.resolve import Encoder, resolve_encoder
from cytosae.backbones.shapes import check_finite
from cytosae.backbones.vit import VisionTransformer
from cytosae.backbones.weights import read_checkpoint, weights_sha256

_TOKEN_NAMES = ("cls_token", "registers", "positions", "rope_periods")
"""Tensors that have no parameter of their own in `VisionTransformer`."""


@dataclass(frozen=True)
class BackboneInfo:
    """Description of a checkpoint and of the block whose output is used."""

    name: str
    """Name, for example `dinov2_vitb14`."""
    weights_sha256: str
    """SHA-256 of the file; for a folder, over its description and weight files."""
    block: int
    """Block whose output is used, as a Python index."""
    n_blocks: int
    """Blocks of the whole network."""
    d_model: int
    """Width D."""
    patch_size: int
    """Pixels along a patch's side."""
    n_cls: int
    """CLS tokens: 1, or 0 for networks without one."""
    n_registers: int
    """Register tokens."""
    grid: tuple[int, int]
    """Patch rows and columns."""
    image_size: int = IMAGE_SIZE
    """Height and width of the input in pixels."""
    image_mean: tuple[float, float, float] = IMAGE_MEAN
    """Mean that the input's channels are relative to."""
    image_std: tuple[float, float, float] = IMAGE_STD
    """Standard deviation that the input's channels are divided by."""
    image_scale: float = 1 / 255
    """Factor of the pixel values, before the mean is subtracted."""
    resample: str = "bilinear"
    """Pillow's filter of the resize."""
    kind: str = field(default="", compare=False)
    """The network in words, for people."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What a user should know: parts of the checkpoint that were left out, what was assumed."""

    @property
    def n_tokens(self) -> int:
        """Tokens T per image."""
        return self.n_cls + self.n_registers + self.grid[0] * self.grid[1]


class Backbone(nn.Module):
    """A vision transformer that ends with the last requested block.

    Args:
        model: A network with at least the requested blocks.
        info: Its description.
        blocks: Blocks whose output `compute_blocks` returns, as Python indices; None: that of `info`.
    """

    def __init__(self, model: VisionTransformer, info: BackboneInfo, blocks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.model, self.info = model, info
        self.blocks = tuple(block % info.n_blocks for block in ((info.block,) if blocks is None else blocks))
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Output of the first requested block, before any final norm (docs/definitions.md, section 2).

        Args:
            pixels: Normalised images, shape `(B, 3, image_size, image_size)`.

        Returns:
            All tokens in the order CLS, registers, patches row by row, shape `(B, T, D)`, in the dtype of the
            parameters unless the caller uses autocast.

        Raises:
            BackboneError: If the pixels have another shape.
        """
        return self.compute_blocks(pixels)[0]

    def compute_blocks(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Output of every requested block from one pass, in the order of the request; each as `forward` returns it.

        Raises:
            BackboneError: If the pixels have another shape.
        """
        wanted = (3, self.info.image_size, self.info.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
            raise BackboneError(f"pixels have shape {tuple(pixels.shape)}, expected {('B', *wanted)}")
        outputs = self.model(pixels, set(self.blocks))
        return [outputs[block] for block in self.blocks]


def describe_backbone(
    path: Path,
    *,
    name: str | None,
    block: int,
    weights_digest: str | None = None,
    preprocessing: StatedTransform | None = None,
) -> BackboneInfo:
    """`describe_blocks` for one block."""
    return describe_blocks(
        path, name=name, blocks=(block,), weights_digest=weights_digest, preprocessing=preprocessing
    )[0]


def describe_blocks(
    path: Path,
    *,
    name: str | None,
    blocks: Sequence[int],
    weights_digest: str | None = None,
    preprocessing: StatedTransform | None = None,
) -> list[BackboneInfo]:
    """Describe a checkpoint without building the network, checking every key, every shape and the weights in use.

    Args:
        path: Checkpoint (.pth, .pt, .bin, .safetensors) of a known encoder, or a local folder of transformers, timm or
            open_clip (docs/encoders.md).
        name: Name of the encoder where nothing in the checkpoint states it, else a label; inferred if None.
        blocks: Requested blocks, as Python indices.
        weights_digest: `weights_sha256` of the path, if it is known already.
        preprocessing: What is to be done with the images instead of what the encoder's own files say.

    Returns:
        One description per block, which differ in the block alone.

    Raises:
        BackboneNotFoundError: If `path` does not exist.
        BackboneError: If the checkpoint is damaged, contains Python objects, does not match its description, lacks a
            block, if a weight in use is NaN or infinity, or if nothing says how it wants its images.
    """
    encoder = resolve_encoder(read_checkpoint(path), name, preprocessing or StatedTransform())
    depth = encoder.architecture.depth
    for block in blocks:
        _check_block(block, depth, path)
    check_finite(encoder.found, max(block % depth for block in blocks) + 1, path)
    digest = weights_digest or weights_sha256(path)
    return [_describe(encoder, digest, block) for block in blocks]


def load_backbone(
    path: Path,
    info: BackboneInfo,
    *,
    blocks: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Backbone:
    """Load a described backbone up to its last requested block; later blocks are neither built nor read.

    Args:
        path: As for `describe_backbone`.
        info: What `describe_backbone` returned for the path; the checkpoint is not hashed again.
        blocks: Blocks whose output is wanted, as Python indices; None: that of `info`.
        device: Device of the network.
        dtype: Type of its parameters.

    Returns:
        The network in evaluation mode, without gradients.

    Raises:
        BackboneError: As for `describe_backbone`, or if a weight in use is NaN or infinity.
    """
    wanted = [block % info.n_blocks for block in (blocks or (info.block,))]
    stated = StatedTransform(info.image_size, info.image_mean, info.image_std, info.image_scale, info.resample)
    encoder = resolve_encoder(read_checkpoint(path), info.name, stated)
    check_finite(encoder.found, max(wanted) + 1, path)
    model = _build_network(encoder, max(wanted) + 1)
    return Backbone(model.to(device=device, dtype=dtype), info, blocks)


def _build_network(encoder: Encoder, n_blocks: int) -> VisionTransformer:
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


def _describe(encoder: Encoder, digest: str, block: int) -> BackboneInfo:
    """The description of an encoder."""
    architecture, transform = encoder.architecture, encoder.transform
    return BackboneInfo(
        name=architecture.name,
        weights_sha256=digest,
        block=block,
        n_blocks=architecture.depth,
        d_model=architecture.width,
        patch_size=architecture.patch_size,
        n_cls=architecture.n_cls,
        n_registers=architecture.n_registers,
        grid=encoder.grid,
        image_size=transform.size,
        image_mean=transform.mean,
        image_std=transform.std,
        image_scale=transform.scale,
        resample=transform.resample,
        kind=architecture.describe() + f", saved as {encoder.found.layout.name} does",
        notes=encoder.notes,
    )


def _check_block(block: int, n_blocks: int, path: Path) -> None:
    """Raise if the network has no such block."""
    if not -n_blocks <= block < n_blocks:
        raise BackboneError(
            f"--block_layer {block} was given, but '{path}' has {n_blocks} blocks: -{n_blocks} to {n_blocks - 1}"
        )
