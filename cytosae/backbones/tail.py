"""The tail of an encoder: its blocks after the one whose output is stored, and its final norm.

`tail(tokens)` continues where a store ends, and gives the embedding that the whole network gives of the image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from cytosae.backbones.backbone import BackboneInfo
from cytosae.backbones.errors import BackboneError, listed
from cytosae.backbones.layouts import (
    FACEBOOK_TIMM,
    OPEN_CLIP,
    TRANSFORMERS_CLIP,
    TRANSFORMERS_DINOV3,
    TRANSFORMERS_VIT,
    join_parts,
)
from cytosae.backbones.positions import rotary_angles, rotary_periods
from cytosae.backbones.preprocessing import StatedTransform
from cytosae.backbones.resolve import Encoder, resolve_encoder
from cytosae.backbones.shapes import check_finite
from cytosae.backbones.vit import Architecture, Block
from cytosae.backbones.weights import Checkpoint, read_checkpoint

Pooling = Literal["cls", "mean", "mean_then_norm"]
"""What the embedding is: the CLS token after the final norm, the mean of the patches after it, or the norm of their
mean."""

POOLINGS: tuple[Pooling, ...] = get_args(Pooling)
"""All of them."""

_NORMS = {
    FACEBOOK_TIMM.name: ("cls_norm", "norm"),
    TRANSFORMERS_VIT.name: ("layernorm",),
    TRANSFORMERS_DINOV3.name: ("norm", "model.norm"),
    TRANSFORMERS_CLIP.name: ("post_layernorm",),
    OPEN_CLIP.name: ("ln_post",),
}
"""Names of the final norm; DINOv3 can have one for the CLS token alone, which comes first."""

_NORM_OF_MEAN = "fc_norm"
"""Norm of the mean of the patches, in timm and in MAE's fine-tuned networks, which have no other."""

_KEPT_TYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class TailInfo:
    """Everything that determines a tail, apart from its weights."""

    architecture: Architecture
    """The whole network."""
    block: int
    """Block whose output it takes, counted from 0."""
    grid: tuple[int, int]
    """Patch rows and columns."""
    pooling: Pooling
    """What the embedding is."""
    has_norm: bool
    """Whether there is a final norm."""

    @property
    def n_blocks(self) -> int:
        """Blocks of the tail."""
        return self.architecture.depth - self.block - 1

    @property
    def n_tokens(self) -> int:
        """Tokens T per image."""
        return self.architecture.n_prefix + self.grid[0] * self.grid[1]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor; no memory is taken."""
        with torch.device("meta"):
            return {name: tuple(item.shape) for name, item in Tail(self).state_dict().items()}


class Tail(nn.Module):
    """The blocks after a stored one, the final norm, and the pooling of an encoder, in evaluation mode.

    Args:
        info: What it consists of.
    """

    def __init__(self, info: TailInfo) -> None:
        super().__init__()
        self.info, architecture = info, info.architecture
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(info.n_blocks))
        self.norm = nn.LayerNorm(architecture.width, architecture.eps) if info.has_norm else nn.Identity()
        self.rope_cos: nn.Parameter | None = None
        self.rope_sin: nn.Parameter | None = None
        if architecture.rope_theta is not None:
            head = architecture.width // architecture.heads
            self.rope_cos = nn.Parameter(torch.empty(info.n_tokens, head))
            self.rope_sin = nn.Parameter(torch.empty(info.n_tokens, head))
        self.requires_grad_(False).eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The embedding of images.

        Args:
            tokens: Output of the stored block, in the order CLS, registers, patches, shape `(B, T, D)`.

        Returns:
            Float32, shape `(B, D)`.

        Raises:
            BackboneError: If the tokens have another shape.
        """
        info, x = self.info, tokens
        if x.ndim != 3 or tuple(x.shape[1:]) != (info.n_tokens, info.architecture.width):
            wanted = ("B", info.n_tokens, info.architecture.width)
            raise BackboneError(f"tokens have shape {tuple(x.shape)}, expected {wanted}")
        x = x.float()
        rope = None if self.rope_cos is None or self.rope_sin is None else (self.rope_cos, self.rope_sin)
        for block in self.blocks:
            x = block(x, rope)
        if info.pooling == "cls":
            return self.norm(x[:, 0])  # type: ignore[no-any-return]
        patches = x[:, info.architecture.n_prefix :]
        if info.pooling == "mean":
            return self.norm(patches).mean(dim=1)  # type: ignore[no-any-return]
        return self.norm(patches.mean(dim=1))  # type: ignore[no-any-return]


