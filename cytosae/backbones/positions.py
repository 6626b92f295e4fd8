"""Positions of patches: resampled tables, and the rotary positions of DINOv3."""

import math

import torch
from torch import nn

from cytosae.backbones.errors import BackboneError
from cytosae.backbones.vit import PositionRule


def fit_positions(
    table: torch.Tensor, grid: tuple[int, int], *, n_prefix: int, rule: PositionRule
) -> tuple[torch.Tensor, torch.Tensor]:
    """A position table fitted to a grid of patches, as the code that the weights come from does it.

    Bicubic in float32. The rules differ by up to a few per cent of a token, so each layout keeps its own:

    - `dinov2`: no antialiasing, scale factor `(side + 0.1) / sqrt(N)` (`interpolate_pos_encoding` of DINO and DINOv2);
    - `antialias`: antialiased, exact size (DINOv2 with registers; `resample_abs_pos_embed` of timm; open_clip);
    - `plain`: no antialiasing, exact size (`interpolate_pos_encoding` of transformers).

    Args:
        table: Shape `(1, P + N, D)`, where N is a square.
        grid: Requested patch rows and columns.
        n_prefix: Rows P of the table that belong to tokens before the patches.
        rule: One of the three rules.

    Returns:
        Rows of the tokens before the patches, shape `(P, D)`, and of the patches, shape `(rows * columns, D)`, in
        float32; the same numbers if the grid fits already.

    Raises:
        BackboneError: If rounding gives another grid.
    """
    table = table.float()
    prefix, patches = table[0, :n_prefix], table[0, n_prefix:]
    side, width = math.isqrt(len(patches)), table.shape[2]
    if (side, side) == grid:
        return prefix, patches
    planes = patches.reshape(1, side, side, width).permute(0, 3, 1, 2)
    if rule == "dinov2":
        scale = [float(wanted + 0.1) / side for wanted in grid]
        planes = nn.functional.interpolate(planes, scale_factor=scale, mode="bicubic", antialias=False)
    else:
        planes = nn.functional.interpolate(planes, size=grid, mode="bicubic", antialias=rule == "antialias")
    if tuple(planes.shape[-2:]) != grid:
        raise BackboneError(
            f"a position table of {side} x {side} was interpolated to {tuple(planes.shape[-2:])}, expected {grid}"
        )
    return prefix, planes.permute(0, 2, 3, 1).reshape(-1, width)


def rotary_angles(grid: tuple[int, int], periods: torch.Tensor, *, n_prefix: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of DINOv3's rotary positions (https://arxiv.org/abs/2508.10104, `RopePositionEmbedding`).

    The centres of the patches have coordinates of -1 to 1 in each direction. A quarter of a head's channels turns with
    the row, a quarter with the column, and both repeat in its second half. Tokens before the patches do not turn.

    Args:
        grid: Patch rows and columns.
        periods: Periods of the angles, shape `(D / heads / 4,)`.
        n_prefix: Tokens before the patches.

    Returns:
        Cosine and sine, each of shape `(n_prefix + rows * columns, D / heads)`, float32.
    """
    rows, columns = ((torch.arange(n, dtype=torch.float32) + 0.5) / n * 2 - 1 for n in grid)
    centres = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = (2 * math.pi * centres[:, :, None] / periods.float()).flatten(1).tile(2)
    angles = torch.cat([angles.new_zeros(n_prefix, angles.shape[1]), angles])
    return angles.cos(), angles.sin()


def rotary_periods(theta: float, head_width: int) -> torch.Tensor:
    """Periods of the rotary angles: `theta ** (4 i / head_width)` for each i below `head_width / 4`, float32."""
    return theta ** torch.arange(0, 1, 4 / head_width, dtype=torch.float32)
