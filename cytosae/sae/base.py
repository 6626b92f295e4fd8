"""The sparse autoencoder of the reference, and what every architecture derived from it has in common."""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

_ROWS_AT_ONCE = 2048
"""Rows of `W_dec` that one pass over them takes at once: they stay in the processor's cache."""


class SaeOutput(NamedTuple):
    """Everything one forward pass computes; leading dimensions are those of the input."""

    pre: torch.Tensor
    """Latents before the nonlinearity, shape `(..., S)`."""
    acts: torch.Tensor
    """Latent activations a, shape `(..., S)`, at least 0."""
    reconstruction: torch.Tensor
    """Reconstruction x^, shape `(..., D)`."""


class LossTerms(NamedTuple):
    """The loss and its parts, 0-dimensional."""

    loss: torch.Tensor
    """Sum of the others."""
    mse: torch.Tensor
    """Reconstruction: squared error over the token's norm (`relu`), or the share of the variance left."""
    l1: torch.Tensor
    """Sparsity term, coefficient included: L1, or what the architecture has in its place."""
    ghost: torch.Tensor
    """Term that revives latents, coefficient included: ghost gradients, AuxK, or the gate's own error."""


class LossWeights(NamedTuple):
    """Weights of the training losses' terms."""

    l1: float = 0.0
    """Of the sum of activations a token (`relu`, `gated`)."""
    aux: float = 1 / 32
    """Of AuxK (`topk`, `batchtopk`, `matryoshka`)."""
    l0: float = 1.0
    """Of the squared relative distance between L0 and the one asked for (`jumprelu`)."""


class LossInputs(NamedTuple):
    """What a training loss of some tokens depends on beside them."""

    variance: torch.Tensor
    """Sum of `||x - mean||^2` over the whole batch, 0-dimensional."""
    share: float
    """Share of the batch's tokens that these are."""
    dead_mask: torch.Tensor | None
    """Latents to revive, bool, shape `(S,)`; None for none."""
    weights: LossWeights
    """Weights of the terms."""
    dtype: torch.dtype
    """Type of dense products."""


class SaeLoss(NamedTuple):
    """A training loss and what it was computed from."""

    terms: LossTerms
    """The loss with its parts."""
    n_fired: torch.Tensor
    """Tokens on which each latent is active, int64, shape `(S,)`."""
    reconstruction: torch.Tensor
    """Reconstruction, of the activations' shape."""


