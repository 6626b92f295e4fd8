"""One training step: decoder normalised, loss, gradients, Adam. Plain and fused losses behind one call."""

import copy
from typing import Any

import torch

from cytosae.sae.base import Sae
from cytosae.sae.devices import widest_type
from cytosae.sae.loss import LossInputs, LossWeights, SaeLoss
from cytosae.sae.world import ALONE, World
from cytosae.training.adam import RowwiseAdam, remove_radial_
from cytosae.training.fused_loss import find_fused_loss
from cytosae.training.gradients import MATRICES, Gradients, GradientsOfRanks, RowGradient, StoredGradients
from cytosae.training.latent_parts import LatentParts
from cytosae.training.matmul import MatmulConfig

_BETA1, _BETA2 = 0.9, 0.999
"""Adam's decays of the mean gradient and of the mean squared gradient in the reference."""


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
        beta1: Adam's decay of the mean gradient; None for 0.9.
        beta2: Adam's decay of the mean squared gradient; None for 0.999.
        encoder_lr_factor: Learning rate of `W_enc` in terms of `lr`; None for 1.
        weight_decay: In a step in which a latent is active, its encoder weights are first multiplied by 1 - their
            learning rate x this; None for 0. AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) does so in every
            step, in which rare latents shrink until they die.
        token_ranks: Processes that train the same autoencoder on other tokens of every batch.
        parts: How the autoencoder is cut, if `sae` is this process' part of one.
        latent_ranks: Processes that hold its other parts, and train on the same tokens.

    Raises:
        ValueError: If the architecture does not use an option that was given, or cannot be split.
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
        beta1: float | None = None,
        beta2: float | None = None,
        encoder_lr_factor: float | None = None,
        weight_decay: float | None = None,
        token_ranks: World = ALONE,
        latent_ranks: World = ALONE,
        parts: LatentParts | None = None,
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
        self._token_ranks, self._latent_ranks = token_ranks, latent_ranks
        self._parts = parts or LatentParts(ALONE, len(sae.b_enc))
        self.tracker = DeadLatentTracker(sae.b_enc.shape[0], device=sae.b_enc.device)
        self._weights = weights
        self._use_ghost_grads = use_ghost_grads
        self._dead_feature_window = dead_feature_window
        self._mse_cls_coefficient = mse_cls_coefficient
        self._norm_weighted_l1 = norm_weighted_l1
        self._max_gradient = max_gradient
        self._matmul = matmul or MatmulConfig(dtype=sae.W_enc.dtype)
        self._fused_loss = find_fused_loss(sae) if matmul else None
        if latent_ranks.size > 1 and not (self._fused_loss and sae.splits_latents):
            raise ValueError(f"architecture {sae.architecture} cannot be split by latents: split the data")
        # A row for each latent, next to each other: gradients, moments and weights of a latent are updated together.
        sae.W_enc.data = sae.W_enc.data.t().contiguous().t()
        self.optimizer = RowwiseAdam(
            _parameter_groups(sae, lr, encoder_lr_factor, weight_decay),
            lr=lr,
            betas=(_BETA1 if beta1 is None else beta1, _BETA2 if beta2 is None else beta2),
            device=sae.b_enc.device,
        )
        """Adam; its groups' `lr` are the rates of the next step, their `lr_factor` what schedules multiply rates by."""

    def step(self, x: torch.Tensor, *, sparsity: float = 1.0) -> SaeLoss:
        """Train on one batch with the optimiser's current learning rate.

        Args:
            x: Activations, float32, shape `(B, T, D)`, on the autoencoder's device: this rank's part of the batch, of
                which it may have none.
            sparsity: Factor of the sparsity term's coefficient in this step.

        Returns:
            The loss of the whole batch before the update, without a graph; its reconstruction is of `x`, shape
            `(B, T, D)`.

        Raises:
            ValueError: If `x` is not of shape `(B, T, D)`.
        """
        sae = self.sae
        if x.ndim != 3 or x.shape[2] != sae.b_dec.shape[0]:
            raise ValueError(f"x must be (B, T, {sae.b_dec.shape[0]}), found {tuple(x.shape)}")
        if not self._norm_weighted_l1:
            sae.normalise_decoder_()
        tokens, inputs = x.flatten(0, 1), self._loss_inputs(x, sparsity)
        sae.zero_grad(set_to_none=True)
        if self._fused_loss is not None:
            loss, gradients = self._fused_loss(sae, tokens, inputs, self._matmul)
        else:
            loss, gradients = self._plain_loss(tokens, inputs)
        n_fired = self._token_ranks.sum(loss.n_fired)
        self.tracker.update(n_fired)
        if inputs.ranks.size > 1:
            gradients = GradientsOfRanks(sae, gradients, inputs.token_ranks, inputs.latent_ranks)
        self._update(gradients, n_fired > 0)
        return loss._replace(n_fired=n_fired, reconstruction=loss.reconstruction.view(x.shape))

    def _plain_loss(self, tokens: torch.Tensor, inputs: LossInputs) -> tuple[SaeLoss, Gradients]:
        """Loss and gradients by autograd, of the whole batch at once."""
        loss = self.sae.training_loss(tokens, inputs)
        loss.terms.loss.backward()  # type: ignore[no-untyped-call]
        terms = type(loss.terms)(*(term.detach() for term in loss.terms))
        return SaeLoss(terms, loss.n_fired, loss.reconstruction.detach()), StoredGradients(self.sae)

    @torch.no_grad()
    def _update(self, gradients: Gradients, is_active: torch.Tensor) -> None:
        """Take Adam's step, given which latents were active. A block of a gradient is dropped once it was taken up."""
        sae = self.sae
        scale = None
        if self._max_gradient is not None:
            if not gradients.repeats_cheaply:
                gradients.store_(sae)
                gradients = StoredGradients(sae)
            scale = self._clipping(gradients)
        for gradient in gradients.rows():
            self.optimizer.update_rows(
                getattr(sae, gradient.name), gradient, on_sphere=self._is_on_sphere(gradient), scale=scale,
                decaying=is_active,
            )  # fmt: skip
            del gradient  # it need not live while the next one is computed
        for matrix in (sae.W_enc, sae.W_dec):
            self.optimizer.finish_rows(matrix)
            matrix.grad = None
        for parameter in sae.parameters():
            if scale is not None and parameter.grad is not None:
                parameter.grad.mul_(scale)
        self.optimizer.step()

    def _clipping(self, gradients: Gradients) -> torch.Tensor:
        """The factor that clips the gradient of all parameters together, 0-dimensional, as torch computes it."""
        wide = widest_type(self.sae.b_enc.device)
        squares = []
        for gradient in gradients.rows():
            values = gradient.widen(self.sae.b_dec)
            if self._is_on_sphere(gradient):
                remove_radial_(values, self.sae.W_dec[gradient.latents])
            squares.append(values.square().sum(dtype=wide))
        vectors = {name: part.grad for name, part in self.sae.named_parameters() if name not in MATRICES}
        if self._latent_ranks.rank:
            del vectors["b_dec"]  # the same on all of them
        squares += [grad.square().sum(dtype=wide) for grad in vectors.values() if grad is not None]
        norm = self._latent_ranks.sum(torch.stack(squares).sum()).sqrt().to(self.sae.b_enc.dtype)
        assert self._max_gradient is not None
        return (self._max_gradient / (norm + 1e-6)).clamp_max(1.0)

    def _is_on_sphere(self, gradient: RowGradient) -> bool:
        """Whether the rows keep norm 1: the next normalisation would undo what changes their norms."""
        return gradient.name == "W_dec" and not self._norm_weighted_l1

    def _loss_inputs(self, x: torch.Tensor, sparsity: float) -> LossInputs:
        """Everything that the loss of a batch depends on, apart from the batch and the parameters."""
        tokens, weights = x.flatten(0, 1), self._weights
        token_weights = None
        if self._mse_cls_coefficient != 1:
            token_weights = x.new_ones(x.shape[:2])
            token_weights[:, 0] = self._mse_cls_coefficient
        ranks, n_all = self._token_ranks, self._token_ranks.add(len(tokens))
        own_mean = tokens.mean(dim=0) if len(tokens) else tokens.new_zeros(x.shape[2])
        mean = ranks.sum(own_mean * (len(tokens) / n_all))
        variance = ranks.sum((tokens - mean).square().sum())
        return LossInputs(
            variance=variance.clamp_min(torch.finfo(x.dtype).tiny),
            weights=weights._replace(
                l1_coefficient=weights.l1_coefficient * sparsity, l0_coefficient=weights.l0_coefficient * sparsity
            ),
            dtype=self._matmul.dtype,
            # Counted up to the step before this one, as in the reference.
            dead_mask=self.tracker.dead(self._dead_feature_window),
            token_weights=None if token_weights is None else token_weights.flatten(),
            use_ghost_grads=self._use_ghost_grads,
            norm_weighted_l1=self._norm_weighted_l1,
            n_tokens=n_all,
            token_ranks=ranks,
            latent_ranks=self._latent_ranks,
        )

    def find_unequal_ranks(self) -> list[int]:
        """Ranks whose weights are not, bit for bit, those of rank 0, though they train the same autoencoder."""
        if self._token_ranks.size == 1:
            return []
        parts = [part.detach() for part in self.sae.parameters()]
        bits = [part.view(torch.int32 if part.itemsize == 4 else torch.int64) for part in parts]
        found = self._token_ranks.gather_numbers([int(one.sum(dtype=torch.int64)) for one in bits])
        return [rank for rank, numbers in enumerate(found) if numbers != found[0]]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors and plain numbers, of all parts on rank 0."""
        join = self._parts.join
        return {
            "sae": {name: join(name, values) for name, values in self.sae.state_dict().items()},
            "optimizer": self._parts.map_optimizer(self.optimizer.state_dict(), self._names(), join),
            "n_steps_since_fired": join("n_steps_since_fired", self.tracker.n_steps_since_fired),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly where `state_dict` was taken, also by another number of parts."""
        cut = self._parts.cut
        self.sae.load_state_dict({name: cut(name, values) for name, values in state["sae"].items()})
        # Copied: torch keeps the tensors that it is given, and two steps would train on the same moments.
        moments = self._parts.map_optimizer(state["optimizer"], self._names(), cut)
        self.optimizer.load_state_dict(copy.deepcopy(moments))
        self.tracker.n_steps_since_fired.copy_(cut("n_steps_since_fired", state["n_steps_since_fired"]))

    def _names(self) -> list[str]:
        """Names of the optimiser's parameters, in its order."""
        names = {id(part): name for name, part in self.sae.named_parameters()}
        return [names[id(part)] for group in self.optimizer.param_groups for part in group["params"]]


def _parameter_groups(
    sae: Sae, lr: float, encoder_lr_factor: float | None, weight_decay: float | None
) -> list[dict[str, Any]]:
    """Adam's parameter groups: one with the common rate, and one per parameter with a rate or a decay of its own."""
    named = dict(sae.named_parameters())
    factors = dict(sae.lr_factors)
    if encoder_lr_factor is not None or weight_decay:
        factors["W_enc"] = 1.0 if encoder_lr_factor is None else encoder_lr_factor
    common = [part for name, part in named.items() if name not in factors]
    groups: list[dict[str, Any]] = [{"params": common}]
    for name, factor in factors.items():
        decay = (weight_decay or 0.0) if name == "W_enc" else 0.0
        groups.append({"params": [named[name]], "lr": lr * factor, "lr_factor": factor, "weight_decay": decay})
    return groups
