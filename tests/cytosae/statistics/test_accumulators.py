"""Statistics against independent float64 numpy code, and equal to the last bit for any split of the work."""

import itertools

import numpy as np
import pytest
import torch

from cytosae.sae.base import Sae
from cytosae.sae.relu import ReluSae
from cytosae.statistics.accumulators import FeatureStatistics, GroupCounts, normalise_counts
from cytosae.statistics.block_encoder import BlockEncoder
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.reader import StoreReader
from tests.support.stores import make_activations, make_store

N, T, D, S, K = 37, 5, 8, 24, 4


def make_exact_sae() -> Sae:
    """Small integers over powers of two: float32 makes no rounding error, so float64 numpy must agree exactly."""
    rng = np.random.default_rng(3)
    sae = ReluSae(D, S, seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.from_numpy(rng.integers(-4, 5, size=(D, S)) / 4))
        sae.b_enc.copy_(torch.from_numpy(rng.integers(-12, 2, size=S) / 4))
        sae.b_dec.copy_(torch.from_numpy(rng.integers(-2, 3, size=D) / 4))
        sae.W_enc[:, 5] = 0  # never active
        sae.b_enc[5] = -1
        sae.W_enc[:, 6] = 0  # always active with the same value: only ties
        sae.b_enc[6] = 0.5
        sae.b_enc[7] = -4  # hardly ever active: fewer than k images
    return sae


def make_exact_activations(n=N) -> np.ndarray:
    return (np.random.default_rng(4).integers(-8, 9, size=(n, T, D)) / 4).astype(np.float16)


def encode_numpy(sae, activations) -> np.ndarray:
    """docs/definitions.md, section 4, in float64, shape (n, T, S)."""
    W, b, b_dec = (getattr(sae, name).detach().double().numpy() for name in ("W_enc", "b_enc", "b_dec"))
    return np.maximum((activations.astype(np.float64) - b_dec) @ W + b, 0)


def features_numpy(acts, valid, k):
    """docs/definitions.md, section 6, one latent and one image at a time."""
    rows = [row for row in range(len(acts)) if valid[row]]
    indices, values = np.full((S, k), -1), np.zeros((S, k))
    mean_acts, sparsity = np.zeros(S), np.zeros(S)
    for s in range(S):
        scores = {row: acts[row, :, s].sum() / acts.shape[1] for row in rows}
        active = sorted((row for row in rows if scores[row] > 0), key=lambda row: (-scores[row], row))
        for slot, row in enumerate(active[:k]):
            indices[s, slot], values[s, slot] = row, scores[row]
        if active:
            mean_acts[s] = sum(scores[row] for row in active) / len(active)
        sparsity[s] = len(active) / max(len(rows), 1)
    return indices, values, mean_acts, sparsity


def run(store, sae, *, block_rows, k=K, thresholds=(), groups=None, n_groups=0, latent_range=None):
    statistics, counts = FeatureStatistics(S, k), GroupCounts(n_groups, S, len(thresholds))
    encoder = BlockEncoder(sae, thresholds)
    start, stop = latent_range or (0, None)
    with StoreReader(store) as reader:
        for block in iter_row_blocks(reader, block_rows=block_rows, start=start, stop=stop):
            reduction = encoder.reduce(torch.from_numpy(block.activations), block.first)
            slots = torch.from_numpy(block.valid.nonzero()[0])
            statistics.update(slots + block.first, reduction.scores[slots])
            if groups is not None:
                counts.update(groups[slots + block.first], reduction.counts[:, slots])
    return statistics, counts


@pytest.fixture(params=[1, 5, 64])
def exact_store(request, tmp_path):
    invalid = [0, 17, 20]
    return make_store(tmp_path / "s.zarr", make_exact_activations(), shard_images=request.param, invalid=invalid)


