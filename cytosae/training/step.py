"""One training step: decoder normalised, loss, gradients, Adam. The plain path and the fast one behind one call."""

import copy
from typing import Any

import torch

from cytosae.sae.base import LossInputs, LossTerms, LossWeights, Sae, SaeLoss
from cytosae.training.fused_loss import MatmulConfig, fused_reference_loss, iter_parts
from cytosae.training.loss import reference_loss

_FUSED_DEVICES = ("cpu", "cuda")
"""Where every supported torch has a fused Adam."""

_THRESHOLD_RATE = 10.0
"""How much faster JumpReLU's thresholds move: one number each, measured in units of activations, while 2 D weights
move what they are held against."""


class DeadLatentTracker:
    """Counts, for every latent, the steps since it last fired.

    Args:
        n_latents: Latents S.
        device: Where the counts live.
    """

    def __init__(self, n_latents: int, *, device: torch.device | str = "cpu") -> None:
        self.n_steps_since_fired = torch.zeros(n_latents, dtype=torch.int64, device=device)
        """Int64, shape `(S,)`."""

    def dead(self, window: int) -> torch.Tensor:
        """Latents that have not fired for more than `window` steps, bool, shape `(S,)`."""
        return self.n_steps_since_fired > window

    def update(self, n_fired: torch.Tensor) -> None:
        """Count a step in which each latent was active on so many tokens, shape `(S,)`."""
        self.n_steps_since_fired.add_(1).masked_fill_(n_fired > 0, 0)


