"""Weights of 8 bits, and which elements of their product with tokens of 8 bits lie above 0.

Products of 8 bits are several times as fast as those of float32 on processors that have instructions for them. They
are computed by oneDNN, through operators that torch has for quantised networks.
"""

import functools

import torch

LARGEST = 127
"""Largest magnitude of a rounded number; symmetric about 0."""

_ZERO = 128
"""Stands for 0 in tokens: oneDNN's fast products want one factor without a sign."""
_TOKENS = 256
"""Tokens of a product that weights are laid out for; products of other sizes work, too."""

_OUTPUT_SCALE = 1e-12
"""What an element's excess over 0 is divided by before it becomes an integer from 0 to 255."""


class Int8Weights:
    """Weights of some latents, each rounded to 255 steps of its own.

    Args:
        weights: A row for each latent, float32, shape `(S, D)`.
        fast: Whether products are computed by oneDNN; else by float32 products of the same integers.
    """

    def __init__(self, weights: torch.Tensor, *, fast: bool) -> None:
        self.scale = (weights.abs().amax(dim=1) / LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        """Width of a latent's steps, shape `(S,)`."""
        rounded = (weights / self.scale[:, None]).round_()
        self.residual_norm = torch.linalg.vector_norm(weights - rounded * self.scale[:, None], dim=1)
        """Norm of what rounding took from each latent's weights, shape `(S,)`."""
        self._fast = fast
        self._zeros = torch.zeros(len(weights), dtype=torch.int64)
        self._packed = (
            torch.ops.onednn.qlinear_prepack(rounded.to(torch.int8), [_TOKENS, weights.shape[1]])
            if fast
            else rounded.t()
        )

    def above_zero(self, tokens: torch.Tensor, scale: float, bias: torch.Tensor) -> torch.Tensor:
        """Where `scale * tokens @ rounded weights.T + bias` is above 0; an excess below 1e-12 may be missed.

        Args:
            tokens: Rounded tokens divided by `scale`, int8, shape `(N, D)`.
            scale: Width of their steps.
            bias: Added to each latent's products, float32, shape `(S,)`.

        Returns:
            0 where it is not, and another number where it is: uint8, shape `(N, S)`.
        """
        if not self._fast:
            return (self.multiply(tokens).mul_(scale).add_(bias) > 0).to(torch.uint8)
        return self._compute(tokens, scale, bias, _OUTPUT_SCALE, torch.uint8, "relu")

    def multiply(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens @ rounded weights.T`, float32, shape `(N, S)`, of int8 tokens, shape `(N, D)`.

        oneDNN's sums of whole numbers are exact: a token's products do not depend on which others there are.
        """
        if not self._fast:
            return torch.mm(tokens.float(), self._packed).mul_(self.scale)
        return self._compute(tokens, 1.0, None, 1.0, torch.float32, "none")

    def _compute(
        self, tokens: torch.Tensor, scale: float, bias: torch.Tensor | None, step: float, dtype: torch.dtype, then: str
    ) -> torch.Tensor:
        """The product by oneDNN, in steps of the result's type, after the operation `then`."""
        unsigned = tokens.view(torch.uint8) ^ _ZERO  # the bits of tokens + 128
        found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, scale, _ZERO, self._packed, self.scale, self._zeros, bias, step, 0, dtype, then, [], ""
        )
        return found


@functools.cache
def has_int8_products() -> bool:
    """Whether this torch and this processor multiply 8-bit numbers exactly, found by a small product.

    Processors without instructions for it add pairs of products in 16 bits, which overflow.
    """
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (32, 64), generator=generator) * 2 - 1
    rows = (signs * LARGEST)[:, torch.arange(256) % 64]
    rows[:16] = torch.randint(-LARGEST, LARGEST + 1, (16, 256), generator=generator)
    rows[31] = LARGEST
    products = rows @ rows.t()
    try:
        weights = Int8Weights(rows.float(), fast=True)
        for limit in (products.float().median(), products.float().amax() - 1, products.float().amin() + 1):
            found = weights.above_zero(rows.to(torch.int8), 1.0, (0.5 - limit.expand(len(rows))).contiguous())
            if not torch.equal(found > 0, products + 0.5 > limit):
                return False
        fast, plain = (one.multiply(rows.to(torch.int8)) for one in (weights, Int8Weights(rows.float(), fast=False)))
        if not torch.allclose(fast, plain, rtol=1e-6):
            return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True
