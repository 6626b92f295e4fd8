"""Masks of which few elements are set."""

import torch

from cytosae.sae.devices import runs_ahead

WORD_BYTES = 8
"""Bytes of a mask that are looked at together."""


def find_set(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the elements that are not 0, ascending, int64; fast on a CPU if they are few.

    Args:
        mask: Flat, contiguous, whole words of `WORD_BYTES` bytes, of any type in which 0 alone is all bits 0.
    """
    # CPU-GPU sync point: the number of elements decides a shape.
    if runs_ahead(mask.device):
        return mask.nonzero().squeeze(1)
    length = WORD_BYTES // mask.itemsize
    words = mask.view(torch.int64).nonzero().squeeze(1)
    inside = mask.view(-1, length).index_select(0, words).flatten().nonzero().squeeze(1)
    return words.index_select(0, inside // length).mul_(length).add_(inside % length)
