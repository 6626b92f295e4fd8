"""JumpReLU: a latent is silent below a threshold of its own, which is learned."""

from typing import Any, ClassVar

import torch
from torch import nn

from cytosae.sae.base import LossInputs, LossTerms, Sae, SaeLoss

_START = 0.1
_BANDWIDTH = 1.0


class JumpReluSae(Sae):
    """`a = pre` where `pre > threshold`, else 0 (Rajamanoharan et al. 2024, arXiv:2407.14435).

    The thresholds are learned through straight-through estimators with a rectangle kernel of width `bandwidth`. L0 is
    held at k by the loss `(L0 / k - 1)^2` (the same paper's section 4.3 trains to a given L0).

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        k: Active latents a token that training aims at.
        bandwidth: Width of the kernel, in units of the activations.
        **more: As for `Sae`.

    Raises:
        ValueError: If `k` or `bandwidth` is not above 0.
    """

    architecture: ClassVar[str] = "jumprelu"

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
        if not (k > 0 and bandwidth > 0):
            raise ValueError(f"k and bandwidth must be above 0, found {k} and {bandwidth}")
        self.k, self.bandwidth = k, bandwidth
        self.threshold = nn.Parameter(torch.full_like(self.b_enc, _START))

    @property
    def settings(self) -> dict[str, Any]:
        """See `Sae`."""
        return {"k": self.k, "bandwidth": self.bandwidth}

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        return torch.relu(pre) * (pre > self.threshold[latents].to(pre.dtype))

    @torch.no_grad()
    def start_from_(self, tokens: torch.Tensor) -> None:
        """Start every threshold where k latents a token are active, in place.

        From anywhere else Adam, whose steps are at most the learning rate long, may take thousands of steps.
        """
        pre = self.pre_activations(tokens).flatten()
        n_active = min(len(pre), max(1, round(self.k * len(tokens))))
        self.threshold.fill_(pre.topk(n_active).values[-1].clamp_min(0))

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Share of the variance left, and the distance from the L0 asked for; see `Sae`."""
        pre = self.pre_activations_in(x, inputs.dtype)
        # Thresholds below 0 would let negative latents through.
        threshold = torch.relu(self.threshold)
        acts, active = _Jump.apply(pre, threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        reconstruction = (acts @ self.W_dec.to(inputs.dtype)).to(x.dtype) + self.b_dec
        mse = (reconstruction - x).square().sum() / inputs.variance
        l0 = active.sum(dim=1, dtype=x.dtype).mean()
        sparsity = inputs.weights.l0 * inputs.share * (l0 / self.k - 1).square()
        n_fired = active.detach().sum(dim=0, dtype=x.dtype).round().to(torch.int64)
        return SaeLoss(LossTerms(mse + sparsity, mse, sparsity, x.new_zeros(())), n_fired, reconstruction)

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        return (self.b_enc, self.threshold)


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
        of_acts, of_active = grads
        pre, threshold, active = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype)
        pull = (of_acts * near).sum(dim=0, dtype=threshold.dtype) * threshold
        pull = pull + (of_active * near).sum(dim=0, dtype=threshold.dtype)
        return of_acts * active, -pull / ctx.bandwidth, None
