"""Exact sums of activations: adding up shards gives mean and variance of the whole store."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Moments:
    """Exact sums over valid tokens; adding the shards up gives the whole store."""

    count: npt.NDArray[np.int64]
    """Tokens a shard, shape `(n_shards,)`."""
    sum: npt.NDArray[np.float64]
    """Sum a channel, shape `(n_shards, d_model)`."""
    sum_sq: npt.NDArray[np.float64]
    """Sum of squares a channel, shape `(n_shards, d_model)`."""


Widen = Callable[[npt.NDArray[np.float64], npt.NDArray[Any]], None]
"""Converts the numbers of its second argument to float64, exactly, into its first."""


def widen(out: npt.NDArray[np.float64], values: npt.NDArray[Any]) -> None:
    """The plain conversion: numpy's."""
    out[...] = values


def image_sums(
    image: npt.NDArray[Any], wide: npt.NDArray[np.float64], widen: Widen = widen
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Sums of one image's tokens a channel.

    Args:
        image: Activations, shape `(n_tokens, d_model)`.
        wide: Memory for them as float64, of the same shape; reused from image to image.
        widen: How to convert them.

    Returns:
        Sum and sum of squares, float64, shape `(d_model,)` each. Squares of finite float32 numbers never overflow
        float64, so the second is finite just when all numbers are.
    """
    widen(wide, image)
    return wide.sum(axis=0), np.einsum("td,td->d", wide, wide)
