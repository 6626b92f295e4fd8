"""Backbones: vision transformers loaded from a path, cut after the requested block, every key checked."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cytosae.backbones import dinov2 as vit_checkpoint
from cytosae.backbones import huggingface as vit_transformers
from cytosae.backbones.dinov2 import BackboneError, BackboneNotFoundError
from cytosae.backbones.images import IMAGE_MEAN, IMAGE_SIZE, IMAGE_STD

__all__ = ["Backbone", "BackboneError", "BackboneInfo", "describe_backbone", "load_backbone", "weights_sha256"]

_FOLDER_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")
"""Files of a transformers folder that determine what the network computes."""


@dataclass(frozen=True)
class BackboneInfo:
    """Description of a checkpoint and of the block whose output is used."""

    name: str
    """Name, for example `dinov2_vitb14`."""
    weights_sha256: str
    """SHA-256 of the file; for a folder, over its config and weight files."""
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

    @property
    def n_tokens(self) -> int:
        """Tokens T per image."""
        return self.n_cls + self.n_registers + self.grid[0] * self.grid[1]


class Backbone(nn.Module):
    """A vision transformer that ends with the requested block.

    Args:
        model: A transformers model with `block + 1` blocks.
        info: Its description.
        arguments: Further arguments for calling the model.
    """

    def __init__(self, model: nn.Module, info: BackboneInfo, arguments: dict[str, bool] | None = None) -> None:
        super().__init__()
        self.model, self.info, self._arguments = model, info, arguments or {}
        self._captured: torch.Tensor | None = None
        blocks = find_blocks(model, info.block % info.n_blocks + 1)
        blocks[-1].register_forward_hook(self._capture)
        self.requires_grad_(False).eval()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Output of the requested block, before any final norm (docs/definitions.md, section 2).

        Args:
            pixels: Normalised images, shape `(B, 3, image_size, image_size)`.

        Returns:
            All tokens in the order CLS, registers, patches row by row, shape `(B, T, D)`, in the dtype of the
            parameters unless the caller uses autocast.

        Raises:
            BackboneError: If the pixels have another shape, or the network returns other tokens than described.
        """
        wanted = (3, self.info.image_size, self.info.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != wanted:
            raise BackboneError(f"pixels have shape {tuple(pixels.shape)}, expected {('B', *wanted)}")
        self.model(pixel_values=pixels, **self._arguments)
        tokens, self._captured = self._captured, None
        expected = (len(pixels), self.info.n_tokens, self.info.d_model)
        if tokens is None or tuple(tokens.shape) != expected:
            raise BackboneError(
                f"the network returned tokens of shape {getattr(tokens, 'shape', None)}, expected {expected}"
            )
        return tokens

    def _capture(self, module: nn.Module, inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        """Keep the block's output; older versions of transformers return it in a tuple."""
        self._captured = output[0] if isinstance(output, tuple) else output


def describe_backbone(path: Path, *, name: str | None, block: int, weights_digest: str | None = None) -> BackboneInfo:
    """Describe a checkpoint without building the network, checking every key and shape.

    Args:
        path: DinoBloom or DINOv2 checkpoint (.pth, .safetensors), or a local transformers folder.
        name: Name of the architecture; inferred from the shapes if None.
        block: Requested block, as a Python index.
        weights_digest: `weights_sha256` of the path, if it is known already.

    Returns:
        The description; that of a transformers folder comes from its JSON files alone.

    Raises:
        BackboneNotFoundError: If `path` does not exist.
        BackboneError: If the checkpoint is damaged, contains Python objects, does not match `name`, or lacks the block.
    """
    if not path.exists():
        raise BackboneNotFoundError(
            f"no vision transformer at '{path}'. Give the path of its checkpoint with --model_path, "
            "or try the small one in the package with --model_path embedded"
        )
    digest = weights_digest or weights_sha256(path)
    if path.is_dir():
        folder = vit_transformers.read_folder(path)
        _check_block(block, folder.n_blocks, path)
        side = IMAGE_SIZE // folder.patch_size
        return BackboneInfo(
            name=name or folder.name,
            weights_sha256=digest,
            block=block,
            n_blocks=folder.n_blocks,
            d_model=folder.d_model,
            patch_size=folder.patch_size,
            n_cls=folder.n_cls,
            n_registers=folder.n_registers,
            grid=(side, side),
            image_mean=folder.image_mean,
            image_std=folder.image_std,
        )
    state, stated = vit_checkpoint.read_state(path)
    architecture = vit_checkpoint.choose_architecture(state, stated, name, path)
    vit_checkpoint.check_state(state, architecture, path)
    _check_block(block, architecture.depth, path)
    side = IMAGE_SIZE // architecture.patch_size
    return BackboneInfo(
        name=name or architecture.name,
        weights_sha256=digest,
        block=block,
        n_blocks=architecture.depth,
        d_model=architecture.width,
        patch_size=architecture.patch_size,
        n_cls=1,
        n_registers=architecture.n_registers,
        grid=(side, side),
    )


def load_backbone(
    path: Path, info: BackboneInfo, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load a described backbone up to its requested block; later blocks are neither built nor read.

    Args:
        path: As for `describe_backbone`.
        info: What `describe_backbone` returned for the path; the checkpoint is not hashed again.
        device: Device of the network.
        dtype: Type of its parameters.

    Returns:
        The network in evaluation mode, without gradients.

    Raises:
        BackboneError: As for `describe_backbone`, or if a weight in use is NaN or infinity.
    """
    n_kept = info.block % info.n_blocks + 1
    if path.is_dir():
        model, arguments = vit_transformers.load_folder(path, n_kept)
    else:
        state, stated = vit_checkpoint.read_state(path)
        architecture = vit_checkpoint.choose_architecture(state, stated, info.name, path)
        vit_checkpoint.check_state(state, architecture, path)
        model, arguments = vit_checkpoint.load_model(state, architecture, n_kept, info.grid, path), None
    _check_finite(model, path)
    return Backbone(model.to(device=device, dtype=dtype), info, arguments)


def find_blocks(model: nn.Module, n_blocks: int) -> nn.ModuleList:
    """The list of transformer blocks inside a model.

    Raises:
        BackboneError: If the model has no list of that length.
    """
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks:
            return module
    raise BackboneError(f"{type(model).__name__} has no list of {n_blocks} blocks: unknown version of transformers?")


def weights_sha256(path: Path) -> str:
    """SHA-256 of a checkpoint file, or over names and digests of a transformers folder's config and weight files."""
    if path.is_dir():
        files = sorted(item for pattern in _FOLDER_FILES for item in path.glob(pattern) if item.is_file())
        return hashlib.sha256("".join(f"{item.name} {weights_sha256(item)}\n" for item in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_block(block: int, n_blocks: int, path: Path) -> None:
    """Raise if the network has no such block."""
    if not -n_blocks <= block < n_blocks:
        raise BackboneError(
            f"--block_layer {block} was given, but '{path}' has {n_blocks} blocks: -{n_blocks} to {n_blocks - 1}"
        )


def _check_finite(model: nn.Module, path: Path) -> None:
    """Raise if a weight is NaN or infinity."""
    bad = [name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise BackboneError(f"weights in '{path}' contain NaN or infinity: {'; '.join(bad)}")
