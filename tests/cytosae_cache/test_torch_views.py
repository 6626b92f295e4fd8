"""Data sets of torch: what they serve is what the trainer gets, whatever the number of workers and ranks."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

import cytosae_cache
from cytosae_cache import StoreBatches, StoreImages
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader
from tests.support.stores import make_activations, make_store

N, INVALID = 23, (3, 17)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store") / "s.zarr", make_activations(N), invalid=INVALID)


def _trained(store, *, epoch=0, batch_size=4, **options):
    """The batches that training gets in an epoch, as tensors."""
    n = N - len(INVALID)
    with StoreReader(store) as reader:
        loader = ShuffledLoader(
            ConcatReader([reader]), batch_images=batch_size, seed=7, samples_seen=epoch * n, stop=(epoch + 1) * n,
            **options,
        )  # fmt: skip
        return [torch.from_numpy(batch.activations).float().clone() for batch in loader]


def _sorted(tensor):
    return tensor[np.lexsort(tensor.T.numpy())]


def test_images_are_the_readable_rows(store):
    images = store.torch_images()
    assert len(images) == N - len(INVALID)
    assert not set(INVALID) & set(images.rows.tolist())
    assert torch.equal(images[5], torch.from_numpy(store[int(images.rows[5])]).float())
    with pytest.raises(IndexError):
        images[N]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_images_reach_a_loader_with_workers(store, context):
    images = StoreImages(store.path, dtype="float16")
    images[0]  # a reader that is open in the parent
    loader = DataLoader(images, batch_size=5, num_workers=2, multiprocessing_context=context)
    found = torch.cat(list(loader))
    assert found.dtype == torch.float16
    assert torch.equal(found, torch.from_numpy(store[images.rows]))


def test_images_work_with_any_sampler(store):
    images = store.torch_images()
    sampler = BatchSampler(RandomSampler(images, generator=torch.Generator().manual_seed(1)), 4, drop_last=False)
    assert sum(len(batch) for batch in DataLoader(images, batch_sampler=sampler)) == len(images)


@pytest.mark.parametrize("shuffle", ["global", "windowed"])
@pytest.mark.parametrize("batch_of", ["images", "tokens"])
def test_batches_are_those_of_training(store, shuffle, batch_of):
    batches = store.torch_batches(batch_size=4, seed=7, shuffle=shuffle, batch_of=batch_of)
    for epoch in (0, 2):
        batches.set_epoch(epoch)
        expected = _trained(store, epoch=epoch, shuffle=shuffle, batch_of=batch_of)
        if batch_of == "tokens":
            expected = [batch.flatten(0, 1) for batch in expected]
        found = list(DataLoader(batches, batch_size=None))
        assert len(found) == len(batches) == len(expected)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("batch_of", "persistent"), [("images", True), ("tokens", False)])
def test_workers_and_ranks_share_the_same_batches(store, batch_of, persistent):
    served = []
    for rank in range(2):
        batches = StoreBatches(store.path, batch_size=4, seed=7, batch_of=batch_of, rank=rank, n_ranks=2)
        loader = DataLoader(batches, batch_size=None, num_workers=2, persistent_workers=persistent)
        list(loader)
        batches.set_epoch(1)
        found = list(loader)
        assert len(found) == len(batches)
        served += found
    expected = _trained(store, epoch=1, batch_of=batch_of)
    assert torch.equal(
        _sorted(torch.cat(served).flatten(1)), _sorted(torch.cat(expected).reshape(len(torch.cat(served)), -1))
    )


def test_rows_name_the_images_of_tokens(store):
    for rows, tokens in store.torch_batches(batch_size=4, batch_of="tokens", with_rows=True, dtype=None):
        assert rows.shape == tokens.shape[:1]
        images = torch.from_numpy(store[rows.numpy()])
        assert (images == tokens[:, None]).all(dim=2).any(dim=1).all()


def test_batches_of_several_stores_are_served_together(store, tmp_path):
    other = make_store(tmp_path / "o.zarr", make_activations(6, seed=1))
    batches = StoreBatches([store, other.path], batch_size=8, with_rows=True)
    rows = torch.cat([rows for rows, _ in batches])
    assert sorted(rows.tolist()) == [row for row in range(N + 6) if row not in INVALID]


def test_batches_may_be_kept(store):
    kept = list(store.torch_batches(batch_size=4))
    assert len({batch.data_ptr() for batch in kept}) == len(kept)


def test_data_sets_are_pickled_as_places(store):
    images, batches = store.torch_images(), store.torch_batches(batch_size=4)
    images[0]
    assert torch.equal(pickle.loads(pickle.dumps(images))[1], images[1])
    assert all(map(torch.equal, copy.deepcopy(batches), batches))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be 1 or more"),
        ({"rank": 2, "n_ranks": 2}, "rank below n_ranks"),
        ({"dtype": "int8"}, "dtype must be float32, float16 or another floating-point type of torch, found 'int8'"),
        ({"dtype": "float99"}, "found 'float99'"),
    ],
)
def test_options_out_of_range_are_refused(store, options, message):
    with pytest.raises(ValueError, match=message):
        store.torch_batches(**options)


def test_an_unfinished_store_is_refused(tmp_path):
    with pytest.raises(cytosae_cache.StoreNotFoundError):
        StoreImages(tmp_path / "none.zarr")
