"""The reference's architecture, and its training loss with plain autograd (docs/definitions.md, sections 4 and 5)."""

from typing import ClassVar

import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss

EPSILON = 1e-6
"""Keeps the quotients of the ghost term finite."""


class ReluSae(Sae):
    """`a = relu((x - b_dec) W_enc + b_enc)`, the reference's architecture; arguments as for `Sae`."""

    architecture: ClassVar[str] = "relu"
    training_options: ClassVar[frozenset[str]] = frozenset(
        {"l1_coefficient", "use_ghost_grads", "norm_weighted_l1", "mse_cls_coefficient"}
    )
    fits_reference: ClassVar[bool] = True
    splits_latents: ClassVar[bool] = True
    saelens_architecture: ClassVar[str | None] = "standard"

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre)

    def activate_(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`; overwrites `pre`."""
        return pre.relu_()

    @property
    def active_above(self) -> torch.Tensor | None:
        """See `Sae`."""
        return self.b_enc.new_zeros(())

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """The loss of docs/definitions.md, section 5; see `Sae`. `cytosae.training.fused_loss` is its fast path.

        A token's squared error is divided by its norm, not by the square of the norm. Ghost gradients (Jermyn and
        Templeton, Anthropic circuits updates, January 2024) use the error before `token_weights` are applied. A token
        of norm 0, for which the definition divides by 0, adds no error and no ghost gradient.
        """
        pre = self.pre_activations_in(x, inputs.dtype)
        acts = torch.relu(pre)
        reconstruction = (acts @ self.W_dec.to(inputs.dtype)).to(x.dtype) + self.b_dec
        error = (reconstruction - x).square() / norm_as_divisor(x)
        ghost = x.new_zeros(())
        if inputs.use_ghost_grads and inputs.dead_mask is not None:
            residual = (x - reconstruction).detach()
            ghost = self._ghost_term(pre, residual, error.detach(), inputs)
        if inputs.token_weights is not None:
            error = error * inputs.token_weights[:, None]
        mse = inputs.mean(error)
        weighted = acts * self.W_dec.norm(dim=1) if inputs.norm_weighted_l1 else acts
        l1 = inputs.weights.l1_coefficient * inputs.mean(weighted.sum(dim=-1, dtype=x.dtype))
        n_fired = (acts.detach() > 0).sum(dim=0)
        return SaeLoss(LossTerms(mse + l1 + ghost, mse, l1, ghost), n_fired, reconstruction)

    def _ghost_term(
        self, pre: torch.Tensor, residual: torch.Tensor, error: torch.Tensor, inputs: LossInputs
    ) -> torch.Tensor:
        """The ghost-gradient term of docs/definitions.md, section 5: dead latents learn to explain the residual.

        `exp` of the dead latents' pre-activations is not bounded, as in the reference.

        Args:
            pre: Latents before the nonlinearity, shape `(N, S)`.
            residual: Tokens minus their reconstruction, shape `(N, D)`, without a graph.
            error: Squared error over the token's norm, shape `(N, D)`, before any weighting, without a graph.
            inputs: What the loss depends on.

        Returns:
            0-dimensional.
        """
        # CPU-GPU sync point: the number of dead latents decides a shape.
        assert inputs.dead_mask is not None
        dead = inputs.dead_mask.nonzero().squeeze(1)
        if not len(dead):
            return residual.new_zeros(())
        ghost = (torch.exp(pre[:, dead]) @ self.W_dec[dead].to(pre.dtype)).to(residual.dtype)
        scale = residual.norm(dim=-1, keepdim=True) / (EPSILON + 2 * ghost.norm(dim=-1, keepdim=True))
        ghost_error = (ghost * scale.detach() - residual).square() / norm_as_divisor(residual)
        rescale = error / (ghost_error.detach() + EPSILON)
        return inputs.mean(rescale * ghost_error)


def norm_as_divisor(x: torch.Tensor) -> torch.Tensor:
    """Norm over the last dimension, kept, as a divisor: 0 becomes infinity, so that quotient and gradient vanish.

    The smallest positive number would not do: an error of 0.1 divided by it is 1e36, and one such token ruins the
    parameters.
    """
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.masked_fill(norm == 0, torch.inf)