@pytest.mark.parametrize("block_rows", [1, 7, 8, 64])
def test_features_follow_the_definition(exact_store, block_rows):
    sae = make_exact_sae()
    acts = encode_numpy(sae, make_exact_activations())
    indices, values, mean_acts, sparsity = features_numpy(acts, exact_store.valid, K)
    result = run(exact_store, sae, block_rows=block_rows)[0].result()
    assert result.indices.tolist() == indices.tolist()
    # T = 5 makes the mean inexact in binary: one float32 rounding.
    np.testing.assert_allclose(result.values.numpy(), values, rtol=2e-7)
    np.testing.assert_allclose(result.mean_acts.numpy(), mean_acts, rtol=1e-6)
    np.testing.assert_allclose(result.sparsity.numpy(), sparsity, rtol=1e-7)
    # Ties: latent 6 gives every image the same score, so the smallest valid rows are kept.
    assert result.indices[6].tolist() == [1, 2, 3, 4]
    # Never active: no image 0, no NaN.
    assert result.indices[5].tolist() == [-1] * K
    assert result.mean_acts[5] == result.sparsity[5] == 0
    assert 0 < (result.indices[7] >= 0).sum() < K
    assert not torch.isin(result.indices, torch.tensor([0, 17, 20])).any()


@pytest.mark.parametrize("block_rows", [1, 7, 8, 64])
def test_patient_counts_follow_the_definition(exact_store, block_rows):
    sae, thresholds = make_exact_sae(), (0.2, 1.0)
    groups = torch.arange(N) % 5 - 1  # patients interleaved in row order; every fifth image has no patient
    acts = encode_numpy(sae, make_exact_activations())
    expected = np.zeros((2, 4, S), dtype=np.int64)
    n_images = np.zeros(4, dtype=np.int64)
    for row in range(N):
        if exact_store.valid[row] and groups[row] >= 0:
            n_images[groups[row]] += 1
            for number, threshold in enumerate(thresholds):
                expected[number, groups[row]] += (acts[row] > threshold).sum(axis=0)
    counts = run(exact_store, sae, block_rows=block_rows, thresholds=thresholds, groups=groups, n_groups=4)[1]
    assert counts.counts.tolist() == expected.tolist()
    assert counts.n_images.tolist() == n_images.tolist()


def make_random_case(tmp_path, shard_images):
    activations = np.random.default_rng(8).normal(size=(N, T, D)).astype(np.float16)
    return make_store(tmp_path / f"{shard_images}.zarr", activations, shard_images=shard_images, invalid=[9])


def test_no_bit_depends_on_batches_shards_or_merge_order(tmp_path):
    sae = ReluSae(D, S, seed=5)
    groups = torch.arange(N) % 3
    options = {"thresholds": (0.1,), "groups": groups, "n_groups": 3}
    reference, reference_counts = run(make_random_case(tmp_path, 64), sae, block_rows=64, **options)
    expected = reference.result()
    for shard_images, block_rows in itertools.product([1, 5, 64], [1, 7, 64]):
        store = make_random_case(tmp_path / f"b{block_rows}", shard_images)
        statistics, counts = run(store, sae, block_rows=block_rows, **options)
        _assert_same(statistics.result(), expected)
        assert torch.equal(counts.counts, reference_counts.counts)
    store = make_random_case(tmp_path / "m", 5)
    parts = [(0, 5), (5, 13), (13, 14), (14, 37)]
    pieces = [run(store, sae, block_rows=8, latent_range=part, **options) for part in parts]
    for order in itertools.permutations(range(4)):
        merged, counts = FeatureStatistics(S, K), GroupCounts(3, S, 1)
        for number in order:
            merged.merge(pieces[number][0])
            counts.merge(pieces[number][1])
        _assert_same(merged.result(), expected)
        assert torch.equal(counts.counts, reference_counts.counts)
        assert torch.equal(counts.n_images, reference_counts.n_images)


def test_ranges_keep_only_the_groups_that_occur_in_them_and_merge_to_the_same_counts():
    rng = np.random.default_rng(0)
    groups = torch.from_numpy(np.sort(rng.integers(-1, 1000, size=400)))
    counts = torch.from_numpy(rng.integers(0, 9, size=(2, 400, S)).astype(np.int32))
    whole = GroupCounts(1000, S, 2)
    whole.update(groups, counts)
    bounds = [0, 1, 90, 90, 250, 400]
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = GroupCounts(1000, S, 2, occurring=groups[start:stop])
        for at in range(start, stop, 16):
            end = min(at + 16, stop)
            part.update(groups[at:end], counts[:, at:end])
        assert part._counts.shape[1] == len({group for group in groups[start:stop].tolist() if group >= 0})
        parts.append(part)
    for order in itertools.permutations(range(5)):
        merged = GroupCounts(1000, S, 2, occurring=groups[:0])
        for number in order:
            merged.merge(parts[number])
        assert torch.equal(merged.counts, whole.counts)
        assert torch.equal(merged.n_images, whole.n_images)
    whole.merge(parts[0])
    assert whole.counts.sum() == counts[:, groups >= 0].sum() + parts[0].counts.sum()


