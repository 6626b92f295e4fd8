"""One training step: decoder normalised, loss, gradients, Adam. The plain path; a faster one stands beside it later."""

import copy
from typing import Any, NamedTuple

import torch

from cytosae.objective import LossTerms, reference_loss
from cytosae.sae import SparseAutoencoder

_FUSED_DEVICES = ("cpu", "cuda")
"""Where every supported torch has a fused Adam."""


class StepResult(NamedTuple):
    """What a step computed before it changed the parameters."""

    terms: LossTerms
    """The loss with its parts, detached."""
    acts: torch.Tensor
    """Latent activations, shape `(B, T, S)`, detached."""
    reconstruction: torch.Tensor
    """Reconstruction, shape `(B, T, D)`, detached."""


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

    @torch.no_grad()
    def update(self, acts: torch.Tensor) -> None:
        """Count a step with latent activations of shape `(..., S)`."""
        fired = (acts > 0).flatten(0, -2).any(dim=0)
        self.n_steps_since_fired.add_(1).masked_fill_(fired, 0)


class TrainStep:
    """Adam on the reference loss (definition 4.5).

    Args:
        sae: The autoencoder to train; its decoder rows are normalised before every forward pass.
        l1_coefficient: Weight of the sparsity term.
        use_ghost_grads: Whether dead latents get ghost gradients.
        dead_feature_window: Steps without firing after which a latent is dead.
        mse_cls_coefficient: Weight of token 0's error.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        *,
        l1_coefficient: float,
        use_ghost_grads: bool,
        dead_feature_window: int,
        mse_cls_coefficient: float = 1.0,
    ) -> None:
        self.sae = sae
        self.tracker = DeadLatentTracker(sae.b_enc.shape[0], device=sae.b_enc.device)
        self._l1_coefficient = l1_coefficient
        self._use_ghost_grads = use_ghost_grads
        self._dead_feature_window = dead_feature_window
        self._mse_cls_coefficient = mse_cls_coefficient
        fused = sae.b_enc.device.type in _FUSED_DEVICES
        self._optimizer = torch.optim.Adam(sae.parameters(), betas=(0.9, 0.999), fused=fused)

    def step(self, x: torch.Tensor, lr: float) -> StepResult:
        """Train on one batch.

        Args:
            x: Activations, float32, shape `(B, T, D)`, on the autoencoder's device.
            lr: Learning rate of this step.
        """
        sae = self.sae
        sae.normalise_decoder_()
        # The mask is that of the steps before this one, as in the reference.
        dead = self.tracker.dead(self._dead_feature_window) if self._use_ghost_grads else None
        terms, output = reference_loss(
            sae,
            x,
            l1_coefficient=self._l1_coefficient,
            dead_mask=dead,
            mse_cls_coefficient=self._mse_cls_coefficient,
        )
        self.tracker.update(output.acts)
        self._optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()  # type: ignore[no-untyped-call]
        sae.remove_parallel_gradient_()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        detached = LossTerms(*(term.detach() for term in terms))
        return StepResult(detached, output.acts.detach(), output.reconstruction.detach())

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
