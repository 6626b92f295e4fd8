"""Gated autoencoders: one branch decides whether a latent is active, another one how strongly."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from cytosae.sae.base import Sae, is_finite
from cytosae.sae.loss import LossInputs, LossTerms, SaeLoss

_TO_SAELENS = {"b_enc": "b_gate"}
_FROM_SAELENS = {theirs: ours for ours, theirs in _TO_SAELENS.items()}


class GatedSae(Sae):
    """`a = 1[gate > 0] relu(magnitude)` (Rajamanoharan et al. 2024, arXiv:2404.16014).

    Both share `W_enc`: `gate = (x - b_dec) W_enc + b_enc`, `magnitude = exp(r_mag) ((x - b_dec) W_enc) + b_mag`. L1
    applies to the gate alone, so that it does not shrink the activations. A reconstruction from the gate with a frozen
    decoder gives the gate its gradient (the paper's eq. 8).

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        **more: As for `Sae`.
    """

    architecture: ClassVar[str] = "gated"
    training_options: ClassVar[frozenset[str]] = frozenset({"l1_coefficient"})
    saelens_architecture: ClassVar[str | None] = "gated"

    def __init__(self, d_in: int, n_latents: int, **more: Any) -> None:  # noqa: ANN401
        super().__init__(d_in, n_latents, **more)
        self.r_mag = nn.Parameter(self.b_enc.new_zeros(self.b_enc.shape))
        self.b_mag = nn.Parameter(self.b_enc.new_zeros(self.b_enc.shape))

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """See `Sae`."""
        b_enc, r_mag, b_mag = (part[latents].to(pre.dtype) for part in (self.b_enc, self.r_mag, self.b_mag))
        return torch.relu((pre - b_enc) * r_mag.exp() + b_mag) * (pre > 0)

    @property
    def inactive_below(self) -> torch.Tensor | None:
        """See `Sae`: the gate is closed."""
        return self.b_enc.new_zeros(())

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """Unexplained share of the variance, L1 of the gate, and the error of decoding the gate; see `Sae`."""
        pre = self.pre_activations_in(x, inputs.dtype)
        acts, gate = self.activate(pre), torch.relu(pre)
        W_dec = self.W_dec.to(inputs.dtype)
        reconstruction = (acts @ W_dec).to(x.dtype) + self.b_dec
        mse = inputs.token_ranks.total((reconstruction - x).square().sum()) / inputs.variance
        l1 = inputs.weights.l1_coefficient * inputs.mean(gate.sum(dim=1, dtype=x.dtype))
        from_gate = (gate @ W_dec.detach()).to(x.dtype) + self.b_dec.detach()
        aux = inputs.token_ranks.total((from_gate - x).square().sum()) / inputs.variance
        n_fired = (acts.detach() > 0).to(x.dtype).sum(dim=0).round().to(torch.int64)
        return SaeLoss(LossTerms(mse + l1 + aux, mse, l1, aux), n_fired, reconstruction)

    @torch.no_grad()
    def non_finite(self) -> list[str]:
        """See `Sae`."""
        found = super().non_finite()
        return found if "r_mag" in found or is_finite(self.r_mag.exp()) else [*found, "exp(r_mag)"]

    def to_saelens(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """See `Sae`; SAELens has its own name for the gate's bias."""
        config, tensors = super().to_saelens()
        return config, {_TO_SAELENS.get(name, name): tensor for name, tensor in tensors.items()}

    @classmethod
    def from_saelens(cls, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """See `Sae`."""
        return {_FROM_SAELENS.get(name, name): tensor for name, tensor in tensors.items()}

    def _shift_pre_activations_(self, shift: torch.Tensor) -> None:
        super()._shift_pre_activations_(shift)
        self.b_mag.copy_(self.b_mag + self.r_mag.double().exp() * shift)

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        return (self.b_enc, self.b_mag)
