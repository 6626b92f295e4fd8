"""The vision transformer: one network in plain torch that covers the encoders of `registry.py`.

Pre-norm blocks of attention and an MLP (Dosovitskiy et al. 2021, https://arxiv.org/abs/2010.11929) with what the
families add: register tokens, LayerScale, gated MLPs, a norm before the first block, rotary positions.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

PositionRule = Literal["dinov2", "antialias", "plain"]
"""How a position table is resampled to another grid; see `cytosae.backbones.positions`."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
}

ACTIVATIONS = tuple(_ACTIVATIONS)
"""Known activation functions of the MLP."""


@dataclass(frozen=True)
class Architecture:
    """Everything that determines a vision transformer, apart from its weights."""

    name: str
    """Name on the command line and in a store's spec."""
    width: int
    """Channels D."""
    depth: int
    """Blocks."""
    heads: int
    """Attention heads."""
    patch_size: int = 14
    """Pixels along a patch's side."""
    mlp_ratio: float = 4
    """Hidden width of the MLP over D; a SwiGLU has two thirds of it, rounded up to a multiple of 8, as DINOv2 does."""
    n_registers: int = 0
    """Tokens between the CLS token and the patches."""
    swiglu: bool = False
    """Whether the MLP is gated: `activation(gate) * up`."""
    n_cls: int = 1
    """CLS tokens: 1, or 0 for networks without one."""
    mlp_hidden: int | None = None
    """Hidden width of the MLP, of each half if it is gated; None: by `mlp_ratio`."""
    activation: str | None = None
    """Activation function of the MLP, or of its gate; None: SiLU if it is gated, else GELU."""
    eps: float = 1e-6
    """Added to the variance in every LayerNorm."""
    layer_scale: bool = True
    """Whether the output of attention and MLP is multiplied by a learned vector."""
    pre_norm: bool = False
    """Whether a LayerNorm stands before the first block, as in CLIP."""
    qkv_bias: bool = True
    """Whether queries, keys and values have a bias."""
    patch_bias: bool = True
    """Whether the patch embedding has a bias."""
    positions: PositionRule = "dinov2"
    """How the position table is resampled."""
    rope_theta: float | None = None
    """Base of the rotary positions of DINOv3, which replace the table; None: there is a table."""

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP, of each half if it is gated."""
        if self.mlp_hidden is not None:
            return self.mlp_hidden
        hidden = int(self.width * self.mlp_ratio)
        return (int(hidden * 2 / 3) + 7) // 8 * 8 if self.swiglu else hidden

    @property
    def n_prefix(self) -> int:
        """Tokens before the patches: CLS, then registers."""
        return self.n_cls + self.n_registers

    def describe(self) -> str:
        """The network in words."""
        tokens = {0: "no CLS token", 1: "CLS token"}[self.n_cls]
        tokens += f" and {self.n_registers} registers" if self.n_registers else ""
        activation = self.activation or ("silu" if self.swiglu else "gelu")
        mlp = f"{'gated ' if self.swiglu else ''}MLP of {self.hidden} ({activation})"
        positions = "rotary positions" if self.rope_theta is not None else "position table"
        return (
            f"{self.depth} blocks of width {self.width}, {self.heads} heads, {mlp}, "
            f"patches of {self.patch_size} pixels, {tokens}, {positions}"
        )


class VisionTransformer(nn.Module):
    """The first blocks of a vision transformer, for one size of images.

    Args:
        architecture: What it consists of.
        n_blocks: Blocks to build.
        grid: Patch rows and columns.
    """

    def __init__(self, architecture: Architecture, *, n_blocks: int, grid: tuple[int, int]) -> None:
        super().__init__()
        width, patch = architecture.width, architecture.patch_size
        n_patches, head = grid[0] * grid[1], width // architecture.heads
        self.patch_embed = nn.Conv2d(3, width, patch, stride=patch, bias=architecture.patch_bias)
        self.prefix = nn.Parameter(torch.empty(architecture.n_prefix, width))
        self.positions: nn.Parameter | None = None
        self.rope_cos: nn.Parameter | None = None
        self.rope_sin: nn.Parameter | None = None
        if architecture.rope_theta is None:
            self.positions = nn.Parameter(torch.empty(n_patches, width))
        else:
            self.rope_cos = nn.Parameter(torch.empty(architecture.n_prefix + n_patches, head))
            self.rope_sin = nn.Parameter(torch.empty(architecture.n_prefix + n_patches, head))
        self.norm_pre = nn.LayerNorm(width, architecture.eps) if architecture.pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(architecture) for _ in range(n_blocks))

    def forward(self, pixels: torch.Tensor, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """Output of some blocks, before any final norm, from one pass.

        Args:
            pixels: Normalised images, shape `(B, 3, H, W)`.
            wanted: Blocks, counted from 0.

        Returns:
            All tokens of each wanted block in the order CLS, registers, patches row by row, shape `(B, T, D)`.
        """
        patches = _embed(self.patch_embed, pixels)
        if self.positions is not None:
            patches = patches + self.positions
        prefix = self.prefix.expand(len(patches), -1, -1)
        x = self.norm_pre(torch.cat([prefix.to(patches.dtype), patches], dim=1))
        rope = None if self.rope_cos is None or self.rope_sin is None else (self.rope_cos, self.rope_sin)
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, rope)
            if index in wanted:
                outputs[index] = x
        return outputs


class Block(nn.Module):
    """Attention and MLP, each added to what it was computed from."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, eps = architecture.width, architecture.eps
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = _Attention(width, architecture.heads, bias=architecture.qkv_bias)
        self.norm2 = nn.LayerNorm(width, eps)
        activation = architecture.activation or ("silu" if architecture.swiglu else "gelu")
        self.mlp = _Mlp(width, architecture.hidden, activation, gated=architecture.swiglu)
        self.ls1: nn.Parameter | None = None
        self.ls2: nn.Parameter | None = None
        if architecture.layer_scale:
            self.ls1, self.ls2 = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The block's output, shape `(B, T, D)`, from that of the one before and the rotary positions, if any."""
        x = _add(x, self.attn(self.norm1(x), rope), self.ls1)
        return _add(x, self.mlp(self.norm2(x)), self.ls2)


