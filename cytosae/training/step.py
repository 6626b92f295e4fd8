"""One training step: decoder normalised, loss, gradients, Adam. Plain and fused losses behind one call."""

import copy
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossTerms, LossWeights, SaeLoss
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.matmul import MatmulConfig, iter_parts

_FUSED_DEVICES = ("cpu", "cuda")
"""Devices on which every supported torch has a fused Adam."""


class DeadLatentTracker:
    """Counts the steps since each latent last fired.

    Args:
        n_latents: Latents S.
        device: Device of the counts.
    """

    def __init__(self, n_latents: int, *, device: torch.device | str = "cpu") -> None:
        self.n_steps_since_fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """Int64, shape `(S,)`."""

    def dead(self, window: int) -> torch.Tensor:
        """Latents that have not fired for more than `window` steps, bool, shape `(S,)`."""
        return self.n_steps_since_fired > window

    def update(self, n_fired: torch.Tensor) -> None:
        """Add a step in which each latent was active on `n_fired` tokens, shape `(S,)`."""
        self.n_steps_since_fired.add_(1).masked_fill_(n_fired > 0, 0)


class TrainStep:
    """Adam on an architecture's training loss (for `relu`, docs/definitions.md, section 5).

    Args:
        sae: The autoencoder to train.
        lr: Learning rate; a scheduler on `optimizer` may change it.
        weights: Coefficients of the loss terms.
        use_ghost_grads: Whether dead latents get ghost gradients (`relu`); other losses have their own term.
        dead_feature_window: A latent is dead after more than this number of steps without firing.
        mse_cls_coefficient: Weight of token 0's error (`relu`).
        norm_weighted_l1: Weigh a latent's L1 by the norm of its decoder row, which is then unconstrained (Conerly et
            al., Anthropic circuits updates, April 2024); otherwise rows are normalised before every forward pass.
        max_gradient: Norm to which the gradient of all parameters together is clipped; None for no clipping.
        matmul: How products are computed, by a fused loss if there is one; None for plain autograd.

    Raises:
        ValueError: If the architecture does not use an option that was given.
    """

    def __init__(
        self,
        sae: Sae,
        *,
        lr: float,
        weights: LossWeights,
        use_ghost_grads: bool,
        dead_feature_window: int,
        mse_cls_coefficient: float = 1.0,
        norm_weighted_l1: bool = False,
        max_gradient: float | None = None,
        matmul: MatmulConfig | None = None,
    ) -> None:
        given = {
            "use_ghost_grads": use_ghost_grads,
            "norm_weighted_l1": norm_weighted_l1,
            "mse_cls_coefficient": mse_cls_coefficient != 1,
        }
        for name, is_given in given.items():
            if is_given and name not in sae.training_options:
                raise ValueError(f"architecture {sae.architecture} has no option {name}: leave it out")
        self.sae = sae
        self.tracker = DeadLatentTracker(sae.b_enc.shape[0], device=sae.b_enc.device)
        self._weights = weights
        self._use_ghost_grads = use_ghost_grads
        self._dead_feature_window = dead_feature_window
        self._mse_cls_coefficient = mse_cls_coefficient
        self._norm_weighted_l1 = norm_weighted_l1
        self._max_gradient = max_gradient
        self._matmul = matmul or MatmulConfig(dtype=sae.W_enc.dtype)
        self._fused_loss = find_fused_loss(sae) if matmul else None
        self.optimizer = torch.optim.Adam(
            _parameter_groups(sae, lr), lr=lr, betas=(0.9, 0.999), fused=sae.b_enc.device.type in _FUSED_DEVICES
        )
        """Adam; its groups' `lr` are the rates of the next step, their `lr_factor` what schedules multiply rates by."""

    def step(self, x: torch.Tensor, *, sparsity: float = 1.0) -> SaeLoss:
        """Train on one batch with the optimiser's current learning rate.

        Args:
            x: Activations, float32, shape `(B, T, D)`, on the autoencoder's device.
            sparsity: Factor of the sparsity term's coefficient in this step.

        Returns:
            The loss before the update, without a graph; its reconstruction has shape `(B, T, D)`.

        Raises:
            ValueError: If `x` is not of shape `(B, T, D)`.
        """
        sae = self.sae
        if x.ndim != 3 or x.shape[2] != sae.b_dec.shape[0]:
            raise ValueError(f"x must be (B, T, {sae.b_dec.shape[0]}), found {tuple(x.shape)}")
        if not self._norm_weighted_l1:
            sae.normalise_decoder_()
        tokens, inputs = x.flatten(0, 1), self._loss_inputs(x, sparsity)
        if self._fused_loss is not None:
            loss = self._fused_loss(sae, tokens, inputs, self._matmul)
        else:
            loss = self._loss_in_parts(tokens, inputs)
        self.tracker.update(loss.n_fired)
        if not self._norm_weighted_l1:
            sae.remove_parallel_gradient_()
        if self._max_gradient is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), self._max_gradient)
        self.optimizer.step()
        return loss._replace(reconstruction=loss.reconstruction.view(x.shape))

    def _loss_inputs(self, x: torch.Tensor, sparsity: float) -> LossInputs:
        """Everything that the loss of a batch depends on, apart from the batch and the parameters."""
        tokens, weights = x.flatten(0, 1), self._weights
        token_weights = None
        if self._mse_cls_coefficient != 1:
            token_weights = x.new_ones(x.shape[:2])
            token_weights[:, 0] = self._mse_cls_coefficient
        return LossInputs(
            variance=(tokens - tokens.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny),
            share=1.0,
            weights=weights._replace(
                l1_coefficient=weights.l1_coefficient * sparsity, l0_coefficient=weights.l0_coefficient * sparsity
            ),
            dtype=self._matmul.dtype,
            # Counted up to the step before this one, as in the reference.
            dead_mask=self.tracker.dead(self._dead_feature_window),
            token_weights=None if token_weights is None else token_weights.flatten(),
            use_ghost_grads=self._use_ghost_grads,
            norm_weighted_l1=self._norm_weighted_l1,
        )

    def _loss_in_parts(self, tokens: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Loss and gradients by autograd, summed over parts of the batch that fit the memory budget.

        What an architecture computes from several tokens (the latents that BatchTopK keeps, JumpReLU's L0) is computed
        per part.
        """
        self.optimizer.zero_grad(set_to_none=True)
        reconstruction = torch.empty_like(tokens)
        total = torch.zeros(len(LossTerms._fields), device=tokens.device, dtype=tokens.dtype)
        n_fired = torch.zeros_like(self.tracker.n_steps_since_fired)
        for part in iter_parts(len(tokens), self._matmul.n_tokens(len(n_fired))):
            share = (part.stop - part.start) / len(tokens)
            token_weights = None if inputs.token_weights is None else inputs.token_weights[part]
            loss = self.sae.training_loss(tokens[part], inputs._replace(share=share, token_weights=token_weights))
            loss.terms.loss.backward()  # type: ignore[no-untyped-call]
            total += torch.stack([term.detach() for term in loss.terms])
            n_fired += loss.n_fired
            reconstruction[part] = loss.reconstruction.detach()
        return SaeLoss(LossTerms(*total.unbind()), n_fired, reconstruction)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain numbers."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "n_steps_since_fired": self.tracker.n_steps_since_fired,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly where `state_dict` was taken."""
        self.sae.load_state_dict(state["sae"])
        # Copied: torch keeps the tensors that it is given, and two steps would train on the same moments.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.tracker.n_steps_since_fired.copy_(state["n_steps_since_fired"])


def _parameter_groups(sae: Sae, lr: float) -> list[dict[str, Any]]:
    """Adam's parameter groups: one with the common rate, and one per parameter with a rate of its own."""
    named = dict(sae.named_parameters())
    common = [part for name, part in named.items() if name not in sae.lr_factors]
    groups: list[dict[str, Any]] = [{"params": common}]
    groups += [
        {"params": [named[name]], "lr": lr * factor, "lr_factor": factor} for name, factor in sae.lr_factors.items()
    ]
    return groups
