"""Streams give every image once an epoch, in a reproducible order, and fail loudly."""

import threading

import numpy as np
import pytest

from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError
from cytosae_cache.reader import StoreReader
from cytosae_cache.shard import shard_name
from cytosae_cache.stream import ReadAhead, TrainingStream, iter_row_blocks
from tests.stores import make_activations, make_spec, make_store


def _collect(stream):
    return [(batch.rows.tolist(), batch.activations.copy(), batch.position) for batch in stream]


def test_every_valid_image_once_an_epoch_and_its_own_numbers(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[3])
    with StoreReader(store) as reader:
        batches = _collect(TrainingStream([reader], batch_images=4, seed=1, stop=30))
    rows = [row for part, _, _ in batches for row in part]
    for epoch in range(3):
        assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for part, values, _ in batches:
        assert np.array_equal(values, activations[part])
    assert batches[-1][2] == 30
    assert [len(part) for part, _, _ in batches] == [4] * 7 + [2]


def test_a_stream_resumes_with_the_batches_that_would_have_come(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    with StoreReader(store) as reader:
        whole = _collect(TrainingStream([reader], batch_images=4, seed=1, stop=40))
        tail = _collect(TrainingStream([reader], batch_images=4, seed=1, position=whole[3][2], stop=40))
    assert [part for part, _, _ in tail] == [part for part, _, _ in whole[4:]]


def test_several_stores_as_one(tmp_path):
    parts = [make_activations(5, seed=1), make_activations(7, seed=2)]
    stores = [make_store(tmp_path / f"{number}.zarr", part, invalid=[1]) for number, part in enumerate(parts)]
    both = np.concatenate(parts)
    with StoreReader(stores[0]) as first, StoreReader(stores[1]) as second:
        stream = TrainingStream([first, second], batch_images=4, seed=1, stop=10)
        batches = _collect(stream)
    assert sorted(row for part, _, _ in batches for row in part) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    for part, values, _ in batches:
        assert np.array_equal(values, both[part])


def test_stores_of_different_kinds_are_not_mixed(tmp_path):
    first = make_store(tmp_path / "a.zarr", make_activations(4))
    spec = make_spec(weights_sha256="cd" * 32)
    second = make_store(tmp_path / "b.zarr", make_activations(4), spec=spec)
    with StoreReader(first) as one, StoreReader(second) as two:
        with pytest.raises(StoreMismatchError, match="cannot be streamed as one: .*weights_sha256"):
            TrainingStream([one, two], batch_images=2, seed=0, stop=4)


def test_nothing_valid(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(2), invalid=[0, 1])
    with StoreReader(store) as reader, pytest.raises(StoreError, match="nothing to train on"):
        TrainingStream([reader], batch_images=2, seed=0, stop=4)


@pytest.mark.parametrize("block_rows", [1, 4, 8, 64])
@pytest.mark.parametrize("bounds", [(0, None), (3, 9), (8, 11)])
def test_row_blocks_cover_the_range_in_order(tmp_path, block_rows, bounds):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[5])
    expected = activations.copy()
    expected[5] = 0
    start, stop = bounds
    at = start
    with StoreReader(store) as reader:
        for block in iter_row_blocks(reader, block_rows=block_rows, start=start, stop=stop):
            assert block.first == at
            assert block.first == start or block.first % block_rows == 0
            count = len(block.valid)
            assert np.array_equal(block.activations, expected[at : at + count])
            assert block.valid.tolist() == [row != 5 for row in range(at, at + count)]
            at += count
    assert at == (11 if stop is None else stop)


def test_damage_met_while_reading_ahead_reaches_the_consumer(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(12))
    (store.path / shard_name(1)).unlink()
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="is missing"):
        _collect(TrainingStream([reader], batch_images=2, seed=0, stop=12))


def test_stopping_early_ends_the_thread(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(12))
    with StoreReader(store) as reader:
        iterator = iter(TrainingStream([reader], batch_images=2, seed=0, stop=1000))
        next(iterator)
        iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_buffers_are_few_and_never_overwritten_while_in_use():
    made = []

    def make():
        made.append(np.zeros(1))
        return made[-1]

    def fill(plan, buffer):
        buffer[0] = plan

    seen = []
    for plan, buffer in ReadAhead(range(50), fill, make, depth=3):
        assert buffer[0] == plan
        seen.append(plan)
    assert seen == list(range(50))
    assert len(made) == 3
