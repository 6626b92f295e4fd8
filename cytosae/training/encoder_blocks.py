"""The encoder's product a block of latents at a time, and the entries of it that a training step needs.

No tensor of all tokens times all latents exists: a block is screened while it is in the processor's cache.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.sae.devices import runs_ahead
from cytosae.sae.kernels import find_kernels
from cytosae.training.block_search import Entries, search_block
from cytosae.training.matmul import MatmulConfig, iter_parts

LATENTS_PER_BLOCK = 2048
"""Latents of a block on a CPU: their weights and a few thousand tokens stay in the processor's cache."""

_LARGEST = "cytosae.training.triton_topk"
"""The module of kernels that look for the largest entries of rows on a GPU."""
_FEWEST_BLOCKS = 6
"""Blocks from which a bound of every token's largest latents pays: it comes from one of them."""
_SHORTEST_PART = 64
_SAMPLED_TOKENS, _SAMPLED_LATENTS = 256, 2048
"""A sample of the whole batch that shows whether few latents are active, before all tokens are encoded."""
_SPARE = 4
"""Entries by which the k-th of a sample of latents is passed, so that a token seldom has too few candidates."""


class EncoderBlock(NamedTuple):
    """Latents before the nonlinearity, of some tokens and some latents."""

    tokens: slice
    """Which tokens."""
    latents: slice
    """Which latents: every n-th, so that any block is a fair sample."""
    pre: torch.Tensor
    """Shape `(tokens, latents)`, in the type of the products; valid until the next block is asked for."""


