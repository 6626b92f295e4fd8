"""Gradients that are computed when the optimiser asks for them, one block of rows at a time."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.world import World

ROWS_PER_BLOCK = 1024
"""Latents whose weights, gradients and moments are updated together on a CPU: they stay in the processor's cache."""

ROWS_PER_BLOCK_GPU = 32_768
"""The same on a GPU, where every block costs launches and CPU-GPU sync points: few blocks."""

MATRICES = ("W_enc", "W_dec")
"""Names of the parameters with a row for each latent and a column for each channel, or the other way round."""


class RowGradient(NamedTuple):
    """The gradient of some latents' weights."""

    name: str
    """`W_enc` or `W_dec`."""
    latents: slice
    """Which latents."""
    values: torch.Tensor
    """Shape `(n, D)`, a row for each latent, also of `W_enc`; in the type of the weights or of the products."""

    def widen(self, weights: torch.Tensor) -> torch.Tensor:
        """The values in the type of the weights, which may be `values` itself; the receiver may overwrite them."""
        return self.values.to(weights.dtype)


class Gradients(ABC):
    """The gradients of a step. Those of vectors are in the parameters' `grad` once `rows` is exhausted."""

    repeats_cheaply = True
    """Whether asking for the rows twice costs less than keeping them."""

    @abstractmethod
    def rows(self) -> Iterator[RowGradient]:
        """The gradients of both matrices. The weights of a block may be changed as soon as it was handed out.

        Every latent occurs once in each matrix. May be called again, if `repeats_cheaply` and no weight was changed.
        """

    @torch.no_grad()
    def store_(self, sae: Sae) -> None:
        """Keep all rows in the parameters' `grad`, as autograd does."""
        kept = {name: torch.empty_like(getattr(sae, name)) for name in MATRICES}
        for name, latents, values in self.rows():
            by_latent(name, kept[name])[latents] = values
        for name, gradient in kept.items():
            getattr(sae, name).grad = gradient


def by_latent(name: str, matrix: torch.Tensor) -> torch.Tensor:
    """A view of `W_enc` or `W_dec`, or of something of the same shape, with a row for each latent."""
    return matrix.t() if name == "W_enc" else matrix


class StoredGradients(Gradients):
    """Gradients that are in the parameters' `grad` already.

    Args:
        sae: The autoencoder.
    """

    repeats_cheaply = False
    """Rows are views, which the receiver may overwrite."""

    def __init__(self, sae: Sae) -> None:
        self._sae = sae

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`."""
        # Block by block in the order of all other gradients: ranks that computed theirs in different ways add them up.
        gradients = {name: by_latent(name, getattr(self._sae, name).grad) for name in ("W_dec", "W_enc")}
        for latents in blocks_of_latents(len(self._sae.b_enc), self._sae.b_enc.device):
            for name, gradient in gradients.items():
                yield RowGradient(name, latents, gradient[latents])

    def store_(self, sae: Sae) -> None:
        """See `Gradients`; they are there."""


class SparsePiece(NamedTuple):
    """Active entries of a range of latents, and what their gradients are made of."""

    first: int
    """First latent of the range."""
    acts: CooMatrix
    """Activations, a row for each latent of the range and a column for each token."""
    grad_pre: CooMatrix
    """Gradients before the nonlinearity, in the same shape; may have other entries."""
    g: torch.Tensor
    """Gradient of the reconstruction that these latents take part in, shape `(N, D)`."""


class SparseGradients(Gradients):
    """Gradients from active entries alone: `A.T @ g` and `P.T @ centred`, P being the gradient before the nonlinearity.

    Args:
        pieces: The entries; their ranges cover all latents in ascending order.
        centred: Tokens minus `b_dec`, shape `(N, D)`.
    """

    def __init__(self, pieces: list[SparsePiece], centred: torch.Tensor) -> None:
        self._pieces, self._centred = pieces, centred

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`."""
        for piece in self._pieces:
            blocks = list(blocks_of_latents(piece.acts.shape[0], piece.g.device))
            bounds = [0, *(here.stop for here in blocks)]
            parts = zip(blocks, piece.acts.split_rows(bounds), piece.grad_pre.split_rows(bounds), strict=True)
            for here, acts, grad_pre in parts:
                latents = slice(piece.first + here.start, piece.first + here.stop)
                yield RowGradient("W_dec", latents, acts.matmul(piece.g))
                yield RowGradient("W_enc", latents, grad_pre.matmul(self._centred))


class RowAddition(NamedTuple):
    """Further gradients of some latents, such as dead ones."""

    latents: torch.Tensor
    """Their numbers, ascending, int64, shape `(n,)`."""
    W_enc: torch.Tensor
    """Shape `(n, D)`."""
    W_dec: torch.Tensor
    """Shape `(n, D)`."""


class SumOfGradients(Gradients):
    """Gradients of all latents and further ones of some.

    Args:
        gradients: Those of all.
        addition: Further ones.
    """

    def __init__(self, gradients: Gradients, addition: RowAddition) -> None:
        self._gradients, self._addition = gradients, addition
        self.repeats_cheaply = gradients.repeats_cheaply

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`."""
        latents = self._addition.latents
        numbers = latents.cpu().numpy()  # CPU-GPU sync point, one for all blocks: they decide shapes
        for gradient in self._gradients.rows():
            first, last = map(int, np.searchsorted(numbers, [gradient.latents.start, gradient.latents.stop]))
            if first < last:
                further = getattr(self._addition, gradient.name)[first:last]
                at = latents[first:last] - gradient.latents.start
                yield gradient._replace(values=gradient.widen(further).index_add_(0, at, further))
            else:
                yield gradient
            del gradient  # it need not live while the next one is computed


