"""The order of large stores is a permutation, mixes like a true one, and costs no memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae_cache.reading import permutation
from cytosae_cache.reading.keyed_order import KeyedOrder
from cytosae_cache.reading.permutation import KEYED_ROWS, EpochOrder, epoch_order
from cytosae_cache.reading.sampler import RowLayout, Sampler

N = 100_003

GOLDEN = [552259461, 271297411, 52052282, 709011048, 379366740]
GOLDEN_FIRST = [11395646, 8619324, 16231855, 10100800]


def _whole(n: int, *words: int) -> np.ndarray:
    return KeyedOrder(n, *words)(0, n)


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 50))
def test_it_is_a_permutation_of_any_size(n, seed, epoch):
    order = _whole(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


@pytest.mark.parametrize("n", [2**16 - 1, 2**16, 2**16 + 1, 2**17 + 1, 300_000])
def test_it_is_a_permutation_around_powers_of_two_and_of_the_pieces(n):
    assert np.array_equal(np.sort(_whole(n, 1, 0)), np.arange(n))


@given(st.integers(0, 70_000), st.integers(0, 70_000))
def test_any_slice_is_that_of_the_whole(one, other):
    start, stop = sorted((one, other))
    assert np.array_equal(KeyedOrder(70_000, 5, 2)(start, stop), WHOLE[start:stop])


WHOLE = _whole(70_000, 5, 2)


def test_the_order_is_frozen():
    # Golden: a change here would make every interrupted run on a large store resume in another order.
    assert KeyedOrder(10**9, 42, 3)(123_456_789, 123_456_794).tolist() == GOLDEN
    assert EpochOrder(KEYED_ROWS, seed=42, epoch=0).part(0, 4).tolist() == GOLDEN_FIRST


def test_only_orders_of_many_rows_are_keyed():
    assert np.array_equal(epoch_order(1000, seed=3, epoch=1), permutation._permutation(1000, 3, 1))
    # The order of before, to the bit, at the last size that has it.
    below = EpochOrder(KEYED_ROWS - 1, seed=42, epoch=0).part(0, 3)
    keys = np.random.Philox(np.random.SeedSequence((42, 0))).random_raw(KEYED_ROWS - 1)
    assert below.tolist() == np.argpartition(keys, range(3))[:3].tolist()
    assert isinstance(EpochOrder(KEYED_ROWS, seed=42, epoch=0)._rows, KeyedOrder)


def test_epochs_and_seeds_give_unrelated_orders():
    orders = [_whole(N, seed, epoch) for seed in range(3) for epoch in range(3)]
    for at, one in enumerate(orders):
        for other in orders[:at]:
            # Two independent permutations agree at one place on average, at more than 9 once in 10 million.
            assert (one == other).sum() <= 9


def _measures(order: np.ndarray) -> dict[str, float]:
    """How mixed an order is, each in standard deviations from what a uniform permutation gives on average."""
    n, at = len(order), np.arange(len(order))
    displacement = np.abs(order - at).mean() / n  # 1/3 on average, variance 2/45 of a single one
    neighbours = (np.abs(np.diff(order)) == 1).sum()  # Poisson with mean 2
    cells = 64
    counts = np.bincount((at * cells // n) * cells + order * cells // n, minlength=cells**2)
    expected = n / cells**2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = (cells - 1) ** 2
    correlation = np.corrcoef(order[:-1], order[1:])[0, 1]
    return {
        "displacement": (displacement - 1 / 3) / np.sqrt(2 / 45 / n),
        "neighbours": (neighbours - 2) / np.sqrt(2),
        "chi-square of positions": (chi_square - freedom) / np.sqrt(2 * freedom),
        "correlation of consecutive rows": correlation * np.sqrt(n),
    }


@pytest.mark.parametrize("kind", ["keyed", "sorted"])
def test_it_mixes_like_a_true_permutation(kind):
    for n in (N, 2**17, 2**17 + 1):
        for seed in range(4):
            order = _whole(n, seed, 0) if kind == "keyed" else epoch_order(n, seed=seed, epoch=0)
            # 96 values, all within 5 deviations; the two kinds pass the same test.
            assert {name: value for name, value in _measures(order).items() if abs(value) > 5} == {}


def test_the_low_bits_of_consecutive_rows_are_independent():
    order = _whole(2**17, 9, 0)
    for bits in (1, 3, 5):
        ones = 1 << bits
        pairs = np.bincount((order[:-1] % ones) * ones + order[1:] % ones, minlength=ones * ones)
        expected = len(order) / ones**2
        freedom = ones * ones - 1
        assert abs(((pairs - expected) ** 2 / expected).sum() - freedom) < 5 * np.sqrt(2 * freedom)


def test_a_batch_of_a_giant_epoch_takes_no_memory():
    tracemalloc.start()
    try:
        rows = EpochOrder(10**9, seed=1, epoch=7).part(999_999_000, 10**9 + 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 1000
    assert 0 <= rows.min() <= rows.max() < 10**9
    assert peak < 1 << 20


@pytest.mark.parametrize("batch_of", ["images", "tokens"])
@pytest.mark.parametrize("shuffle", ["global", "windowed"])
def test_samplers_resume_exactly_with_keyed_orders(monkeypatch, shuffle, batch_of):
    monkeypatch.setattr(permutation, "KEYED_ROWS", 8)
    monkeypatch.setattr(permutation, "_PART_ROWS", 16)
    bounds = np.array([0, 5, 5, 12, 30, 31, 40, 47, 53])
    sampler = Sampler(RowLayout(bounds, bounds[[0, -1]]), 3, 4, 7, shuffle, batch_of, window_shards=3)
    whole = list(sampler.iter_batches(samples_seen=0, stop=120))
    parts = np.concatenate(whole)
    size = sampler.parts_per_row * 53
    for epoch in range(2):
        assert np.array_equal(np.sort(parts[epoch * size : (epoch + 1) * size]), np.arange(size))
    for at in range(0, 120, 4):
        tail = list(sampler.iter_batches(samples_seen=at, stop=120))
        assert [part.tolist() for part in tail] == [part.tolist() for part in whole[at // 4 :]]


def test_windows_are_computed_when_they_are_served(monkeypatch):
    bounds = np.arange(0, 256 * 10_000 + 1, 256)
    sampler = Sampler(RowLayout(bounds, bounds[[0, -1]]), 3, 64, 7, "windowed", "images")
    tracemalloc.start()
    try:
        group = next(sampler.iter_groups(samples_seen=sampler.n_rows - 1000, stop=sampler.n_rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(group.rows) == 8 * 256
    assert peak < 2 << 20, "the rows of all windows would be 20 MB"
