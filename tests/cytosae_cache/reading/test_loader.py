"""Loaders give every image once per epoch, in a reproducible order, and fail loudly."""

import threading

import numpy as np
import pytest

from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError
from cytosae_cache.format.shard import shard_name
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader, iter_row_blocks
from cytosae_cache.reading.prefetch import Prefetcher
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.reading.sampler import Sampler
from tests.support.stores import make_activations, make_spec, make_store


def _collect(stream):
    return [(batch.rows.tolist(), batch.activations.copy(), batch.samples_seen) for batch in stream]


def test_every_epoch_gives_every_valid_image_once(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[3])
    with StoreReader(store) as reader:
        batches = _collect(ShuffledLoader(ConcatReader([reader]), batch_images=4, seed=1, stop=30))
    rows = [row for part, _, _ in batches for row in part]
    for epoch in range(3):
        assert sorted(rows[epoch * 10 : epoch * 10 + 10]) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    for part, values, _ in batches:
        assert np.array_equal(values, activations[part])
    assert batches[-1][2] == 30
    assert [len(part) for part, _, _ in batches] == [4] * 7 + [2]


def test_a_resumed_loader_gives_the_tail_of_an_unbroken_one(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    with StoreReader(store) as reader:
        whole = _collect(ShuffledLoader(ConcatReader([reader]), batch_images=4, seed=1, stop=40))
        tail = _collect(
            ShuffledLoader(ConcatReader([reader]), batch_images=4, seed=1, samples_seen=whole[3][2], stop=40)
        )
    assert [part for part, _, _ in tail] == [part for part, _, _ in whole[4:]]


def test_several_stores_are_read_as_one(tmp_path):
    parts = [make_activations(5, seed=1), make_activations(7, seed=2)]
    stores = [make_store(tmp_path / f"{number}.zarr", part, invalid=[1]) for number, part in enumerate(parts)]
    both = np.concatenate(parts)
    with StoreReader(stores[0]) as first, StoreReader(stores[1]) as second:
        stream = ShuffledLoader(ConcatReader([first, second]), batch_images=4, seed=1, stop=10)
        batches = _collect(stream)
    assert sorted(row for part, _, _ in batches for row in part) == [0, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    for part, values, _ in batches:
        assert np.array_equal(values, both[part])


KINDS = [("global", "images"), ("global", "tokens"), ("windowed", "images"), ("windowed", "tokens")]


@pytest.fixture(params=[1, 2])
def readers(request, tmp_path):
    """Readers of one or two stores, with unreadable images, a short last shard, and a codec."""
    first = make_store(tmp_path / "0.zarr", make_activations(23, seed=1), invalid=[0, 9, 12, 13, 14, 15])
    second = make_store(tmp_path / "1.zarr", make_activations(9, seed=2), shard_images=2, compression="zstd")
    with StoreReader(first) as one, StoreReader(second) as two:
        yield [one, two][: request.param]


@pytest.mark.parametrize(("shuffle", "batch_of"), KINDS)
@pytest.mark.parametrize("in_memory", [False, True])
def test_every_way_of_serving_gives_the_reference_batches(readers, shuffle, batch_of, in_memory, monkeypatch):
    monkeypatch.setattr("cytosae_cache.reading.sampler.GROUP_BATCHES", 2)
    images = ConcatReader(readers)
    everything = images.read_all()
    sampler = Sampler(images.layout, 5, 4, 1, shuffle, batch_of)
    plain = list(sampler.iter_batches(samples_seen=0, stop=70))
    options = {"batch_images": 4, "seed": 1, "stop": 70, "shuffle": shuffle, "batch_of": batch_of}
    batches = _collect(ShuffledLoader(ConcatReader(readers), **options, in_memory=in_memory))
    assert len(batches) == len(plain)
    flat = everything.reshape(len(everything) * sampler.parts_per_row, -1)
    for (rows, values, _), parts in zip(batches, plain, strict=True):
        assert np.array_equal(values, flat[parts].reshape(values.shape))
        assert np.ravel(rows).tolist() == images.rows[parts // sampler.parts_per_row].tolist()
    for start in (3, 8):
        tail = _collect(
            ShuffledLoader(ConcatReader(readers), **options, in_memory=in_memory, samples_seen=batches[start - 1][2])
        )
        assert len(tail) == len(batches) - start
        for (rows, values, samples_seen), expected in zip(tail, batches[start:], strict=True):
            assert (rows, samples_seen) == (expected[0], expected[2])
            assert np.array_equal(values, expected[1])


def test_every_epoch_gives_every_token_once(tmp_path):
    activations = np.arange(11 * 5 * 2, dtype="<f2").reshape(11, 5, 2)
    store = make_store(tmp_path / "s.zarr", activations)
    with StoreReader(store) as reader:
        batches = _collect(ShuffledLoader(ConcatReader([reader]), batch_images=3, seed=1, stop=11, batch_of="tokens"))
    assert [values.shape for _, values, _ in batches] == [(3, 5, 2)] * 3 + [(2, 5, 2)]
    tokens = np.concatenate([values.reshape(-1, 2) for _, values, _ in batches])
    assert sorted(map(tuple, tokens)) == sorted(map(tuple, activations.reshape(-1, 2)))


@pytest.mark.parametrize("n", [40, 400])
def test_memory_is_bounded_by_the_window(tmp_path, n, monkeypatch):
    made = []
    empty = np.empty
    store = make_store(tmp_path / "s.zarr", make_activations(n))

    def counting(shape, dtype=float):
        array = empty(shape, dtype)
        if array.ndim == 3:
            made.append(len(array))
        return array

    with StoreReader(store) as reader:
        stream = ShuffledLoader(
            ConcatReader([reader]), batch_images=3, seed=1, stop=n, shuffle="windowed", make_buffer=counting
        )
        monkeypatch.setattr("cytosae_cache.reading.loader.aligned_buffer", counting)
        for _ in stream:
            pass
    assert sorted(made) == [3, 3, 3, 32, 32]  # 8 shards of 4 images


def test_the_rows_of_a_window_are_read_in_increasing_order(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(40))
    requested = []
    with StoreReader(store) as reader:
        read_rows = reader.read_rows
        reader.read_rows = lambda rows, out: (requested.append(rows.tolist()), read_rows(rows, out))
        _collect(ShuffledLoader(ConcatReader([reader]), batch_images=3, seed=1, stop=40, shuffle="windowed"))
    assert len(requested) == 2
    assert all(rows == sorted(rows) for rows in requested)
    assert sorted(row for rows in requested for row in rows) == list(range(40))


def test_a_batch_from_two_stores_takes_two_reads(tmp_path):
    stores = [make_store(tmp_path / f"{number}.zarr", make_activations(20)) for number in range(2)]
    calls = []
    with StoreReader(stores[0]) as first, StoreReader(stores[1]) as second:
        for reader in (first, second):
            reader.read_rows = lambda rows, out, read=reader.read_rows: (calls.append(len(rows)), read(rows, out))
        _collect(ShuffledLoader(ConcatReader([first, second]), batch_images=20, seed=1, stop=40))
    assert len(calls) == 4
    assert sum(calls) == 40


def test_a_loader_in_memory_reads_the_store_once(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    with StoreReader(store) as reader:
        stream = ShuffledLoader(ConcatReader([reader]), batch_images=4, seed=1, stop=55, in_memory=True)
    assert len(_collect(stream)) == 14  # the reader is closed


def test_empty_batches_are_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(2))
    with StoreReader(store) as reader, pytest.raises(ValueError, match="batch_images .* must be 1 or more"):
        ShuffledLoader(ConcatReader([reader]), batch_images=0, seed=0, stop=4)


def test_stores_with_different_specs_are_refused(tmp_path):
    first = make_store(tmp_path / "a.zarr", make_activations(4))
    spec = make_spec(weights_sha256="cd" * 32)
    second = make_store(tmp_path / "b.zarr", make_activations(4), spec=spec)
    with StoreReader(first) as one, StoreReader(second) as two:
        with pytest.raises(StoreMismatchError, match="cannot be streamed as one: .*weights_sha256"):
            ShuffledLoader(ConcatReader([one, two]), batch_images=2, seed=0, stop=4)


def test_a_store_without_valid_images_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(2), invalid=[0, 1])
    with StoreReader(store) as reader, pytest.raises(StoreError, match="nothing to train on"):
        ShuffledLoader(ConcatReader([reader]), batch_images=2, seed=0, stop=4)


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


@pytest.mark.parametrize(("shuffle", "batch_of"), KINDS)
def test_damage_found_while_prefetching_reaches_the_consumer(tmp_path, shuffle, batch_of):
    store = make_store(tmp_path / "s.zarr", make_activations(12))
    (store.path / shard_name(1)).unlink()
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="is missing"):
        _collect(
            ShuffledLoader(ConcatReader([reader]), batch_images=2, seed=0, stop=12, shuffle=shuffle, batch_of=batch_of)
        )


@pytest.mark.parametrize(("shuffle", "batch_of"), KINDS)
def test_stopping_early_ends_the_threads(tmp_path, shuffle, batch_of):
    store = make_store(tmp_path / "s.zarr", make_activations(12))
    with StoreReader(store) as reader:
        stream = ShuffledLoader(
            ConcatReader([reader]), batch_images=2, seed=0, stop=1000, shuffle=shuffle, batch_of=batch_of
        )
        iterator = iter(stream)
        next(iterator)
        iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetcher"]


def test_buffers_are_few_and_never_overwritten_while_in_use():
    made = []

    def make():
        made.append(np.zeros(1))
        return made[-1]

    def fill(plan, buffer):
        buffer[0] = plan
        return plan, buffer

    seen = []
    for plan, buffer in Prefetcher(range(50), fill, make, depth=3):
        assert buffer[0] == plan
        seen.append(plan)
    assert seen == list(range(50))
    assert len(made) == 3


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(("shuffle", "batch_of"), KINDS)
@pytest.mark.parametrize("n_parts", [2, 3, 5])
def test_parts_of_batches_together_are_the_batches(tmp_path, n_parts, shuffle, batch_of, in_memory):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    with StoreReader(store) as reader:
        images = ConcatReader([reader])

        def collect(part):
            options = {"batch_images": 4, "seed": 1, "samples_seen": 8, "stop": 30}
            return _collect(
                ShuffledLoader(images, shuffle=shuffle, batch_of=batch_of, in_memory=in_memory, part=part, **options)
            )

        whole = collect((0, 1))
        parts = [collect((number, n_parts)) for number in range(n_parts)]
    for number, (rows, activations, samples_seen) in enumerate(whole):
        pieces = [part[number] for part in parts]
        assert [row for piece in pieces for row in piece[0]] == rows
        assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), activations)
        assert all(piece[2] == samples_seen for piece in pieces)
        assert max(len(piece[1]) for piece in pieces) - min(len(piece[1]) for piece in pieces) <= 1