class Sae(nn.Module):
    """The reference architecture (docs/definitions.md, section 4).

    `a = relu((x - b_dec) W_enc + b_enc)`, `x^ = a W_dec + b_dec`. Weights start Kaiming-uniform (He et al. 2015), the
    decoder's rows with unit norm, biases at zero. They are drawn on the CPU from the seed alone, so every device starts
    from the same numbers and no global random state is touched.

    Args:
        d_in: Width D of the activations.
        n_latents: Latents S.
        seed: Seed of the weights.
        device: Where the parameters live.
        dtype: Type of the parameters.

    Raises:
        ValueError: If `d_in` or `n_latents` is below 1.
    """

    architecture: ClassVar[str] = "relu"
    """Name, as options and files spell it."""
    needs_whole_rows: ClassVar[bool] = False
    """Whether a latent's activation depends on the other latents' of the same token."""

    def __init__(
        self,
        d_in: int,
        n_latents: int,
        *,
        seed: int = 42,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if d_in < 1 or n_latents < 1:
            raise ValueError(f"d_in and n_latents must be 1 or more, found {d_in} and {n_latents}")
        where = "meta" if device is not None and torch.device(device).type == "meta" else "cpu"
        W_enc, W_dec = torch.empty(d_in, n_latents, device=where), torch.empty(n_latents, d_in, device=where)
        if where == "cpu":
            generator = torch.Generator().manual_seed(seed)
            nn.init.kaiming_uniform_(W_enc, generator=generator)
            nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc = nn.Parameter(W_enc.to(device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(W_dec.to(device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype))
        self.normalise_decoder_()

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments beside the sizes that make the same architecture again: JSON values."""
        return {}

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Latents before the nonlinearity, shape `(..., S)`, of activations of shape `(..., D)`."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: torch.Tensor, latents: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Latent activations from latents before the nonlinearity, as they are read once training is over.

        Args:
            pre: Shape `(..., n)`.
            latents: Which latents these are, as a slice or their numbers; all by default, and all are needed if
                `needs_whole_rows`.
        """
        return torch.relu(pre)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latent activations, shape `(..., S)`, of activations of shape `(..., D)`."""
        return self.activate(self.pre_activations(x))

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """Reconstruction, shape `(..., D)`, of latent activations of shape `(..., S)`.

        Raises:
            RuntimeError: If only the encoder was loaded.
        """
        if not len(self.W_dec):
            raise RuntimeError("this autoencoder has no decoder: it was loaded with encoder_only=True")
        return acts @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> SaeOutput:
        """Encode and decode activations of shape `(..., D)`."""
        pre = self.pre_activations(x)
        acts = self.activate(pre)
        return SaeOutput(pre, acts, self.decode(acts))

    def training_loss(self, x: torch.Tensor, inputs: LossInputs) -> SaeLoss:
        """The loss of other architectures than the reference's, whose own is `objective.reference_loss`.

        Args:
            x: Tokens of a batch, or of a part of it, shape `(N, D)`; losses of parts add up.
            inputs: What else it depends on.

        Raises:
            NotImplementedError: For the reference's architecture.
        """
        raise NotImplementedError("the reference's loss is objective.reference_loss")

    def pre_activations_in(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """`pre_activations` of tokens of shape `(N, D)` by a product in a type, for training.

        The gradient of `b_dec` needs only a column sum, which comes through a term that is 0: autograd would compute
        a whole matrix for it.
        """
        centred = (x - self.b_dec.detach()).to(dtype)
        bias = self.b_enc + (self.b_dec.detach() - self.b_dec) @ self.W_enc.detach()
        return torch.addmm(bias.to(dtype), centred, self.W_enc.to(dtype))

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scale every row of `W_dec` to unit norm, in place."""
        for rows in torch.split(self.W_dec, _ROWS_AT_ONCE):
            rows.div_(rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Remove from the gradient of `W_dec` what only changes a row's length, which the next step undoes.

        Rows are taken to have unit norm.

        Raises:
            RuntimeError: If there is no gradient.
        """
        if self.W_dec.grad is None:
            raise RuntimeError("W_dec has no gradient: call backward first")
        grads = torch.split(self.W_dec.grad, _ROWS_AT_ONCE)
        for grad, rows in zip(grads, torch.split(self.W_dec, _ROWS_AT_ONCE), strict=True):
            grad.addcmul_((grad * rows).sum(dim=1, keepdim=True), rows, value=-1)

    @torch.no_grad()
    def tie_(self) -> None:
        """Start the encoder as the decoder's transpose, in place (Gao et al. 2024, arXiv:2406.04093)."""
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def rescale_latents_(self, factor: torch.Tensor) -> None:
        """Multiply every latent's activation by a positive factor and divide its decoder row by it, in place.

        Args:
            factor: Shape `(S,)` or 0-dimensional; one factor for all latents if `needs_whole_rows`.
        """
        self.W_enc.mul_(factor)
        self.W_dec.div_(factor[..., None] if factor.ndim else factor)
        for bias in self._latent_units():
            bias.mul_(factor)

    @torch.no_grad()
    def fold_scaling_(self, mean: torch.Tensor, scale: float) -> None:
        """Make an autoencoder of `(x - mean) / scale` one of `x`, in place; decoder rows keep their norm.

        Args:
            mean: Shape `(D,)`.
            scale: Positive.
        """
        self.b_dec.mul_(scale).add_(mean)
        for bias in self._latent_units():
            bias.mul_(scale)

    def _latent_units(self) -> tuple[torch.Tensor, ...]:
        """Parameters and buffers measured in the unit of activations, shape `(S,)` or 0-dimensional."""
        return (self.b_enc,)
