"""Every training order serves every part once per epoch, and resumes exactly from any position."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cytosae_cache.reading.permutation import epoch_order, group_order
from cytosae_cache.reading.sampler import GROUP_BATCHES, WINDOW_SHARDS, RowLayout, Sampler

KINDS = [("global", "images"), ("global", "tokens"), ("windowed", "images"), ("windowed", "tokens")]


def _layout(shard_rows, n_first=None):
    bounds = np.cumsum([0, *shard_rows])
    stores = [0, bounds[-1]] if n_first is None else [0, bounds[n_first], bounds[-1]]
    return RowLayout(bounds, np.array(stores))


samplers = st.builds(
    Sampler,
    st.lists(st.integers(0, 6), min_size=1, max_size=9).filter(any).map(_layout),
    n_tokens=st.integers(1, 4),
    batch_images=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    shuffle=st.sampled_from(["global", "windowed"]),
    batch_of=st.sampled_from(["images", "tokens"]),
    window_shards=st.integers(1, 10),
)


@given(samplers, st.integers(0, 90), st.integers(0, 90))
def test_every_epoch_serves_every_part_once_and_resuming_gives_the_tail(sampler, skip, stop):
    whole = list(sampler.iter_batches(samples_seen=0, stop=stop))
    parts = np.concatenate([np.empty(0, dtype=np.int64), *whole])
    per_epoch = sampler.n_rows * sampler.parts_per_row
    assert len(parts) == stop * sampler.parts_per_row
    assert all(len(batch) == sampler.batch_images * sampler.parts_per_row for batch in whole[:-1])
    for epoch in range(stop // sampler.n_rows):
        served = parts[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(served) == list(range(per_epoch))
    number = min(skip, len(whole))
    samples_seen = min(number * sampler.batch_images, stop)
    tail = list(sampler.iter_batches(samples_seen=samples_seen, stop=stop))
    assert [batch.tolist() for batch in tail] == [batch.tolist() for batch in whole[number:]]


@given(samplers, st.integers(0, 5))
def test_groups_contain_every_row_once_and_at_most_max_group_rows(sampler, epoch):
    groups = sampler.epoch_groups(epoch)
    assert sorted(np.concatenate(groups)) == list(range(sampler.n_rows))
    for rows in groups:
        assert len(rows) <= sampler.max_group_rows
        assert (np.diff(rows) > 0).all()


@given(samplers)
def test_a_window_consists_of_whole_shards(sampler):
    sampler = dataclasses.replace(sampler, shuffle="windowed")
    bounds = sampler.layout.shard_bounds
    for rows in sampler.epoch_groups(0):
        shards = set(np.searchsorted(bounds, rows, side="right") - 1)
        assert len(shards) <= sampler.window_shards
        assert len(rows) == sum(bounds[shard + 1] - bounds[shard] for shard in shards)


def test_any_position_gives_the_parts_from_there_on():
    # Not only at borders of batches: the images or tokens after the position, in the same order.
    for shuffle, batch_of in KINDS:
        sampler = Sampler(_layout([3, 4, 2, 5]), 3, 4, 1, shuffle, batch_of, window_shards=2)
        whole = np.concatenate(list(sampler.iter_batches(samples_seen=0, stop=40)))
        for samples_seen in range(40):
            tail = np.concatenate(list(sampler.iter_batches(samples_seen=samples_seen, stop=40)))
            assert np.array_equal(tail, whole[samples_seen * sampler.parts_per_row :])


def test_the_orders_are_frozen():
    # Golden: a change here would make every interrupted run resume in another order.
    assert (WINDOW_SHARDS, GROUP_BATCHES) == (8, 8)
    found = {
        kind: next(Sampler(_layout([2] * 20), 2, 3, 42, *kind).iter_batches(samples_seen=7, stop=40)).tolist()
        for kind in KINDS
    }
    assert found == {
        ("global", "images"): [4, 29, 31],
        ("global", "tokens"): [41, 52, 0, 55, 60, 16],
        ("windowed", "images"): [20, 4, 34],
        ("windowed", "tokens"): [69, 10, 4, 16, 40, 2],
    }


def test_the_global_shuffle_of_one_store_is_the_epochs_order():
    (batch,) = Sampler(_layout([5, 6]), 3, 11, 7).iter_batches(samples_seen=11, stop=22)
    assert np.array_equal(batch, epoch_order(11, seed=7, epoch=1))


@given(samplers, st.integers(0, 40))
def test_two_stores_give_the_same_batches_with_the_images_of_each_store_contiguous(sampler, first):
    layout = sampler.layout
    two = RowLayout(layout.shard_bounds, np.array([0, min(first, sampler.n_rows), sampler.n_rows]))
    one = dataclasses.replace(sampler, shuffle="global", batch_of="images")
    both = dataclasses.replace(one, layout=two)
    for plain, joined in zip(
        one.iter_batches(samples_seen=0, stop=30), both.iter_batches(samples_seen=0, stop=30), strict=True
    ):
        assert sorted(plain) == sorted(joined)
        assert np.count_nonzero(np.diff(joined >= first)) <= 1


def test_epochs_groups_and_seeds_have_their_own_orders():
    for shuffle, batch_of in KINDS:
        orders = set()
        for seed in range(3):
            sampler = Sampler(_layout([10] * 6), 2, 5, seed, shuffle, batch_of, window_shards=2)
            batches = list(sampler.iter_batches(samples_seen=0, stop=180))
            orders |= {tuple(np.concatenate(batches[epoch * 12 : epoch * 12 + 12])) for epoch in range(3)}
        assert len(orders) == 9


def test_tokens_of_a_batch_come_from_many_images():
    sampler = Sampler(_layout([50] * 4), 16, 10, 0, "global", "tokens")
    batch = next(sampler.iter_batches(samples_seen=0, stop=200))
    assert len(set(batch // 16)) > 60  # a batch has the tokens of 10 images; a group has at most 80 images


def test_the_order_inside_a_group_is_uniform():
    # Each of 6 parts is at each of 6 positions about 1000 times in 6000 groups; 5 sigma is 144.
    places = np.stack([group_order(6, seed=1, epoch=0, group=group) for group in range(6000)])
    counts = np.stack([np.bincount(places[:, place], minlength=6) for place in range(6)])
    assert abs(counts - 1000).max() < 144


def test_windows_are_equally_large():
    sampler = Sampler(_layout([4] * 9), 1, 1, 0, "windowed", window_shards=8)
    assert [len(rows) for rows in sampler.epoch_groups(0)] == [20, 16]


@pytest.mark.parametrize("change", [{"batch_images": 0}, {"window_shards": 0}, {"layout": _layout([0])}])
def test_empty_batches_windows_and_layouts_are_refused(change):
    with pytest.raises(ValueError, match="must be 1 or more, found"):
        dataclasses.replace(Sampler(_layout([3]), 2, 2, 0), **change)


@pytest.mark.parametrize(("name", "value"), [("shuffle", "globall"), ("batch_of", "token")])
def test_unknown_choices_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, found '{value}'"):
        dataclasses.replace(Sampler(_layout([3]), 2, 2, 0), **{name: value})