class TrainStep:
    """Adam on the reference loss (docs/definitions.md, section 5), or on another architecture's.

    Args:
        sae: The autoencoder to train.
        weights: Weights of the loss's terms.
        use_ghost_grads: Whether dead latents get ghost gradients (`relu`); the other losses revive in their own way.
        dead_feature_window: Steps without firing after which a latent is dead.
        mse_cls_coefficient: Weight of token 0's error (`relu`).
        norm_weighted_l1: Weigh a latent's L1 by the norm of its decoder row, which is then left free (Conerly et al.,
            Anthropic circuits updates, April 2024); otherwise rows are normalised before every forward pass.
        max_gradient: Norm to which the gradient of all parameters together is clipped; None for never.
        products: How products are computed; None for the plain path with autograd in float32 (`relu` only).

    Raises:
        ValueError: If an option is not one of the architecture's.
    """

    def __init__(
        self,
        sae: Sae,
        *,
        weights: LossWeights,
        use_ghost_grads: bool,
        dead_feature_window: int,
        mse_cls_coefficient: float = 1.0,
        norm_weighted_l1: bool = False,
        max_gradient: float | None = None,
        products: MatmulConfig | None = None,
    ) -> None:
        self._is_reference = sae.architecture == "relu"
        if not self._is_reference and (use_ghost_grads or norm_weighted_l1 or mse_cls_coefficient != 1):
            raise ValueError(
                "ghost gradients, norm-weighted L1 and the CLS token's weight are options of the relu architecture, "
                f"found {sae.architecture!r}"
            )
        self.sae = sae
        self.tracker = DeadLatentTracker(sae.b_enc.shape[0], device=sae.b_enc.device)
        self._weights = weights
        self._use_ghost_grads = use_ghost_grads
        self._dead_feature_window = dead_feature_window
        self._mse_cls_coefficient = mse_cls_coefficient
        self._norm_weighted_l1 = norm_weighted_l1
        self._max_gradient = max_gradient
        self._products = products
        fused = sae.b_enc.device.type in _FUSED_DEVICES
        thresholds = [part for name, part in sae.named_parameters() if name == "threshold"]
        groups: list[dict[str, Any]] = [
            {"params": [part for name, part in sae.named_parameters() if name != "threshold"]}
        ]
        if thresholds:
            groups.append({"params": thresholds, "rate": _THRESHOLD_RATE})
        self._optimizer = torch.optim.Adam(groups, betas=(0.9, 0.999), fused=fused)

    def step(self, x: torch.Tensor, lr: float, *, sparsity: float = 1.0) -> SaeLoss:
        """Train on one batch.

        Args:
            x: Activations, float32, shape `(B, T, D)`, on the autoencoder's device.
            lr: Learning rate of this step.
            sparsity: What the sparsity term's weight is multiplied by in this step.

        Returns:
            What was computed before the parameters changed, without a graph.
        """
        sae = self.sae
        if not self._norm_weighted_l1:
            sae.normalise_decoder_()
        weights = self._weights._replace(l1=self._weights.l1 * sparsity, l0=self._weights.l0 * sparsity)
        # The mask is that of the steps before this one, as in the reference.
        dead = self.tracker.dead(self._dead_feature_window)
        loss = self._reference(x, weights, dead) if self._is_reference else self._in_parts(x, weights, dead)
        self.tracker.update(loss.n_fired)
        if not self._norm_weighted_l1:
            sae.remove_parallel_gradient_()
        if self._max_gradient is not None:
            torch.nn.utils.clip_grad_norm_(sae.parameters(), self._max_gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
        self._optimizer.step()
        return loss

    def _reference(self, x: torch.Tensor, weights: LossWeights, dead: torch.Tensor) -> SaeLoss:
        """Loss and gradients of docs/definitions.md, section 5."""
        dead_mask = dead if self._use_ghost_grads else None
        if self._products is not None:
            return fused_reference_loss(
                self.sae, x, l1_coefficient=weights.l1, dead_mask=dead_mask,
                mse_cls_coefficient=self._mse_cls_coefficient, norm_weighted_l1=self._norm_weighted_l1,
                products=self._products,
            )  # fmt: skip
        self._optimizer.zero_grad(set_to_none=True)
        terms, output = reference_loss(
            self.sae, x, l1_coefficient=weights.l1, dead_mask=dead_mask,
            mse_cls_coefficient=self._mse_cls_coefficient, norm_weighted_l1=self._norm_weighted_l1,
        )  # fmt: skip
        terms.loss.backward()  # type: ignore[no-untyped-call]
        n_fired = (output.acts.detach() > 0).flatten(0, -2).sum(dim=0)
        return SaeLoss(LossTerms(*(term.detach() for term in terms)), n_fired, output.reconstruction.detach())

    def _in_parts(self, x: torch.Tensor, weights: LossWeights, dead: torch.Tensor) -> SaeLoss:
        """Loss and gradients of another architecture, summed over parts of the batch that fit the memory budget.

        What an architecture does with a batch (the latents that BatchTopK keeps, JumpReLU's L0) is done with a part.
        """
        products = self._products or MatmulConfig()
        self._optimizer.zero_grad(set_to_none=True)
        tokens = x.flatten(0, 1)
        variance = (tokens - tokens.mean(dim=0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
        reconstruction = torch.empty_like(tokens)
        total = torch.zeros(len(LossTerms._fields), device=x.device, dtype=x.dtype)
        n_fired = torch.zeros_like(self.tracker.n_steps_since_fired)
        for part in iter_parts(len(tokens), products.n_tokens(len(n_fired))):
            share = (part.stop - part.start) / len(tokens)
            loss = self.sae.training_loss(tokens[part], LossInputs(variance, share, dead, weights, products.dtype))
            loss.terms.loss.backward()  # type: ignore[no-untyped-call]
            total += torch.stack([term.detach() for term in loss.terms])
            n_fired += loss.n_fired
            reconstruction[part] = loss.reconstruction.detach()
        return SaeLoss(LossTerms(*total.unbind()), n_fired, reconstruction.view(x.shape))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain numbers."""
        return {
            "sae": self.sae.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "n_steps_since_fired": self.tracker.n_steps_since_fired,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken."""
        self.sae.load_state_dict(state["sae"])
        # Copied: torch keeps the tensors it is given, and two steps would train on the same moments.
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.tracker.n_steps_since_fired.copy_(state["n_steps_since_fired"])
