"""Fidelity of reconstructions: equal to the plain formulas, whatever the batches, the order and the merging."""

import pytest
import torch

from cytosae.statistics.fidelity import FidelityStatistics

N, D, S, G = 60, 5, 7, 3


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=generator) + 2
    acts = torch.relu(torch.randn(N, S, generator=generator) - 0.5)
    acts[:, 4] = 0
    return x, acts, x + 0.3 * torch.randn(N, D, generator=generator), torch.arange(N) % G


def _expected(x, acts, again):
    x, again = x.double(), again.double()
    variance = ((x - x.mean(dim=0)) ** 2).sum()
    return (
        float(1 - ((x - again) ** 2).sum() / variance),
        float((acts > 0).sum()) / len(x),
        float((~(acts > 0).any(dim=0)).double().mean()),
        float(torch.nn.functional.cosine_similarity(x, again).mean()),
        len(x),
    )


def _count(tokens, parts, groups=(0, 1, 2)):
    x, acts, again, group = tokens
    found = FidelityStatistics(D, S, G)
    for part in torch.arange(N).tensor_split(parts):
        for one in groups:
            rows = part[group[part] == one]
            found.update(x[rows], torch.count_nonzero(acts[rows], dim=0), again[rows], one)
    return found


@pytest.mark.parametrize("parts", [1, 7])
def test_it_equals_the_formulas(tokens, parts):
    x, acts, again, group = tokens
    found = _count(tokens, parts)
    assert found.overall() == pytest.approx(_expected(x, acts, again), rel=1e-6)
    for one in range(G):
        here = group == one
        assert found.of_group(one) == pytest.approx(_expected(x[here], acts[here], again[here]), rel=1e-6)


def test_merging_adds_up(tokens):
    x, acts, again, _ = tokens
    found = _count(tokens, 3, groups=(1,))
    found.merge(_count(tokens, 2, groups=(2, 0)))
    assert found.overall() == pytest.approx(_expected(x, acts, again), rel=1e-6)
    assert found.of_group(2).n_tokens == N // G


def test_tokens_without_a_group_count_in_total_alone(tokens):
    x, acts, again, _ = tokens
    found = FidelityStatistics(D, S, 1)
    found.update(x, torch.count_nonzero(acts, dim=0), again)
    assert found.overall() == pytest.approx(_expected(x, acts, again), rel=1e-6)
    assert found.of_group(0) == (0.0, 0.0, 1.0, 0.0, 0)
