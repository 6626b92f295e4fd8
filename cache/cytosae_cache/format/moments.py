"""Exact sums of activations: adding the shards gives the mean and variance of the whole store."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Moments:
    """Exact sums over valid tokens, per shard; adding them gives the whole store."""

    count: npt.NDArray[np.int64]
    """Tokens per shard, shape `(n_shards,)`."""
    sum: npt.NDArray[np.float64]
    """Sum per channel, shape `(n_shards, d_model)`."""
    sum_sq: npt.NDArray[np.float64]
    """Sum of squares per channel, shape `(n_shards, d_model)`."""


Widen = Callable[[npt.NDArray[np.float64], npt.NDArray[Any]], None]
"""Converts the numbers of its second argument exactly to float64, into its first."""


def widen(out: npt.NDArray[np.float64], values: npt.NDArray[Any]) -> None:
    """The plain conversion, by numpy."""
    out[...] = values


def image_sums(
    image: npt.NDArray[Any], wide: npt.NDArray[np.float64], widen: Widen = widen
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums per channel over one image's tokens.

    Args:
        image: Activations, shape `(n_tokens, d_model)`.
        wide: Scratch memory of the same shape, float64; reused from image to image.
        widen: Conversion to float64.

    Returns:
        Sum and sum of squares, float64, shape `(d_model,)` each. Squares of finite float32 numbers never overflow
        float64, so the second is finite if and only if all numbers are.
    """
    widen(wide, image)
    return wide.sum(axis=0), np.einsum("td,td->d", wide, wide)