class _Attention(nn.Module):
    """Multi-head self-attention with one fused product for queries, keys and values."""

    def __init__(self, width: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.qkv, self.proj, self._heads = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width), heads

    def forward(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self._heads, d // self._heads).permute(2, 0, 3, 1, 4)  # each (B, H, T, D/H)
        if rope is not None:
            q, k = _rotate(q, *rope).to(v.dtype), _rotate(k, *rope).to(v.dtype)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(b, t, d))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    """Two linear layers; a gated one computes gate and up in one product, in this order."""

    def __init__(self, width: int, hidden: int, activation: str, *, gated: bool) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden * 2 if gated else hidden), nn.Linear(hidden, width)
        self._activation, self._gated = _ACTIVATIONS[activation], gated

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.fc1(x)
        if self._gated:
            gate, up = x.chunk(2, dim=-1)
            return self.fc2(self._activation(gate) * up)  # type: ignore[no-any-return]
        return self.fc2(self._activation(x))  # type: ignore[no-any-return]


def _embed(convolution: nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
    """Embeddings of the patches row by row, shape `(B, P, D)`, of images of shape `(B, 3, H, W)`."""
    if pixels.device.type == "cpu":
        return convolution(pixels).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]
    return _embed_by_product(convolution, pixels)


def _embed_by_product(convolution: nn.Conv2d, pixels: torch.Tensor) -> torch.Tensor:
    """The same as a matrix product: by default torch rounds float32 to TF32 in a GPU's convolutions, but not here."""
    side = convolution.stride[0]
    patches = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return functional.linear(patches, convolution.weight.flatten(1), convolution.bias)


def _add(x: torch.Tensor, change: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The residual sum."""
    return x + change if scale is None else torch.addcmul(x, change, scale)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions on halves of each head (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
