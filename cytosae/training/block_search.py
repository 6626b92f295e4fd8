"""The search for the few entries of a block of the encoder's product that are above a bound."""

import torch

from cytosae.sae.devices import runs_ahead
from cytosae.sae.kernels import find_kernels
from cytosae.sae.masks import WORD_BYTES, find_set

Entries = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Rows and columns within a block, int64, and values, row by row."""

_BYTES_AT_ONCE = 1 << 21
"""Bytes of a block that are compared together on a CPU: they and what is made of them stay in the processor's cache."""
_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""Types whose bits, read as integers, compare with a bound of at least 0 like the numbers, and faster."""


def search_block(pre: torch.Tensor, bound: torch.Tensor, most: int | None = None) -> Entries | None:
    """Entries of a block that are above a bound.

    Args:
        pre: The block, contiguous, shape `(n, m)`.
        bound: In the block's type: one for all entries, 0-dimensional, one for each latent, shape `(m,)`, or one for
            each token, shape `(n, 1)`.
        most: Number of entries above which there is no result; None for any number.
    """
    kernels = find_kernels(pre, pre)
    if kernels is not None:
        ends = kernels.count_above(pre, bound)
        # CPU-GPU sync point: the number of entries decides a shape, and whether to go on.
        n_found = int(ends[-1])
        return None if most is not None and n_found > most else kernels.take_above(pre, bound, ends, n_found)
    if runs_ahead(pre.device):
        mask = (pre > bound).flatten()
        # CPU-GPU sync point: whether to go on.
        return None if most is not None and int(mask.count_nonzero()) > most else _take(pre, find_set(mask))
    bound = bound + 0.0  # no negative zero, whose bits are smaller than those of all other numbers
    compared, integers = pre, _INTEGERS.get(pre.dtype)
    if integers is not None and bool((bound >= 0).all()):
        compared, bound = pre.view(integers), bound.view(integers)
    return _search_parts(pre, compared, bound, most)


def _search_parts(pre: torch.Tensor, compared: torch.Tensor, bound: torch.Tensor, most: int | None) -> Entries | None:
    """Look at a few tokens at a time.

    Args:
        pre: The block.
        compared: The same, of the same size in bytes, as what is compared with the bound.
        bound: In the type of what is compared.
        most: See `search_block`.
    """
    n_tokens = max(1, _BYTES_AT_ONCE // (pre.shape[1] * pre.itemsize))
    word = WORD_BYTES // pre.itemsize
    # Not bool, into which torch compares one element after the other.
    mask = torch.empty(
        -(-min(n_tokens, len(pre)) * pre.shape[1] // word) * word, dtype=compared.dtype, device=pre.device
    )
    found: list[Entries] = []
    n_found = 0
    for start in range(0, max(1, len(pre)), n_tokens):
        part = slice(start, start + n_tokens)
        size = compared[part].numel()
        torch.gt(compared[part], bound[part] if bound.ndim == 2 else bound, out=mask[:size].view(compared[part].shape))
        whole = mask[: -(-size // word) * word]
        whole[size:] = 0
        rows, columns, values = _take(pre[part], find_set(whole))
        n_found += len(rows)
        if most is not None and n_found > most:
            return None
        found.append((rows.add_(start), columns, values))
    rows, columns, values = map(torch.cat, zip(*found, strict=True))
    return rows, columns, values


def _take(pre: torch.Tensor, at: torch.Tensor) -> Entries:
    """The entries of a block at some flat indices, ascending."""
    return at // pre.shape[1], at % pre.shape[1], pre.flatten().index_select(0, at)
