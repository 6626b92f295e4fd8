"""Activations of latents that a screen lets through: those of the dense encoder, for less."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.int8_weights import LARGEST, Int8Weights
from cytosae.sae.topk import TopKSae
from cytosae.statistics.screen import Screen

_SAMPLED = 16
"""Every how manieth latent a token's bound is estimated from."""
_PASSED, _SPARE = 1.5, 3
"""Latents of the sample that are passed, in terms of those expected among the k largest, and beyond them."""
_SHARES = (1.0, 0.8)
"""Shares of the estimate that are tried as a token's bound, before all of its latents are computed."""
_MOST = 8
"""Latents above its bound that a token may have, in terms of k and a few more."""
_TINY = torch.finfo(torch.float32).tiny


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
        self._bias = sae.b_enc.detach().float()[::_SAMPLED]
        sampled = sae.W_enc.detach().float()[:, ::_SAMPLED].t()
        self._sampled = Int8Weights(sampled / self._screen.channel_scale, fast=fast)

    def encode(self, tokens: torch.Tensor) -> Iterator[LatentActs]:
        """See `ScreenedEncoder`."""
        bound, waiting = self._estimate(tokens)
        dense = torch.ones(len(tokens), dtype=torch.bool)
        dense[waiting] = False
        found = []
        for share in _SHARES:
            acts, enough = self._largest_above(tokens[waiting], share * bound)
            found.append(acts._replace(columns=waiting[acts.columns]))
            bound, waiting = bound[~enough], waiting[~enough]
        dense[waiting] = True
        yield LatentActs(0, self._with_dense(found, tokens, dense.nonzero().squeeze(1)))

    def _largest_above(self, tokens: torch.Tensor, bound: torch.Tensor) -> tuple[CooMatrix, torch.Tensor]:
        """The k largest latents of tokens of which at least k, and not too many, are above the token's bound.

        Returns:
            A row for each latent and a column for each token, in any order, and which tokens they are of, bool.
        """
        found = _join(self._screen.above(tokens, bound))
        above = (found.values > bound.squeeze(1)[found.columns]).nonzero().squeeze(1)
        by_token = found.take(above).transpose()
        kth, enough = _kth_largest(by_token, self._sae.k)
        kept = by_token.take((by_token.values >= kth[by_token.rows]).nonzero().squeeze(1))
        return CooMatrix(kept.columns, kept.rows, kept.values, found.shape), enough

    def candidate_share(self, tokens: torch.Tensor) -> float:
        """See `ScreenedEncoder`."""
        bound, screened = self._estimate(tokens)
        share = _share(self._screen.above(tokens[screened], bound))
        n_dense = len(tokens) - len(screened)
        return (share * len(screened) + n_dense) / max(len(tokens), 1)

    def _estimate(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """For every token a value that more than k latents exceed, most likely; without those that have none above 0.

        It depends on the token alone, and with it whether its latents are screened.

        Returns:
            The values, shape `(n, 1)`, and the numbers of their tokens, int64, shape `(n,)`.
        """
        scaled = tokens * self._screen.channel_scale
        step = (scaled.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min_(_TINY)
        pre = self._sampled.multiply((scaled / step).round_().to(torch.int8)).mul_(step).add_(self._bias)
        n = min(pre.shape[1], -int(-_PASSED * self._sae.k // _SAMPLED) + _SPARE)
        bound = pre.topk(n, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
        screened = ((bound > 0) & (bound < torch.inf)).squeeze(1).nonzero().squeeze(1)
        return bound[screened], screened

    def _with_dense(self, found: list[CooMatrix], tokens: torch.Tensor, dense: torch.Tensor) -> CooMatrix:
        """Entries of different tokens, and those of the tokens `dense` from all latents."""
        sae = self._sae
        if len(dense):
            pre = torch.addmm(sae.b_enc.detach().float(), tokens[dense], sae.W_enc.detach().float())
            more = CooMatrix.from_dense(sae.activate(pre))
            found = [*found, CooMatrix(more.columns, dense[more.rows], more.values, found[0].shape)]
        rows, columns, values = (torch.cat([getattr(part, name) for part in found]) for name in CooMatrix._fields[:3])
        return CooMatrix(rows, columns, values, (len(sae.b_enc), len(tokens))).sort()


def _kth_largest(entries: CooMatrix, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th largest value of every row, infinite where a row has fewer or very many, and where it is not: `(N,)`."""
    lengths = entries.row_lengths()
    width = _MOST * (k + _SAMPLED)
    enough = (lengths >= k) & (lengths <= width)
    slots = torch.arange(len(entries.rows)) - (lengths.cumsum(0) - lengths)[entries.rows]
    values = entries.values.new_full((len(lengths), width), -torch.inf)
    kept = (slots < width).nonzero().squeeze(1)
    values[entries.rows[kept], slots[kept]] = entries.values[kept]
    kth = values.topk(k, dim=1, sorted=False).values.amin(dim=1)
    return kth.masked_fill_(~enough, torch.inf), enough


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
