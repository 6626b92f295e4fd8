"""Top-k with a defined order of equal values: the smaller index comes first.

`torch.topk` does not specify which of several equal values it returns. Here a non-negative float32 and its index are
packed into one int64 key. The bits of a non-negative float grow with its value, so the largest keys are the largest
values, ties go to the smaller index, and all keys differ.
"""

from typing import NamedTuple

import torch

_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1


class TopK(NamedTuple):
    """Values in descending order, and where they are."""

    values: torch.Tensor
    """Float32, shape `(..., k)`."""
    indices: torch.Tensor
    """Int64, shape `(..., k)`."""


def pack_keys(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Int64 keys that sort by value and, among equal values, by descending index.

    Args:
        values: Float32, at least 0.
        indices: Int64, from 0 to 2**32 - 1, broadcastable to the values.

    Returns:
        Same shape as the values. No key is 0, except that of a value of 0 with index 2**32 - 1.
    """
    keys = values.contiguous().view(torch.int32).to(torch.int64)
    return keys.bitwise_left_shift_(_INDEX_BITS).bitwise_or_(_INDEX_MASK - indices)


def unpack_keys(keys: torch.Tensor) -> TopK:
    """Values and indices of `pack_keys`."""
    values = (keys >> _INDEX_BITS).to(torch.int32).view(torch.float32)
    return TopK(values, _INDEX_MASK - (keys & _INDEX_MASK))


def topk_with_ties(values: torch.Tensor, k: int) -> TopK:
    """The k largest values of every row; ties go to the smaller column, except among zeros, whose order is arbitrary.

    Args:
        values: Float32, at least 0, shape `(n, m)`.
        k: At most m.

    Returns:
        Tensors of shape `(n, k)`.
    """
    # One more than k shows where the k-th value has an equal that was left out. Only those rows need keys, which cost
    # twice the memory.
    largest, indices = values.topk(min(k + 1, values.shape[1]), dim=1)
    tied = (largest[:, k - 1] == largest[:, -1]) & (largest[:, -1] > 0)
    largest, indices = largest[:, :k], indices[:, :k]
    if k < values.shape[1] and bool(tied.any()):
        largest[tied], indices[tied] = _topk_by_keys(values[tied], k)
    indices, order = indices.sort(dim=1)
    largest, order = largest.gather(1, order).sort(dim=1, descending=True, stable=True)
    return TopK(largest, indices.gather(1, order))


def _topk_by_keys(values: torch.Tensor, k: int) -> TopK:
    """`topk_with_ties` by keys alone: the plain path."""
    columns = torch.arange(values.shape[1], device=values.device)
    return unpack_keys(pack_keys(values, columns).topk(k, dim=1).values)
