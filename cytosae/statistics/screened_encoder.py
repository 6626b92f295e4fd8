"""Activations of latents that a screen lets through: those of the dense encoder, for less."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.topk import TopKSae
from cytosae.statistics.screen import Screen

_SAMPLED = 16
"""Every how manieth latent a token's bound is estimated from."""
_PASSED, _SPARE = 1.5, 3
"""Latents of the sample that are passed, in terms of those expected among the k largest, and beyond them."""


class LatentActs(NamedTuple):
    """Non-zero activations of consecutive latents."""

    first: int
    """The first of the latents."""
    acts: CooMatrix
    """A row for each latent and a column for each token, float32."""


class ScreenedEncoder(ABC):
    """Computes activations from the entries that a screen lets through."""

    @abstractmethod
    def encode(self, tokens: torch.Tensor) -> Iterator[LatentActs]:
        """Activations of tokens minus `b_dec`, float32, shape `(N, D)`: all latents in order, some at a time."""

    @abstractmethod
    def candidate_share(self, tokens: torch.Tensor) -> float:
        """Share of the encoder's product that is computed exactly, of tokens minus `b_dec`."""


def make_screened_encoder(sae: Sae, *, fast: bool = True) -> ScreenedEncoder | None:
    """The encoder that suits an architecture; None if it cannot be screened.

    Args:
        sae: An autoencoder on the CPU.
        fast: Whether oneDNN multiplies.
    """
    if (bound := sae.inactive_below) is not None:
        return ThresholdEncoder(sae, bound, fast=fast)
    return LargestEncoder(sae, fast=fast) if type(sae) is TopKSae else None


class ThresholdEncoder(ScreenedEncoder):
    """For architectures whose latents are active above a bound of their own.

    Args:
        sae: The autoencoder.
        bound: Its `inactive_below`.
        fast: Whether oneDNN multiplies.
    """

    def __init__(self, sae: Sae, bound: torch.Tensor, *, fast: bool) -> None:
        self._sae, self._screen = sae, Screen(sae, fast=fast)
        self._bound = bound.float().expand(len(sae.b_enc))

    def encode(self, tokens: torch.Tensor) -> Iterator[LatentActs]:
        """See `ScreenedEncoder`."""
        first = 0
        for pre in self._screen.above(tokens, self._bound):
            acts = self._sae.activate(pre.values, pre.rows + first)
            yield LatentActs(first, pre.with_values(acts).drop_zeros())
            first += pre.shape[0]

    def candidate_share(self, tokens: torch.Tensor) -> float:
        """See `ScreenedEncoder`."""
        return _share(self._screen.above(tokens, self._bound))


class LargestEncoder(ScreenedEncoder):
    """For `topk`: a sample of latents gives every token a bound, which about 2 k latents exceed.

    Args:
        sae: The autoencoder.
        fast: Whether oneDNN multiplies.
    """

    def __init__(self, sae: TopKSae, *, fast: bool) -> None:
        self._sae, self._screen = sae, Screen(sae, fast=fast)
        self._sampled = sae.W_enc.detach().float()[:, ::_SAMPLED].contiguous()

    def encode(self, tokens: torch.Tensor) -> Iterator[LatentActs]:
        """See `ScreenedEncoder`."""
        k, n_latents = self._sae.k, len(self._sae.b_enc)
        bound = self._estimate(tokens)
        screened = (bound > 0).squeeze(1).nonzero().squeeze(1)
        bound = bound[screened]
        found = _join(self._screen.above(tokens[screened], bound))
        above = (found.values > bound.squeeze(1)[found.columns]).nonzero().squeeze(1)
        by_token = found.take(above).transpose()
        # Falling values within every token: the k-th of at least k that are above the bound is its k-th largest.
        order = by_token.values.argsort(descending=True, stable=True)
        order = order[by_token.rows[order].argsort(stable=True)]
        values = by_token.values[order]
        counts = by_token.row_lengths()
        enough = counts >= k
        smallest = values.new_full((len(screened),), torch.inf)
        smallest[enough] = values[(counts.cumsum(0) - counts)[enough] + k - 1]
        kept = by_token.take((by_token.values >= smallest[by_token.rows]).nonzero().squeeze(1))
        largest = CooMatrix(kept.columns, screened[kept.rows], kept.values, (n_latents, len(tokens)))
        again = torch.ones(len(tokens), dtype=torch.bool)
        again[screened[enough]] = False
        yield LatentActs(0, self._with_dense(largest, tokens, again.nonzero().squeeze(1)))

    def candidate_share(self, tokens: torch.Tensor) -> float:
        """See `ScreenedEncoder`."""
        bound = self._estimate(tokens)
        screened = (bound > 0).squeeze(1)
        share = _share(self._screen.above(tokens[screened], bound[screened]))
        n_dense = len(tokens) - int(screened.sum())
        return (share * int(screened.sum()) + n_dense) / max(len(tokens), 1)

    def _estimate(self, tokens: torch.Tensor) -> torch.Tensor:
        """For every token a value that more than k latents exceed, most likely, shape `(N, 1)`."""
        pre = torch.addmm(self._sae.b_enc.detach().float()[::_SAMPLED], tokens, self._sampled)
        n = min(pre.shape[1], -int(-_PASSED * self._sae.k // _SAMPLED) + _SPARE)
        return pre.topk(n, dim=1, sorted=False).values.amin(dim=1, keepdim=True)

    def _with_dense(self, found: CooMatrix, tokens: torch.Tensor, again: torch.Tensor) -> CooMatrix:
        """Entries, and those of tokens whose bound was too high, from all latents."""
        if len(again):
            sae = self._sae
            pre = torch.addmm(sae.b_enc.detach().float(), tokens[again], sae.W_enc.detach().float())
            more = CooMatrix.from_dense(sae.activate(pre))
            found = CooMatrix(
                torch.cat([found.rows, more.columns]),
                torch.cat([found.columns, again[more.rows]]),
                torch.cat([found.values, more.values]),
                found.shape,
            )
        return found.sort()


def _join(parts: list[CooMatrix]) -> CooMatrix:
    """Matrices below each other as one."""
    firsts, n_rows = [], 0
    for part in parts:
        firsts.append(n_rows)
        n_rows += part.shape[0]
    rows = torch.cat([part.rows + first for part, first in zip(parts, firsts, strict=True)])
    columns, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("columns", "values"))
    return CooMatrix(rows, columns, values, (n_rows, parts[0].shape[1]))


def _share(parts: list[CooMatrix]) -> float:
    """Share of entries that there are."""
    n_all = sum(part.shape[0] * part.shape[1] for part in parts)
    return sum(len(part.rows) for part in parts) / max(n_all, 1)
