"""Sparse autoencoders: parameters, encoding and decoding. Architectures are made by name."""

from typing import NamedTuple

import torch
from torch import nn

ARCHITECTURES = ("relu",)
"""Names that `make_sae` knows."""


class SaeOutput(NamedTuple):
    """Everything one forward pass computes; leading dimensions are those of the input."""

    pre: torch.Tensor
    """Latents before the nonlinearity, shape `(..., S)`."""
    acts: torch.Tensor
    """Latent activations a, shape `(..., S)`, at least 0."""
    reconstruction: torch.Tensor
    """Reconstruction x^, shape `(..., D)`."""


class SparseAutoencoder(nn.Module):
    """The reference architecture (definition 4.4).

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
        generator = torch.Generator().manual_seed(seed)
        W_enc, W_dec = torch.empty(d_in, n_latents), torch.empty(n_latents, d_in)
        nn.init.kaiming_uniform_(W_enc, generator=generator)
        nn.init.kaiming_uniform_(W_dec, generator=generator)
        self.W_enc = nn.Parameter(W_enc.to(device=device, dtype=dtype))
        self.b_enc = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
        self.W_dec = nn.Parameter(W_dec.to(device=device, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, device=device, dtype=dtype))
        self.normalise_decoder_()

    def pre_activations(self, x: torch.Tensor) -> torch.Tensor:
        """Latents before the nonlinearity, shape `(..., S)`, of activations of shape `(..., D)`."""
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latent activations, shape `(..., S)`, of activations of shape `(..., D)`."""
        return torch.relu(self.pre_activations(x))

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
        acts = torch.relu(pre)
        return SaeOutput(pre, acts, self.decode(acts))

    @torch.no_grad()
    def normalise_decoder_(self) -> None:
        """Scale every row of `W_dec` to unit norm, in place."""
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(norms.clamp_min(torch.finfo(self.W_dec.dtype).tiny))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Remove from the gradient of `W_dec` what only changes a row's length, which the next step undoes.

        Rows are taken to have unit norm.

        Raises:
            RuntimeError: If there is no gradient.
        """
        if self.W_dec.grad is None:
            raise RuntimeError("W_dec has no gradient: call backward first")
        parallel = (self.W_dec.grad * self.W_dec).sum(dim=1, keepdim=True)
        self.W_dec.grad.addcmul_(parallel, self.W_dec, value=-1)


def make_sae(
    architecture: str, d_in: int, n_latents: int, *, seed: int = 42, device: torch.device | str | None = None
) -> SparseAutoencoder:
    """An untrained autoencoder of a named architecture.

    Raises:
        ValueError: If the name is unknown; the message lists those known.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, found {architecture!r}")
    return SparseAutoencoder(d_in, n_latents, seed=seed, device=device)
