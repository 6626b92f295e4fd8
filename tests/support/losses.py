"""An architecture's plain training loss of a whole batch."""

import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossWeights, SaeLoss


def make_inputs(x: torch.Tensor, *, mse_cls_coefficient: float = 1.0, dead_mask=None, **more) -> LossInputs:
    """Inputs for all tokens of `x`, shape `(B, T, D)`; a mask of dead latents asks for ghost gradients."""
    tokens = x.flatten(0, -2)
    token_weights = x.new_ones(x.shape[:-1])
    token_weights[:, 0] = mse_cls_coefficient
    norm_weighted_l1 = more.pop("norm_weighted_l1", False)
    return LossInputs(
        variance=(tokens - tokens.mean(dim=0)).square().sum(), weights=LossWeights(**more), dtype=x.dtype,
        dead_mask=dead_mask, token_weights=token_weights.flatten(), use_ghost_grads=dead_mask is not None,
        norm_weighted_l1=norm_weighted_l1,
    )  # fmt: skip


def plain_loss(sae: Sae, x: torch.Tensor, **options) -> SaeLoss:
    """`sae.training_loss` of activations of shape `(B, T, D)`; options as for `make_inputs`."""
    loss = sae.training_loss(x.flatten(0, 1), make_inputs(x, **options))
    return loss._replace(reconstruction=loss.reconstruction.view(x.shape))