def read_tail(path: Path, info: BackboneInfo) -> tuple[TailInfo, dict[str, torch.Tensor]]:
    """The tail of a described checkpoint, every tensor checked.

    Args:
        path: As for `describe_backbone`.
        info: What `describe_backbone` returned for the path; its block is the stored one.

    Returns:
        What the tail consists of, and its tensors on the CPU, as the checkpoint has them if they are of 16 or 32 bits,
        else in float32.

    Raises:
        BackboneError: As for `describe_backbone`, or if a weight in use is NaN or infinity.
    """
    checkpoint = read_checkpoint(path)
    stated = StatedTransform(info.image_size, info.image_mean, info.image_std, info.image_scale, info.resample)
    encoder = resolve_encoder(checkpoint, info.name, stated)
    architecture, first = encoder.architecture, info.block % info.n_blocks + 1
    check_finite(encoder.found, architecture.depth, path)
    norm, is_of_mean = _find_norm(checkpoint, encoder)
    tensors = join_parts(encoder.found.tensors)
    state = {
        f"blocks.{int(number) - first}.{rest}": tensor
        for (kind, number, rest), tensor in (
            (name.split(".", 2), tensor) for name, tensor in tensors.items() if name.startswith("blocks.")
        )
        if int(number) >= first
    }
    state |= {f"norm.{kind}": tensor for kind, tensor in norm.items()}
    if architecture.rope_theta is not None:
        head = architecture.width // architecture.heads
        periods = tensors.get("rope_periods", rotary_periods(architecture.rope_theta, head))
        cos, sin = rotary_angles(encoder.grid, periods, n_prefix=architecture.n_prefix)
        state |= {"rope_cos": cos, "rope_sin": sin}
    pooling: Pooling = "mean_then_norm" if is_of_mean else "cls" if architecture.n_cls else "mean"
    tail = TailInfo(architecture, first - 1, encoder.grid, pooling, bool(norm))
    return tail, {name: _plain(tensor) for name, tensor in state.items()}


def make_tail(info: TailInfo, tensors: Mapping[str, torch.Tensor], *, device: torch.device | str = "cpu") -> Tail:
    """A tail from its tensors, in float32 on a device.

    Args:
        info: What it consists of.
        tensors: Tensors of the shapes `info.shapes()`; copied.
        device: Its device.
    """
    with torch.device("meta"):
        tail = Tail(info)
    weights = {name: item.to(device=device, dtype=torch.float32, copy=True) for name, item in tensors.items()}
    tail.load_state_dict(weights, assign=True)
    return tail.requires_grad_(False).eval()


def _find_norm(checkpoint: Checkpoint, encoder: Encoder) -> tuple[dict[str, torch.Tensor], bool]:
    """Weight and bias of the final norm, empty if the file has none, and whether it is that of the patches' mean.

    Raises:
        BackboneError: If it has another shape, or is NaN or infinity.
    """
    found, width = encoder.found, encoder.architecture.width
    names = _NORMS[found.layout.name]
    for name in (*names, _NORM_OF_MEAN):
        kinds = {kind: checkpoint.tensors.get(f"{found.prefix}{name}.{kind}") for kind in ("weight", "bias")}
        there = {kind: tensor for kind, tensor in kinds.items() if tensor is not None}
        if not there:
            continue
        bad = [
            f"{found.prefix}{name}.{kind}"
            for kind in kinds
            if kind not in there
            or tuple(there[kind].shape) != (width,)
            or not there[kind].is_floating_point()
            or not torch.isfinite(there[kind].float()).all()
        ]
        if bad:
            raise BackboneError(
                f"the final norm of '{checkpoint.path}' must have a weight and a bias of {width} finite numbers: "
                f"{listed(bad)}"
            )
        return there, name == _NORM_OF_MEAN
    return {}, False


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of its own memory, in a type that loses nothing that the network computes with."""
    dtype = tensor.dtype if tensor.dtype in _KEPT_TYPES else torch.float32
    return tensor.detach().to(dtype, copy=True).contiguous()
