"""The encoder's product a block of latents at a time, and the entries of it that a training step needs.

No tensor of all tokens times all latents exists: a block is screened while it is in the processor's cache.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from cytosae.sae.base import Sae
from cytosae.sae.coo import CooMatrix
from cytosae.training.matmul import MatmulConfig, iter_parts

LATENTS_PER_BLOCK = 2048
"""Latents of a block on a CPU: their weights and a few thousand tokens stay in the processor's cache."""

_SHORTEST_PART = 64
_FEWEST_LATENTS_CHECKED = 2048


class EncoderBlock(NamedTuple):
    """Latents before the nonlinearity, of some tokens and some latents."""

    tokens: slice
    """Which tokens."""
    latents: slice
    """Which latents."""
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

    def __iter__(self) -> Iterator[EncoderBlock]:
        dtype, device = self._matmul.dtype, self._bias.device
        # A GPU waits for every block's entries: there, blocks are as large as the memory allows.
        width = LATENTS_PER_BLOCK if device.type == "cpu" else self.n_latents
        width = min(width, self.n_latents)
        longest = max(_SHORTEST_PART, self._matmul.n_tokens(width))
        parts = list(iter_parts(self.n_tokens, longest))
        buffer = torch.empty(max(part.stop - part.start for part in parts) * width, dtype=dtype, device=device)
        for start in range(0, self.n_latents, width):
            latents = slice(start, min(start + width, self.n_latents))
            weights, bias = self._weights[latents].to(dtype).t(), self._bias[latents].to(dtype)
            for tokens in parts:
                shape = tokens.stop - tokens.start, latents.stop - latents.start
                pre = buffer[: shape[0] * shape[1]].view(shape)
                yield EncoderBlock(tokens, latents, torch.addmm(bias, self._centred[tokens], weights, out=pre))

    def above(self, bound: torch.Tensor) -> CooMatrix:
        """Entries above a bound, in the type of the product, ordered by token and then by latent.

        Args:
            bound: One for all latents, 0-dimensional, or one for each, shape `(S,)`.
        """
        entries = self.above_if_few(bound, self.n_tokens * self.n_latents)
        assert entries is not None
        return entries

    def above_if_few(self, bound: torch.Tensor, most: int) -> CooMatrix | None:
        """The same, unless there are more than `most`, or as it seems after a part of the latents."""
        rows, columns, values = [], [], []
        n_found = 0
        for tokens, latents, pre in self:
            mask = pre > (bound[latents] if bound.ndim else bound)
            row, column = mask.nonzero(as_tuple=True)
            n_found += len(row)
            if n_found > most * self._share_done(tokens, latents):
                return None
            values.append(pre[row, column])
            rows.append(row.add_(tokens.start))
            columns.append(column.add_(latents.start))
        row, column = torch.cat(rows), torch.cat(columns)
        order = (row * self.n_latents + column).argsort()
        return CooMatrix(row[order], column[order], torch.cat(values)[order], (self.n_tokens, self.n_latents))

    def largest(self, k: int) -> CooMatrix:
        """The positive ones among the k largest of every token; in the type of the product."""
        best: torch.Tensor | None = None
        for tokens, latents, pre in self:
            values, columns = pre.topk(min(k, pre.shape[1]), dim=1, sorted=False)
            columns += latents.start
            if best is None:
                best = values.new_full((self.n_tokens, k), -torch.inf)
                at = columns.new_zeros((self.n_tokens, k))
            values, columns = torch.cat([best[tokens], values], dim=1), torch.cat([at[tokens], columns], dim=1)
            best[tokens], chosen = values.topk(k, dim=1, sorted=False)
            at[tokens] = columns.gather(1, chosen)
        assert best is not None
        return positive_entries(best, at, self.n_latents)

    def _share_done(self, tokens: slice, latents: slice) -> float:
        """The share of all entries up to a block, at least that of the latents after which it is believed."""
        done: int = latents.start * self.n_tokens + tokens.stop * (latents.stop - latents.start)
        return min(1.0, max(done, _FEWEST_LATENTS_CHECKED * self.n_tokens) / (self.n_tokens * self.n_latents))


def positive_entries(values: torch.Tensor, columns: torch.Tensor, n_latents: int) -> CooMatrix:
    """The positive entries among k values per row, shape `(N, k)`, with their columns."""
    columns, order = columns.sort(dim=1)
    values = values.gather(1, order)
    rows, at = (values > 0).nonzero(as_tuple=True)
    return CooMatrix(rows, columns[rows, at], values[rows, at], (len(values), n_latents))
