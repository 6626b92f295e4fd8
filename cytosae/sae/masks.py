"""Masks of which few elements are set."""

import torch

from cytosae.sae.devices import runs_ahead

WORD = 8
"""Elements of a mask that are looked at together."""


def find_set(mask: torch.Tensor) -> torch.Tensor:
    """Indices of the elements that are not 0, ascending, int64; fast on a CPU if they are few.

    Args:
        mask: One byte an element, flat, whole words of `WORD` elements.
    """
    # CPU-GPU sync point: the number of elements decides a shape.
    if runs_ahead(mask.device):
        return mask.nonzero().squeeze(1)
    words = mask.view(torch.int64).nonzero().squeeze(1)
    word, byte = mask.view(-1, WORD)[words].nonzero(as_tuple=True)
    return words[word] * WORD + byte
