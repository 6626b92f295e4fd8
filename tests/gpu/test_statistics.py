"""The encoder of the statistics and its accumulators on each device, against the CPU; sums repeat to the last bit."""

import numpy as np
import pytest
import torch

from cytosae.sae.registry import make_sae
from cytosae.statistics.accumulators import FeatureStatistics, GroupCounts
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae.statistics.fidelity import FidelityStatistics
from cytosae.statistics.heatmaps import LatentEncoder
from cytosae.statistics.label_activity import LabelActivity
from cytosae.statistics.position import PositionMaps
from cytosae.statistics.ties import _topk_by_keys, pack_keys, topk_with_ties, unpack_keys

N, T, D, S, LABELS = 21, 5, 16, 96, 4
CPU = torch.device("cpu")
NUMBERS = torch.arange(N) % (LABELS + 1) - 1
"""Label of each image; some have none."""


def make_activations() -> torch.Tensor:
    return torch.randn(N, T, D, generator=torch.Generator().manual_seed(0)).half()


def run_all(where: torch.device, arch: str, dtype: torch.dtype, split: int):
    sae = make_sae(arch, D, S, k=6, device=where)
    encoder = BlockEncoder(sae, (0.1, 0.5), dtype=dtype)
    features, groups = FeatureStatistics(S, 4, device=where), GroupCounts(LABELS, S, 2, device=where)
    labels = LabelActivity(S, LABELS, device=where)
    x = make_activations()
    for start in range(0, N, split):
        rows = torch.arange(start, min(start + split, N))
        pooled = encoder.reduce(x[rows], start)
        features.update(rows, pooled.scores)
        groups.update(NUMBERS[rows], pooled.counts)
        labels.update(NUMBERS[rows], pooled.scores)
    return features.result(), (groups.counts.cpu(), groups.n_images.cpu()), labels.result()


@pytest.mark.parametrize("arch", ["relu", "topk", "batchtopk", "jumprelu", "gated"])
def test_statistics_are_those_of_the_cpu(device, arch):
    expected, found = (run_all(where, arch, torch.float32, 21) for where in (CPU, device))
    for one, other in zip(expected, found, strict=True):
        for wanted, value in zip(one, other, strict=True):
            assert value.device == CPU
            if value.dtype.is_floating_point:
                torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
            else:
                # An activation within rounding of a threshold, and images within rounding of each other, may change.
                assert (value != wanted).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_repeat_and_do_not_depend_on_the_batches(device, dtype):
    whole, again, split = (run_all(device, "relu", dtype, size) for size in (24, 24, 8))
    for other, limit in ((again, 0), (split, 1e-6)):
        for one, two in zip(whole, other, strict=True):
            for wanted, value in zip(one, two, strict=True):
                torch.testing.assert_close(value, wanted, rtol=limit, atol=limit)


def test_merging_accepts_another_device(device):
    sae = make_sae("relu", D, S)
    pooled = BlockEncoder(sae).reduce(make_activations(), 0)
    rows = torch.arange(N)
    expected, merged, other = FeatureStatistics(S, 4), FeatureStatistics(S, 4, device=device), FeatureStatistics(S, 4)
    expected.update(rows, pooled.scores)
    merged.update(rows[:9], pooled.scores[:9])
    other.update(rows[9:], pooled.scores[9:])
    merged.merge(other)
    for one, two in zip(merged.result(), expected.result(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=0)


def test_ties_go_to_the_smaller_index(device):
    values = (torch.rand(40, 60, generator=torch.Generator().manual_seed(0)) * 5).floor().to(device)
    values[3] = 0
    found, plain = topk_with_ties(values, 7), _topk_by_keys(values, 7)
    assert torch.equal(found.values, plain.values)
    positive = plain.values > 0
    assert torch.equal(found.indices[positive], plain.indices[positive])
    unpacked = unpack_keys(pack_keys(values, torch.arange(60, device=device)))
    assert torch.equal(unpacked.values, values)


def test_position_shares_are_those_of_the_cpu(device):
    acts = torch.relu(torch.randn(12, 9, S, generator=torch.Generator().manual_seed(0)) + 2 * torch.eye(9, S))
    expected, found, other = PositionMaps(S, 9), PositionMaps(S, 9, device=device), PositionMaps(S, 9)
    expected.add(acts, slice(0, S))
    found.add(acts[:7].to(device), slice(0, S))
    other.add(acts[7:], slice(0, S))
    found.merge(other)
    assert found.result().device == CPU
    torch.testing.assert_close(found.result(), expected.result(), rtol=1e-4, atol=1e-5)


def test_chosen_latents_and_fidelity_are_those_of_the_cpu(device):
    x, latents = make_activations().float().flatten(0, 1), np.array([3, 90, 0])
    results = []
    for where in (CPU, device):
        sae = make_sae("relu", D, S, device=where)
        fidelity = FidelityStatistics(D, S, 2, device=where)
        acts = sae.encode(x)
        fidelity.update(x.to(where), torch.count_nonzero(acts, dim=0), sae.decode(acts), 1)
        results.append((LatentEncoder(sae, latents)(x).cpu(), fidelity.overall(), fidelity.of_group(1)))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-5)
    for one, other in zip(results[1][1:], results[0][1:], strict=True):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-4)
