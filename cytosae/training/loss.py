"""The training loss of the reference (docs/definitions.md, section 5), plainly with autograd, and metrics."""

from typing import NamedTuple

import torch

from cytosae.sae.base import LossTerms, Sae, SaeOutput

EPSILON = 1e-6
"""Keeps the quotients of the ghost term finite."""


class ExplainedVariance(NamedTuple):
    """How much of the activations' variance a reconstruction explains, 0-dimensional."""

    total: torch.Tensor
    """`1 - sum ||x - x^||^2 / sum ||x - mean||^2`, the mean over the batch's tokens."""
    per_token_std: torch.Tensor
    """Standard deviation over tokens of `1 - ||x - x^||^2 / ||x - mean||^2`."""


def reference_loss(
    sae: Sae,
    x: torch.Tensor,
    *,
    l1_coefficient: float,
    dead_mask: torch.Tensor | None = None,
    mse_cls_coefficient: float = 1.0,
    norm_weighted_l1: bool = False,
) -> tuple[LossTerms, SaeOutput]:
    """The loss of docs/definitions.md, section 5.

    A token's squared error is divided by its norm, not the norm's square. Ghost gradients (Jermyn and Templeton,
    Anthropic circuits updates, January 2024) see the error before `mse_cls_coefficient` weights token 0. A
    token of norm 0, for which the definition divides by 0, adds no error and no ghost gradient.

    Args:
        sae: The autoencoder, its decoder rows of unit norm.
        x: Activations, shape `(B, T, D)`.
        l1_coefficient: Weight of the sparsity term.
        dead_mask: Latents that get ghost gradients, bool, shape `(S,)`; none by default.
        mse_cls_coefficient: Weight of token 0's error.
        norm_weighted_l1: Weigh each latent's activation by the norm of its decoder row, which then may have any.

    Returns:
        The loss with its parts, and the forward pass it was computed from.

    Raises:
        ValueError: If `x` is not of shape `(B, T, D)`.
    """
    if x.ndim != 3 or x.shape[2] != sae.b_dec.shape[0]:
        raise ValueError(f"x must be (B, T, {sae.b_dec.shape[0]}), found {tuple(x.shape)}")
    output = sae(x)
    error = (output.reconstruction - x).square() / norm_as_divisor(x)
    ghost = x.new_zeros(())
    if dead_mask is not None:
        ghost = ghost_term(sae, x, output, error, dead_mask)
    if mse_cls_coefficient != 1.0:
        weights = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
        weights[0] = mse_cls_coefficient
        error = error * weights
    mse = error.mean()
    acts = output.acts * sae.W_dec.norm(dim=1) if norm_weighted_l1 else output.acts
    l1 = l1_coefficient * acts.abs().sum(dim=-1).mean()
    return LossTerms(mse + l1 + ghost, mse, l1, ghost), output


def ghost_term(
    sae: Sae, x: torch.Tensor, output: SaeOutput, error: torch.Tensor, dead_mask: torch.Tensor
) -> torch.Tensor:
    """The ghost-gradient term of docs/definitions.md, section 5: dead latents learn to explain the residual.

    `exp` of the dead latents' pre-activations is not bounded, as in the reference.

    Args:
        sae: The autoencoder.
        x: Activations, shape `(B, T, D)`.
        output: Its forward pass.
        error: Squared error over the token's norm, shape `(B, T, D)`, before any weighting.
        dead_mask: Dead latents, bool, shape `(S,)`.

    Returns:
        0-dimensional.
    """
    # CPU-GPU sync point: the number of dead latents decides a shape.
    dead = dead_mask.nonzero().squeeze(1)
    if not len(dead):
        return x.new_zeros(())
    residual = (x - output.reconstruction).detach()
    ghost = torch.exp(output.pre[..., dead]) @ sae.W_dec[dead]
    length = residual.norm(dim=-1, keepdim=True)
    scale = length / (EPSILON + 2 * ghost.norm(dim=-1, keepdim=True))
    ghost_error = (ghost * scale.detach() - residual).square() / norm_as_divisor(residual)
    rescale = (error / (ghost_error + EPSILON)).detach()
    ghost_loss: torch.Tensor = (rescale * ghost_error).mean()
    return ghost_loss


@torch.no_grad()
def explained_variance(x: torch.Tensor, reconstruction: torch.Tensor) -> ExplainedVariance:
    """Share of the variance of `x`, shape `(..., D)`, that the reconstruction explains."""
    x, reconstruction = x.flatten(0, -2), reconstruction.detach().flatten(0, -2)
    wide = torch.float32 if x.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    error = (x - reconstruction).square().sum(dim=-1, dtype=wide)
    variance = (x - x.mean(dim=0)).square().sum(dim=-1, dtype=wide)
    tiny = torch.finfo(wide).tiny
    per_token = 1 - error / variance.clamp_min(tiny)
    spread = per_token.std(correction=0)
    return ExplainedVariance(1 - error.sum() / variance.sum().clamp_min(tiny), spread)


def norm_as_divisor(x: torch.Tensor) -> torch.Tensor:
    """Norm over the last dimension, kept, as a divisor: 0 becomes infinity, so that quotient and gradient vanish.

    Not the smallest positive number: an error of 0.1 over that is 1e36, and one such token ruins the parameters.
    """
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.masked_fill(length == 0, torch.inf)
