"""Opening a store costs the same however many shards it has, and still refuses what cannot be true."""

import json

import numpy as np
import pytest

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.columns import encode_hierarchy
from cytosae_cache.format.metadata import MAX_METADATA_BYTES
from cytosae_cache.format.shard import shard_name
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.stores import count_system_calls, make_activations, make_hollow_store, make_store

MOST_CALLS = 120  # most of them look at the folders above a file, one by one


def _count_opening(path) -> int:
    with count_system_calls() as calls:
        ActivationStore.open(path)
    return calls.total()


def test_opening_makes_as_many_system_calls_for_three_shards_as_for_a_hundred_thousand(tmp_path):
    for n in (3, 100_000):
        assert make_hollow_store(tmp_path / f"{n}.zarr", n).n_shards == n
    few, many = (_count_opening(tmp_path / f"{n}.zarr") for n in (3, 100_000))
    assert few == many <= MOST_CALLS


def test_opening_looks_at_no_second_shard_if_the_first_has_room(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(40), shard_images=1)
    many = _count_opening(store.path)
    assert many <= MOST_CALLS
    for shard in range(1, 40):
        (store.path / shard_name(shard)).unlink()
    with pytest.raises(StoreCorruptError, match=r"promises 40 images, but its shard files have only 0 bytes \(8 of 40"):
        ActivationStore(store.path)


def test_a_store_opens_though_a_shard_is_missing_and_names_it_when_it_is_read(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(12), shard_images=1)
    (store.path / shard_name(0)).unlink()
    store = ActivationStore.open(store.path)
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="c/0/0/0' is missing. Repair it"):
        reader.read(np.array([0]))
    assert verify_store(store).problems == [f"shard '{store.path}/{shard_name(0)}' is missing"]


@pytest.mark.parametrize("n", [0, 1, 1 << 16, (1 << 16) + 1, 1 << 22, (1 << 22) + 1, 100_000_000])
def test_tables_have_at_most_64_chunks_and_small_ones_those_of_before(n, monkeypatch):
    (data,) = (
        data
        for name, data in encode_hierarchy({"images/valid": np.broadcast_to(np.False_, n)}).items()
        if name == "images/valid/zarr.json"
    )
    (rows,) = json.loads(data)["chunk_grid"]["configuration"]["chunk_shape"]
    assert -(-n // rows) <= 64
    if n <= 1 << 22:
        assert rows == max(1, min(n, 1 << 16))


def test_the_metadata_of_the_largest_store_is_within_the_limit(tmp_path):
    # 13 tables of every store and 64 further columns, with 64 chunks each, and the longest names that they can have.
    files = {f"images/columns/{column}/c/{chunk}": "f" * 64 for column in range(64 + 13) for chunk in range(64)}
    assert len(json.dumps(files, indent=1)) < MAX_METADATA_BYTES // 2


def test_links_that_no_file_of_the_store_needs_are_found_by_verify(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    (store.path / "extra").symlink_to(tmp_path)
    problems = verify_store(ActivationStore.open(store.path)).problems
    assert problems == [f"'{store.path}/extra' is a link that leads out of the store; it is not followed"]
    with pytest.raises(StoreCorruptError, match="is a link that leads out of the store"):
        store.zarr_array()


@pytest.mark.parametrize("what", ["write", "remove"])
def test_nothing_is_written_or_removed_through_a_link_out_of_the_store(tmp_path, what):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "0.json").write_text("mine")
    (store.path / "progress").symlink_to(tmp_path / "outside")
    change = {
        "write": lambda: store.storage.write("progress/0.json", [b"x"]),
        "remove": lambda: store.storage.remove(["progress/0.json"]),
    }[what]
    with pytest.raises(StoreCorruptError, match="progress' is a link that leads out of the store; it is not followed"):
        change()
    assert (tmp_path / "outside" / "0.json").read_text() == "mine"
