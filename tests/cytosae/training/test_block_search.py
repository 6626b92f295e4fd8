"""Entries of a block above a bound against a plain comparison of all of them."""

import pytest
import torch

from cytosae.training import block_search
from cytosae.training.block_search import search_block

TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def make_block(n_tokens: int, n_latents: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n_tokens)
    block = torch.randn(n_tokens, n_latents, generator=generator).to(dtype)
    block.view(-1)[::7] = -0.0
    return block


def make_bounds(block: torch.Tensor) -> list[torch.Tensor]:
    n_tokens, n_latents = block.shape
    scalars = [torch.tensor(value, dtype=block.dtype) for value in (0.0, -0.0, 0.5, -0.5, 1e-30, 1e4)]
    return [
        *scalars,
        torch.linspace(-1, 1, n_latents).to(block.dtype),
        torch.linspace(0, 1, n_latents).to(block.dtype),
        torch.linspace(0, 2, n_tokens).to(block.dtype)[:, None],
        torch.linspace(-2, 2, n_tokens).to(block.dtype)[:, None],
    ]


@pytest.mark.parametrize("n_bytes", [1, 300, 1 << 21])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (1, 13), (3, 5), (17, 31), (40, 64)])
def test_found_are_those_of_a_comparison_row_by_row(sizes, dtype, n_bytes, monkeypatch):
    monkeypatch.setattr(block_search, "_BYTES_AT_ONCE", n_bytes)
    block = make_block(*sizes, dtype)
    for bound in make_bounds(block):
        rows, columns, values = search_block(block, bound)
        wanted = (block > bound).nonzero()
        assert torch.equal(torch.stack([rows, columns], dim=1), wanted)
        assert torch.equal(values, block[block > bound])
        n_found = len(wanted)
        assert search_block(block, bound, n_found) is not None
        assert not n_found or search_block(block, bound, n_found - 1) is None


@pytest.mark.parametrize("dtype", TYPES)
def test_a_block_without_tokens_has_no_entries(dtype):
    for found in search_block(torch.empty(0, 9, dtype=dtype), torch.zeros((), dtype=dtype), 0):
        assert not len(found)


def test_not_a_number_hides_no_other_entry():
    block = make_block(40, 64, torch.float32)
    wanted = (block > 0.5).nonzero()
    block[block <= 0.5] = torch.nan
    rows, columns, _ = search_block(block, torch.tensor(0.5))
    assert torch.equal(torch.stack([rows, columns], dim=1), wanted)
