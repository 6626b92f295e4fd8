"""Orders are permutations, the same everywhere, and resume exactly."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae_cache.reading.permutation import (
    coalesce_reads,
    epoch_order,
    epoch_windows,
    iter_batches,
    rebatch,
    split_evenly,
    spread_rows,
)


@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_visits_every_row_once(n, seed, epoch):
    order = epoch_order(n, seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))


def test_the_order_is_frozen():
    # Golden: a change here would make every interrupted run resume in another order.
    assert epoch_order(8, seed=42, epoch=3).tolist() == [3, 4, 5, 0, 1, 6, 2, 7]


def test_epochs_and_seeds_differ():
    orders = {tuple(epoch_order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_shuffle_is_uniform():
    # Each of 6 rows is at each of 6 positions about 1000 times in 6000 epochs; 5 sigma is 144.
    places = np.stack([epoch_order(6, seed=1, epoch=epoch) for epoch in range(6000)])
    counts = np.stack([np.bincount(places[:, place], minlength=6) for place in range(6)])
    assert abs(counts - 1000).max() < 144


@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 90), st.integers(0, 130))
def test_batches_from_a_position_are_the_tail_of_the_unbroken_run(n, batch, skip, stop):
    whole = list(iter_batches(n, batch_rows=batch, seed=7, samples_seen=0, stop=stop))
    samples_seen = min(skip // batch * batch, stop)
    tail = list(iter_batches(n, batch_rows=batch, seed=7, samples_seen=samples_seen, stop=stop))
    assert [part.tolist() for part in tail] == [part.tolist() for part in whole[-(-samples_seen // batch) :]]
    rows = np.concatenate([np.empty(0, dtype=np.int64), *whole])
    assert len(rows) == stop
    for epoch in range(stop // n):
        assert sorted(rows[epoch * n : (epoch + 1) * n]) == list(range(n))


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 9), st.one_of(st.none(), st.integers(1, 5)))
def test_reads_put_every_row_in_its_slot(rows, shard_images, max_images):
    placed = {}
    for read in coalesce_reads(np.array(rows, dtype=np.int64), shard_images, max_images):
        assert 0 <= read.first
        assert read.first + read.n_images <= shard_images
        assert max_images is None or read.n_images <= max_images
        for offset in range(read.n_images):
            assert read.slot + offset not in placed
            placed[read.slot + offset] = read.shard * shard_images + read.first + offset
    assert [placed[slot] for slot in range(len(rows))] == rows


def test_consecutive_rows_become_one_read():
    assert len(coalesce_reads(np.arange(20), 10)) == 2
    assert len(coalesce_reads(np.arange(20)[::-1].copy(), 10)) == 20


@given(st.integers(0, 200), st.integers(0, 50))
def test_a_sample_is_spread_evenly(n, wanted):
    rows = spread_rows(n, wanted)
    assert len(rows) == min(n, wanted)
    assert len(set(rows.tolist())) == len(rows)
    assert all(0 <= row < n for row in rows)
    if len(rows) > 1:
        assert np.diff(rows).max() - np.diff(rows).min() <= 1


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (3, -1, 0), (3, 0, -1)])
def test_negative_arguments_are_refused(arguments):
    n, seed, epoch = arguments
    with pytest.raises(ValueError, match="must be 0 or more"):
        epoch_order(n, seed=seed, epoch=epoch)


def test_empty_epochs_are_refused():
    with pytest.raises(ValueError, match="must be 1 or more"):
        next(iter_batches(0, batch_rows=1, seed=0, samples_seen=0, stop=1))


def test_empty_windows_are_refused():
    with pytest.raises(ValueError, match="window_shards must be 1 or more, found 0"):
        epoch_windows(np.array([0, 3]), window_shards=0, seed=0, epoch=0)


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(1, 12))
def test_rebatching_keeps_the_numbers(lengths, length):
    bounds = np.cumsum([0, *lengths])
    pieces = [np.arange(start, end) for start, end in itertools.pairwise(bounds)]
    cut = list(rebatch(pieces, length))
    assert [number for piece in cut for number in piece] == list(range(bounds[-1]))
    assert all(len(piece) == length for piece in cut[:-1])
    assert all(0 < len(piece) <= length for piece in cut)


@given(st.integers(0, 50), st.integers(1, 12))
def test_an_even_split_is_even(n, max_length):
    bounds = split_evenly(n, max_length)
    lengths = np.diff(bounds).tolist()
    assert (bounds[0], bounds[-1]) == (0, n)
    assert lengths == [len(part) for part in np.array_split(np.arange(n), max(len(lengths), 1))] or not n
    assert sum(lengths) == n
    assert len(lengths) == -(-n // max_length)
    assert not lengths or max_length >= max(lengths) >= min(lengths) >= max(lengths) - 1