class WithOuterProduct(Gradients):
    """Gradients of all latents, and a multiple of one direction for each latent's encoder weights.

    Args:
        gradients: Those of all.
        factors: The multiples, shape `(S,)`.
        direction: Shape `(D,)`.
    """

    def __init__(self, gradients: Gradients, factors: torch.Tensor, direction: torch.Tensor) -> None:
        self._gradients, self._factors, self._direction = gradients, factors, direction
        self.repeats_cheaply = gradients.repeats_cheaply

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`."""
        for gradient in self._gradients.rows():
            if gradient.name == "W_enc":
                factors, direction = (one.to(gradient.values.dtype) for one in (self._factors, self._direction))
                gradient.values.addr_(factors[gradient.latents], direction)
            yield gradient
            del gradient  # it need not live while the next one is computed


class GradientsOfRanks(Gradients):
    """Gradients summed over processes that computed them from different tokens, or from different latents.

    Args:
        sae: The autoencoder, or this rank's latents of it.
        gradients: This rank's gradients.
        token_ranks: Processes that have other tokens of the batch.
        latent_ranks: Processes that have other latents; they share the gradient of `b_dec` alone.
    """

    repeats_cheaply = False

    def __init__(self, sae: Sae, gradients: Gradients, token_ranks: World, latent_ranks: World) -> None:
        self._sae, self._gradients = sae, gradients
        self._token_ranks, self._latent_ranks = token_ranks, latent_ranks

    def rows(self) -> Iterator[RowGradient]:
        """See `Gradients`; may be asked for once."""
        for gradient in self._gradients.rows():
            yield gradient._replace(values=self._token_ranks.sum(gradient.widen(self._sae.b_dec)))
            del gradient
        vectors = [part for name, part in self._sae.named_parameters() if name not in MATRICES]
        own = [vector.grad for vector in vectors if vector.grad is not None]
        assert len(own) == len(vectors)
        summed = torch.split(self._token_ranks.sum(torch.cat(own)), [len(part) for part in own])
        for vector, values in zip(vectors, summed, strict=True):
            vector.grad = values.clone()
        assert self._sae.b_dec.grad is not None
        self._sae.b_dec.grad = self._latent_ranks.sum(self._sae.b_dec.grad)


def blocks_of_latents(n_latents: int, device: torch.device) -> Iterator[slice]:
    """Consecutive blocks that cover all latents, as large as suits the device."""
    size = ROWS_PER_BLOCK if device.type == "cpu" else ROWS_PER_BLOCK_GPU
    return (slice(start, min(start + size, n_latents)) for start in range(0, n_latents, size))
