"""Which entries of the encoder's product can exceed a bound, from products of 8 bits and a bound of their error.

With tokens x and weights w, rounded to x^ and w^, `|x . w - x^ . w^| <= |x - x^| |w| + |x^| |w - w^|` by the
inequality of Cauchy and Schwarz. An entry whose rounded product stays below its bound by more than that is not above
it. Of the others, the exact product is computed.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.int8_weights import LARGEST, Int8Weights
from cytosae.sae.masks import WORD_BYTES, find_set

LATENTS_AT_ONCE = 4096
"""Latents whose candidates are computed together."""

_GROUP_TOKENS = 256
"""Tokens that are rounded with the same steps: neighbours in the order of their largest channel."""
_ROUNDING = 1e-4
"""Share of the product of norms that covers the float32 rounding of sums of up to 1,600 channels."""
_BIAS_ROUNDING = 1e-6
_TINY = torch.finfo(torch.float32).tiny


class Screen:
    """The encoder of an autoencoder on the CPU, with its weights in 8 bits beside the exact ones.

    Args:
        sae: The autoencoder.
        fast: Whether oneDNN multiplies (see `Int8Weights`).
    """

    def __init__(self, sae: Sae, *, fast: bool) -> None:
        weights = sae.W_enc.detach().float().t()
        self._bias = sae.b_enc.detach().float()
        # A few channels are much larger than others in many encoders, and their weights as much smaller: measured in
        # units of the weights, no channel sets the steps of all.
        squares = weights.new_zeros(weights.shape[1])
        for part in torch.split(weights, LATENTS_AT_ONCE):
            squares += part.square().sum(dim=0)
        self.channel_scale = (squares / len(weights)).sqrt_().clamp_min_(_TINY)
        """Root mean square of every channel's weights, by which they are divided, shape `(D,)`."""
        self._chunks = []
        for start in range(0, len(weights), LATENTS_AT_ONCE):
            exact = weights[start : start + LATENTS_AT_ONCE].contiguous()
            scaled = exact / self.channel_scale
            norms = torch.linalg.vector_norm(scaled, dim=1)
            latents = slice(start, start + len(exact))
            self._chunks.append(_Chunk(latents, exact, Int8Weights(scaled, fast=fast), norms))

    def above(self, tokens: torch.Tensor, bound: torch.Tensor) -> list[CooMatrix]:
        """Exact entries of `tokens @ W_enc + b_enc` among which are all that are above a bound.

        An entry is the same float32 sum whichever others are computed beside it.

        Args:
            tokens: Tokens minus `b_dec`, float32, shape `(N, D)`.
            bound: For every latent, shape `(S,)`, or above 0 for every token, shape `(N, 1)`.

        Returns:
            Ranges of `LATENTS_AT_ONCE` latents, in order: a row for each latent and a column for each token.
        """
        if not len(tokens):
            empty = torch.empty(0, dtype=torch.int64)
            return [CooMatrix(empty, empty, tokens.new_empty(0), (len(chunk.exact), 0)) for chunk in self._chunks]
        by_token = bound.ndim == 2
        # A bound of every token becomes 1 if the token is divided by it.
        scaled = (tokens / bound if by_token else tokens) * self.channel_scale
        groups = [self._round(scaled, members, bound if by_token else None) for members in _group(scaled)]
        found = []
        for latents, exact, rounded, norms in self._chunks:
            bias = self._bias[latents]
            margins = [
                group.margin(bias, bound if by_token else bound[latents], norms, rounded.residual_norm)
                for group in groups
            ]
            candidates = _find(groups, margins, rounded, len(tokens))
            values = candidates.sampled_matmul(exact, tokens).add_(bias[candidates.rows])
            found.append(candidates.with_values(values))
        return found

    def _round(self, scaled: torch.Tensor, members: torch.Tensor, bound: torch.Tensor | None) -> "_Group":
        tokens = scaled[members]
        step = max(float(tokens.abs().amax()) / LARGEST, _TINY)
        rounded = (tokens / step).round_()
        residual = torch.linalg.vector_norm(tokens - rounded * step, dim=1).amax()
        norm = torch.linalg.vector_norm(tokens, dim=1).amax()
        bounds = None if bound is None else bound[members].aminmax()
        return _Group(members, rounded.to(torch.int8), step, residual + _ROUNDING * norm, norm + residual, bounds)


class _Chunk(NamedTuple):
    """Weights of some latents."""

    latents: slice
    exact: torch.Tensor
    """Float32, shape `(n, D)`."""
    rounded: Int8Weights
    """In units of the channels' scale."""
    norms: torch.Tensor
    """Norms of what was rounded, shape `(n,)`."""


class _Group(NamedTuple):
    """Tokens that are rounded with the same steps."""

    members: torch.Tensor
    """Their numbers, int64, shape `(n,)`."""
    tokens: torch.Tensor
    """The rounded tokens in steps, int8, shape `(n, D)`."""
    step: float
    """Width of a step."""
    residual: torch.Tensor
    """Largest norm of what rounding took from a token, 0-dimensional."""
    norm: torch.Tensor
    """Largest norm of a token, rounded or not."""
    bounds: tuple[torch.Tensor, torch.Tensor] | None
    """Smallest and largest bound of a token; None for bounds of latents."""

    def margin(
        self, bias: torch.Tensor, bound: torch.Tensor, norms: torch.Tensor, residual_norms: torch.Tensor
    ) -> torch.Tensor:
        """For each of some latents, what makes the sum with a rounded product positive where the exact one is."""
        if self.bounds is not None:
            low, high = self.bounds
            bias, bound = torch.maximum(bias / low, bias / high), bias.new_ones(())
        error = self.residual * norms + self.norm * residual_norms
        return bias - bound + error + _BIAS_ROUNDING * (bias.abs() + bound.abs() + 1)


def _group(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Numbers of tokens of similar size, a tensor for each group."""
    return torch.split(tokens.abs().amax(dim=1).argsort(stable=True), _GROUP_TOKENS)


def _find(groups: list[_Group], margins: list[torch.Tensor], weights: Int8Weights, n_tokens: int) -> CooMatrix:
    """Entries that may be above their bound, by latent and token; their values are 0."""
    rows, columns = [], []
    for group, margin in zip(groups, margins, strict=True):
        if math.isfinite(group.step):
            mask = weights.above_zero(group.tokens, group.step, margin).flatten()
        else:  # nothing is known of NaN and infinity
            mask = torch.ones(len(group.members) * len(margin), dtype=torch.uint8)
        at = find_set(F.pad(mask, (0, -len(mask) % WORD_BYTES)) if len(mask) % WORD_BYTES else mask)
        rows.append(at % len(margin))
        columns.append(group.members[at // len(margin)])
    row, column = torch.cat(rows), torch.cat(columns)
    return CooMatrix(row, column, torch.zeros(len(row)), (len(margins[0]), n_tokens)).sort()
