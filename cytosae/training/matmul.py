"""How the matrix products of a training step are computed: their type, their memory, and when they are sparse."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatmulConfig:
    """How matrix products are computed."""

    dtype: torch.dtype = torch.float32
    """Type of the factors of dense products; sums within a product and the weights stay float32."""
    max_bytes: int = 1 << 29
    """Bytes of the largest tensor of shape (tokens, latents)."""
    sparse_below: float = 0.1
    """Share of active latents below which products use the active latents alone; 0 for never."""

    def n_tokens(self, n_latents: int) -> int:
        """Number of tokens processed together."""
        return max(1, self.max_bytes // (n_latents * self.dtype.itemsize))


def iter_parts(n_tokens: int, longest: int) -> Iterator[slice]:
    """Split tokens into as few equal slices as possible, none longer than `longest`."""
    n_parts = max(1, -(-n_tokens // longest))
    bounds = [n_tokens * number // n_parts for number in range(n_parts + 1)]
    return (slice(start, end) for start, end in itertools.pairwise(bounds))
