"""JumpReLU: each latent has a learned threshold, below which it is inactive."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from cytosae.sae.base import Sae
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss

_INITIAL_THRESHOLD = 0.1
_BANDWIDTH = 1.0


class JumpReluSae(Sae):
    """`a = pre` where `pre > threshold`, else 0 (Rajamanoharan et al. 2024, arXiv:2407.14435).

    The thresholds are learned through straight-through estimators with a rectangle kernel of width `bandwidth`. The
    loss `(L0 / k - 1)^2` keeps L0 near k (section 4.3 of the same paper trains to a given L0). A pre-activation loss,
    off by default, revives dead latents.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Target number of active latents per token.
        bandwidth: Width of the kernel, in units of the activations.
        **more: As for `Sae`.

    Raises:
        ValueError: If `k` or `bandwidth` is not above 0.
    """

    architecture: ClassVar[str] = "jumprelu"
    setting_names: ClassVar[tuple[str, ...]] = ("k", "bandwidth")
    training_options: ClassVar[frozenset[str]] = frozenset({"l0_coefficient", "pre_act_coefficient"})
    fits_to_tokens: ClassVar[bool] = True
    # A threshold is one number in units of activations; 2 D weights move the value that it is compared with.
    lr_factors: ClassVar[Mapping[str, float]] = {"threshold": 10.0}
    saelens_architecture: ClassVar[str | None] = "jumprelu"

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        k: float = 32,
        bandwidth: float = _BANDWIDTH,
        **more: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(d_in, n_latents, **more)
        if not (0 < k < torch.inf and 0 < bandwidth < torch.inf):
            raise ValueError(f"k and bandwidth must be above 0, found {k!r} and {bandwidth!r}")
        self.k, self.bandwidth = k, bandwidth
        self.threshold = nn.Parameter(self.b_enc.new_full(self.b_enc.shape, _INITIAL_THRESHOLD))

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre) * (pre > self.threshold[latents].to(pre.dtype))

    @property
    def active_above(self) -> torch.Tensor | None:
        """See `Sae`."""
        return torch.relu(self.threshold.detach())

    @torch.no_grad()
    def fit_to_tokens_(self, tokens: torch.Tensor) -> None:
        """See `Sae`: sets all thresholds to the value at which k latents per token are active.

        From any other value Adam, whose steps are at most as long as the learning rate, may need thousands of steps.
        """
        pre = self.pre_activations(tokens).flatten()
        n_active = min(len(pre), max(1, round(self.k * len(tokens))))
        self.threshold.fill_(pre.topk(n_active).values[-1].clamp_min(0))

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Unexplained share of the variance, the distance of L0 from k, and the pre-activation loss; see `Sae`."""
        pre = self.pre_activations_in(x, inputs.dtype)
        # Thresholds below 0 would let negative latents through.
        threshold = torch.relu(self.threshold)
        acts, active = _Jump.apply(pre, threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        reconstruction = (acts @ self.W_dec.to(inputs.dtype)).to(x.dtype) + self.b_dec
        mse = inputs.token_ranks.total((reconstruction - x).square().sum()) / inputs.variance
        l0 = inputs.mean(active.sum(dim=1, dtype=x.dtype))
        sparsity = inputs.weights.l0_coefficient * (l0 / self.k - 1).square()
        n_fired = active.detach().sum(dim=0, dtype=x.dtype).round().to(torch.int64)
        found = self.pre_activation_loss(x, inputs)
        pre_act = x.new_zeros(()) if found is None else found.term
        return SaeLoss(LossTerms(mse + sparsity + pre_act, mse, sparsity, pre_act), n_fired, reconstruction)

    def pre_activation_loss(self, x: torch.Tensor, inputs: LossInputs) -> "PreActivationLoss | None":
        """How far dead latents are below their thresholds on average.

        The encoder of a dead latent has no other gradient. The term is the mean over all latents of
        `relu(threshold - mean(pre))`, with 0 for those that are not dead; its gradient reaches `W_enc` and `b_enc`
        alone. It follows Anthropic's circuits updates of January 2025, whose term is of single tokens and of all
        inactive latents; this one needs no product of tokens and latents.

        Args:
            x: Tokens, shape `(N, D)`.
            inputs: What the loss depends on.

        Returns:
            None if no latents are to be revived.
        """
        weight = inputs.weights.pre_act_coefficient / len(self.b_enc)
        if inputs.dead_mask is None or not weight:
            return None
        n_all = inputs.count(x)
        share, direction = len(x) / n_all, x.sum(dim=0) / n_all
        direction = direction - share * self.b_dec.detach()
        # This rank's part of the distances, whose sum decides.
        distance = share * (torch.relu(self.threshold.detach()) - self.b_enc) - direction @ self.W_enc
        is_below = inputs.dead_mask & (inputs.token_ranks.sum(distance.detach()) > 0)
        factors = is_below.to(distance.dtype) * weight
        return PreActivationLoss(inputs.token_ranks.total((distance * factors).sum()), factors, share, direction)

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See `Sae`; a threshold below 0 acts as 0 and is exported as 0."""
        config, tensors = super().to_saelens()
        return config, {**tensors, "threshold": torch.relu(tensors["threshold"])}

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        return (self.b_enc, self.threshold)


class PreActivationLoss(NamedTuple):
    """The term that revives dead latents, and what its gradient is made of."""

    term: torch.Tensor
    """The term of the whole batch, 0-dimensional."""
    factors: torch.Tensor
    """Minus the gradient by each latent's mean pre-activation, shape `(S,)`."""
    share: float
    """Share of the batch's tokens on this rank. The gradient of `b_enc` is `-share * factors`."""
    direction: torch.Tensor
    """Sum of this rank's tokens minus `b_dec`, over the number of all. The gradient of `W_enc` is `-outer(direction,
    factors)`."""


class _Jump(torch.autograd.Function):
    """Activations and whether they are above the threshold, with the paper's pseudo-derivatives (its eq. 11, 12)."""

    @staticmethod
    def forward(ctx: Any, pre: torch.Tensor, threshold: torch.Tensor, bandwidth: float) -> tuple[torch.Tensor, ...]:  # noqa: ANN401
        """JumpReLU and the step function."""
        active = (pre > threshold).to(pre.dtype)
        ctx.save_for_backward(pre, threshold, active)
        ctx.bandwidth = bandwidth
        return pre * active, active

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        """Gradients of the pre-activations and thresholds."""
        grad_acts, grad_active = grads
        pre, threshold, active = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        kernel_sum = (grad_acts * near).sum(dim=0, dtype=threshold.dtype) * threshold
        kernel_sum = kernel_sum + (grad_active * near).sum(dim=0, dtype=threshold.dtype)
        return grad_acts * active, -kernel_sum / ctx.bandwidth, None
