"""Top-k with ties against a stable sort."""

import pytest
import torch

from cytosae.statistics.ties import _topk_by_keys, pack_keys, topk_with_ties, unpack_keys


def make_values(n_levels: int, *, shape: tuple[int, int] = (200, 30)) -> torch.Tensor:
    """Non-negative values of few levels, so that most are tied; every level is a multiple of a seventh."""
    draws = torch.randint(0, n_levels, shape, generator=torch.Generator().manual_seed(n_levels))
    return draws.float() / 7


@pytest.mark.parametrize("k", [1, 3, 29, 30])
@pytest.mark.parametrize("n_levels", [1, 2, 5, 1000])
def test_the_largest_are_those_of_a_stable_sort(n_levels, k):
    values = make_values(n_levels)
    expected = values.sort(dim=1, descending=True, stable=True)
    positive = expected.values[:, :k] > 0
    for found in (topk_with_ties(values, k), _topk_by_keys(values, k)):
        assert torch.equal(found.values, expected.values[:, :k])
        assert torch.equal(found.indices[positive], expected.indices[:, :k][positive])


def test_zeros_are_chosen_in_arbitrary_order():
    found = topk_with_ties(torch.tensor([[0.0, 2.0, 0.0, 0.0]]), 3)
    assert found.values.tolist() == [[2.0, 0.0, 0.0]]
    assert found.indices[0, 0] == 1
    assert len(set(found.indices[0].tolist())) == 3


def test_no_rows():
    assert topk_with_ties(torch.zeros(0, 4), 2).indices.shape == (0, 2)


def test_keys_are_exact_up_to_the_last_index():
    values = torch.tensor([0.0, 1e-45, 1.0, torch.finfo(torch.float32).max, torch.inf])
    indices = torch.tensor([0, 1, 2, (1 << 32) - 2, (1 << 32) - 1])
    keys = pack_keys(values, indices)
    assert keys.argsort().tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(unpack_keys(keys).values, values)
    assert torch.equal(unpack_keys(keys).indices, indices)
    assert pack_keys(torch.ones(1), torch.tensor([3])) > pack_keys(torch.ones(1), torch.tensor([4]))