@pytest.mark.parametrize("occurring", [[], [1], [0, 2]])
def test_an_image_of_a_group_that_was_not_announced_is_refused(occurring):
    counts = GroupCounts(9, S, 1, occurring=torch.tensor(occurring, dtype=torch.int64))
    for group in (5, 3):
        with pytest.raises(ValueError, match="not among `occurring`"):
            counts.update(torch.tensor([group]), torch.ones(1, 1, S))
    counts.update(torch.tensor([-1]), torch.ones(1, 1, S))
    assert not counts.counts.any()


def _assert_same(found, expected):
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.sparsity, expected.sparsity)
    assert torch.equal(found.mean_acts, expected.mean_acts)


def test_one_image_and_one_patient(tmp_path):
    sae = make_exact_sae()
    activations = make_exact_activations(1)
    store = make_store(tmp_path / "s.zarr", activations)
    statistics, counts = run(
        store, sae, block_rows=64, thresholds=(0.2,), groups=torch.zeros(1, dtype=torch.int64), n_groups=1
    )
    acts = encode_numpy(sae, activations)
    indices, _, mean_acts, sparsity = features_numpy(acts, [True], K)
    result = statistics.result()
    assert result.indices.tolist() == indices.tolist()
    np.testing.assert_allclose(result.mean_acts.numpy(), mean_acts, rtol=1e-6)
    assert result.sparsity.tolist() == sparsity.tolist()
    assert counts.counts[0, 0].tolist() == (acts[0] > 0.2).sum(axis=0).tolist()


def test_no_images_give_empty_results():
    result = FeatureStatistics(S, K).result()
    assert (result.indices == -1).all()
    assert (result.values == 0).all()
    assert (result.sparsity == 0).all()


def test_encoding_latents_in_chunks_gives_the_same_bits(tmp_path, monkeypatch):
    sae = make_exact_sae()
    activations = torch.from_numpy(make_exact_activations(8))
    whole = BlockEncoder(sae, (0.2,)).reduce(activations, 0)
    monkeypatch.setattr("cytosae.statistics.block_encoder.LATENT_CHUNK", 7)
    parts = BlockEncoder(sae, (0.2,)).reduce(activations, 0)
    assert torch.equal(whole.scores, parts.scores)
    assert torch.equal(whole.counts, parts.counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_close(dtype):
    sae = ReluSae(D, S, seed=5)
    activations = torch.from_numpy(make_activations(9))
    low = BlockEncoder(sae, dtype=dtype).reduce(activations, 0).scores
    torch.testing.assert_close(low, BlockEncoder(sae).reduce(activations, 0).scores, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("image", [[3.0, 1.5], [0, 0]]),
        ("token", [[0.6, 0.3], [0, 0]]),
        ("latents", [[3.0, 1.5], [0, 0]]),
        ("none", [[6, 3], [0, 0]]),
    ],
)
def test_normalisation(how, expected):
    counts, n_images = torch.tensor([[6, 3], [0, 0]]), torch.tensor([2, 0])
    result = normalise_counts(counts, n_images, 5, how)
    assert result.dtype == torch.float64
    assert result.tolist() == expected


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        FeatureStatistics(S, 0)
    with pytest.raises(ValueError, match=r"scores must be \(2, 24\)"):
        FeatureStatistics(S, K).update(torch.arange(2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"counts must be \(1, 2, 24\)"):
        GroupCounts(1, S, 1).update(torch.zeros(2, dtype=torch.int64), torch.zeros(1, 3, S))
    with pytest.raises(ValueError, match="normalization must be"):
        normalise_counts(torch.zeros(1, 1), torch.ones(1), 1, "sum")
