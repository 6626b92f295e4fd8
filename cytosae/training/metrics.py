"""How well a reconstruction explains the activations."""

from typing import NamedTuple

import torch

from cytosae.sae.devices import widest_type
from cytosae.sae.world import ALONE, World


class ExplainedVariance(NamedTuple):
    """Share of the activations' variance that a reconstruction explains, 0-dimensional."""

    total: torch.Tensor
    """`1 - sum ||x - x^||^2 / sum ||x - mean||^2`, with the mean over the batch's tokens."""
    per_token_std: torch.Tensor
    """Standard deviation over tokens of `1 - ||x - x^||^2 / ||x - mean||^2`."""


@torch.no_grad()
def explained_variance(x: torch.Tensor, reconstruction: torch.Tensor, ranks: World = ALONE) -> ExplainedVariance:
    """Share of the variance that a reconstruction explains.

    Args:
        x: Tokens, shape `(..., D)`.
        reconstruction: Their reconstruction, of the same shape.
        ranks: Processes that have other tokens of the batch.
    """
    x, reconstruction = x.flatten(0, -2), reconstruction.detach().flatten(0, -2)
    wide = widest_type(x.device)
    own_mean = x.mean(dim=0) if len(x) else x.new_zeros(x.shape[1])
    mean = ranks.sum(own_mean * (len(x) / ranks.add(len(x))))
    error = torch.cat(ranks.gather((x - reconstruction).square().sum(dim=-1, dtype=wide)))
    variance = torch.cat(ranks.gather((x - mean).square().sum(dim=-1, dtype=wide)))
    tiny = torch.finfo(wide).tiny
    per_token = 1 - error / variance.clamp_min(tiny)
    spread = per_token.std(correction=0)
    return ExplainedVariance(1 - error.sum() / variance.sum().clamp_min(tiny), spread)
