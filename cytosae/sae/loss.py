"""Inputs and results of a training loss, the same for every architecture."""

from typing import NamedTuple

import torch

from cytosae.sae.world import ALONE, World


class LossTerms(NamedTuple):
    """A loss and its parts, 0-dimensional."""

    loss: torch.Tensor
    """Sum of the other terms."""
    mse: torch.Tensor
    """Reconstruction: squared error over the token's norm (`relu`), or the unexplained share of the variance."""
    l1: torch.Tensor
    """Sparsity term, coefficient included: L1, or what the architecture uses instead."""
    ghost: torch.Tensor
    """Term that revives latents, coefficient included: ghost gradients, AuxK, the pre-activation loss; or the gate's
    own error."""


class LossWeights(NamedTuple):
    """Coefficients of the loss terms. An architecture ignores those that it does not use."""

    l1_coefficient: float = 0.0
    """Weight of the sum of activations per token (`relu`, `gated`)."""
    aux_coefficient: float = 1 / 32
    """Weight of AuxK (`topk`, `batchtopk`, `matryoshka`)."""
    l0_coefficient: float = 1.0
    """Weight of the squared relative distance between L0 and its target (`jumprelu`)."""
    pre_act_coefficient: float = 0.0
    """Weight of the distance of dead latents from their thresholds (`jumprelu`)."""


class LossInputs(NamedTuple):
    """Everything that the loss of some tokens depends on, apart from the tokens and the parameters."""

    variance: torch.Tensor
    """Sum of `||x - mean||^2` over the whole batch, on all ranks, 0-dimensional."""
    weights: LossWeights
    """Coefficients of the terms."""
    dtype: torch.dtype
    """Type of dense matrix products."""
    dead_mask: torch.Tensor | None = None
    """Dead latents, bool, shape `(S,)`; None for none."""
    token_weights: torch.Tensor | None = None
    """Weight of each token's squared error, shape `(N,)`; None for 1 each (`relu`)."""
    use_ghost_grads: bool = False
    """Whether dead latents get ghost gradients (`relu`)."""
    norm_weighted_l1: bool = False
    """Whether L1 weighs each activation by the norm of its decoder row (`relu`)."""
    n_tokens: int | None = None
    """Tokens of the whole batch, on all ranks; None if this rank has all of them."""
    token_ranks: World = ALONE
    """Processes that have other tokens of the batch. Terms of a loss are those of all, gradients those of its own."""
    latent_ranks: World = ALONE
    """Processes that have the same tokens and other latents of the autoencoder."""

    @property
    def ranks(self) -> World:
        """Processes that have other activations of the batch: of other tokens, or of other latents."""
        return self.latent_ranks if self.token_ranks.size == 1 else self.token_ranks

    def count(self, tokens: torch.Tensor) -> int:
        """Tokens of the whole batch, of which `tokens` are this rank's, shape `(n, ...)`."""
        return len(tokens) if self.n_tokens is None else self.n_tokens

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over the whole batch, 0-dimensional, of values of this rank's tokens, shape `(n, ...)`."""
        own = values.mean() if len(values) else values.sum()
        return self.token_ranks.total(own * (len(values) / self.count(values)))


class SaeLoss(NamedTuple):
    """A training loss and what it was computed from."""

    terms: LossTerms
    """The loss and its parts."""
    n_fired: torch.Tensor
    """Number of tokens on which each latent is active, int64, shape `(S,)`."""
    reconstruction: torch.Tensor
    """Reconstruction, same shape as the activations."""