class EncoderProduct:
    """`(x - b_dec) W_enc + b_enc` in blocks. Which blocks depends on the sizes alone, and so does rounding.

    Args:
        sae: The autoencoder.
        centred: Tokens minus `b_dec`, shape `(N, D)`.
        matmul: Type of the product, and bytes of the largest block.
    """

    def __init__(self, sae: Sae, centred: torch.Tensor, matmul: MatmulConfig) -> None:
        self._weights, self._bias = sae.W_enc.detach().t(), sae.b_enc.detach()
        self._centred, self._matmul = centred.to(matmul.dtype), matmul
        self.n_tokens, self.n_latents = len(centred), len(self._bias)
        # The host waits for the entries of every block on a GPU: there, blocks are as large as the memory allows.
        self._n_blocks = 1 if runs_ahead(self._bias.device) else -(-self.n_latents // LATENTS_PER_BLOCK)

    def __iter__(self) -> Iterator[EncoderBlock]:
        width = -(-self.n_latents // self._n_blocks)
        parts = list(iter_parts(self.n_tokens, max(_SHORTEST_PART, self._matmul.n_tokens(width))))
        longest = max(part.stop - part.start for part in parts)
        buffer = torch.empty(longest * width, dtype=self._matmul.dtype, device=self._bias.device)
        for number in range(self._n_blocks):
            latents = slice(number, None, self._n_blocks)
            weights, bias = self._weights_of(latents)
            for tokens in parts:
                shape = tokens.stop - tokens.start, len(bias)
                pre = buffer[: shape[0] * shape[1]].view(shape)
                yield EncoderBlock(tokens, latents, torch.addmm(bias, self._centred[tokens], weights, out=pre))

    def above(self, bound: torch.Tensor) -> CooMatrix:
        """Entries above a bound, in the type of the product, in any order: `sort` them once they are few.

        Args:
            bound: One for all latents, 0-dimensional, or one for each, shape `(S,)`.
        """
        entries = self._scan(lambda block: bound[block.latents] if bound.ndim else bound)
        assert entries is not None
        return entries

    def above_if_few(self, bound: torch.Tensor, most: float) -> CooMatrix | None:
        """The same by token and latent, unless they are more than a share of a sample, of some blocks or of all."""
        if self._sample_exceeds(bound, most):
            return None
        entries = self._scan(lambda block: bound[block.latents] if bound.ndim else bound, most)
        return None if entries is None else self._sort(entries)

    def _scan(self, bound_of: Callable[[EncoderBlock], torch.Tensor], most: float = 1.0) -> CooMatrix | None:
        """Entries of every block above a bound that is found when the block is there; see `above_if_few`."""
        found: list[Entries] = []
        n_found = n_seen = 0
        for block in self:
            n_seen += block.pre.numel()
            limit = math.floor(most * n_seen) - n_found if most < 1 else None
            entries = search_block(block.pre, bound_of(block), limit)
            if entries is None:
                return None
            n_found += len(entries[0])
            found.append(self._place(block, *entries))
        rows, columns, values = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
        return CooMatrix(rows, columns, values, (self.n_tokens, self.n_latents))

    def _sample_exceeds(self, bound: torch.Tensor, most: float) -> bool:
        """Whether entries above a bound are more than a share of a sample, which is much smaller than the batch."""
        latents = slice(None, None, max(1, self.n_latents // _SAMPLED_LATENTS))
        tokens = self._centred[:: max(1, self.n_tokens // _SAMPLED_TOKENS)][:_SAMPLED_TOKENS]
        if most >= 1 or 2 * len(tokens) > self.n_tokens:
            return False
        weights, bias = self._weights_of(latents)
        pre = torch.addmm(bias, tokens, weights)
        # CPU-GPU sync point: whether to go on.
        return int((pre > (bound[latents] if bound.ndim else bound)).sum()) > most * pre.numel()

    def _sort(self, entries: CooMatrix) -> CooMatrix:
        """Found entries by token and latent."""
        # Blocks of all latents are in order: one has the tokens after those of the other.
        return entries if self._n_blocks == 1 else entries.sort()

    def largest(self, k: int) -> CooMatrix:
        """The positive ones among the k largest of every token, by token and latent; in the type of the product."""
        if self._n_blocks < _FEWEST_BLOCKS:
            values, columns = self._largest_of(None, k)
            return _positive_entries(values, columns, self.n_latents)
        # A value that about 2 k latents of a token exceed, from the first block.
        bound = self._centred.new_zeros((self.n_tokens, 1))

        def bound_of(block: EncoderBlock) -> torch.Tensor:
            if not block.latents.start:
                n = min(block.pre.shape[1], -(-2 * k // self._n_blocks) + _SPARE)
                smallest = block.pre.topk(n, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
                bound[block.tokens] = smallest.clamp_min_(0)
            return bound[block.tokens]

        found = self._scan(bound_of)
        assert found is not None
        candidates = self._sort(found)
        counts = torch.bincount(candidates.rows, minlength=self.n_tokens)
        # Every token's candidates in a row of their own; those with too few or too many are encoded again.
        width = 8 * k + 8 * _SPARE
        wrong = (counts > width) | ((counts < k) & (bound.squeeze(1) > 0))
        slots = torch.arange(len(candidates.rows), device=counts.device)
        slots -= (counts.cumsum(0) - counts)[candidates.rows]
        kept = slots < width
        values = candidates.values.new_full((self.n_tokens, width), -torch.inf)
        columns = candidates.columns.new_zeros((self.n_tokens, width))
        at = candidates.rows[kept], slots[kept]
        values[at], columns[at] = candidates.values[kept], candidates.columns[kept]
        values, chosen = values.topk(k, dim=1, sorted=False)
        columns = columns.gather(1, chosen)
        again = wrong.nonzero().squeeze(1)
        values[again], columns[again] = self._largest_of(again, k)
        columns, order = columns.sort(dim=1)
        return _positive_entries(values.gather(1, order), columns, self.n_latents)

    def _largest_of(self, tokens: torch.Tensor | None, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest values of some tokens, None for all, and their latents, from all latents at once.

        Returns:
            Shape `(n, k)` each, by latent; perhaps without values that are not positive.
        """
        centred = self._centred if tokens is None else self._centred[tokens]
        values = centred.new_empty((len(centred), k))
        columns = torch.empty((len(centred), k), dtype=torch.int64, device=centred.device)
        weights, bias = self._weights_of(slice(None))
        for part in iter_parts(len(centred), self._matmul.n_tokens(self.n_latents)) if len(centred) else ():
            values[part], columns[part] = _largest_in_rows(torch.addmm(bias, centred[part], weights), k)
        return values, columns

    def _place(self, block: EncoderBlock, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> Entries:
        """Entries of a block as entries of the whole product."""
        rows = rows + block.tokens.start if block.tokens.start else rows
        columns = columns * self._n_blocks + block.latents.start if self._n_blocks > 1 else columns
        return rows, columns, values

    def _weights_of(self, latents: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights, shape `(D, n)`, and biases of some latents, in the type of the product."""
        dtype = self._matmul.dtype
        return self._weights[latents].to(dtype).t(), self._bias[latents].to(dtype)


def _largest_in_rows(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values of every row and their columns, by column; perhaps 0 for those that are not positive."""
    kernels = find_kernels(pre, pre, _LARGEST)
    if kernels is not None and kernels.can_find(pre.shape[1], k):
        found: tuple[torch.Tensor, torch.Tensor] = kernels.find_largest(pre, k)
        return found
    values, columns = pre.topk(k, dim=1, sorted=False)
    columns, order = columns.sort(dim=1)
    return values.gather(1, order), columns


def _positive_entries(values: torch.Tensor, columns: torch.Tensor, n_latents: int) -> CooMatrix:
    """The positive entries among k values per row, shape `(N, k)`, with their columns, which ascend."""
    # CPU-GPU sync point: the number of positive ones decides a shape.
    rows, at = (values > 0).nonzero(as_tuple=True)
    return CooMatrix(rows, columns[rows, at], values[rows, at], (len(values), n_latents))
