"""`verify` on a real cluster finds what one process finds, in the same order."""

import json

import pytest

from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import ShardFindings
from cytosae_pipeline.building.verify_shards import verify_files
from tests.support import cluster as there
from tests.support.stores import make_activations, make_store


@pytest.fixture(scope="module")
def address():
    with there.local_cluster() as address:
        yield address


def damage(store):
    """Bytes changed, a file cut, and one missing."""
    shards = [store.path / f"activations/c/{number}/0/0" for number in range(store.n_shards)]
    for number in (1, 4, 9):
        changed = bytearray(shards[number].read_bytes())
        changed[3] ^= 1
        shards[number].write_bytes(changed)
    shards[6].write_bytes(shards[6].read_bytes()[:-20])
    shards[7].unlink()


def test_a_cluster_finds_what_one_process_finds_in_its_order(tmp_path, address):
    store = make_store(tmp_path / "s.zarr", make_activations(40), shard_images=4)
    alone = verify_files(store, None)
    assert alone.sound
    assert alone.n_shards == 10
    assert verify_files(store, address) == alone
    damage(store)
    damaged = verify_files(ActivationStore.open(store.path), None)
    assert len(damaged.problems) >= 8
    assert verify_files(ActivationStore.open(store.path), address) == damaged


def test_the_verb_prints_the_same(with_store, address):
    outputs = [
        json.loads(with_store.run("verify", "--dataset_name", "toy", "--json", *more).stdout)
        for more in ([], ["--dask", address])
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0]["sound"] is True


def test_findings_merge_in_any_order():
    parts = [ShardFindings(2, 10, ((1, "b"),)), ShardFindings(1, 5, ()), ShardFindings(3, 7, ((0, "a"), (0, "A")))]
    expected = ShardFindings(6, 22, ((0, "a"), (0, "A"), (1, "b")))
    assert parts[0].merge(parts[1]).merge(parts[2]) == expected
    assert parts[2].merge(parts[0].merge(parts[1])) == expected
