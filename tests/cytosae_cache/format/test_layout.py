"""Opened stores describe what is on disk, and damaged metadata is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr

from cytosae_cache.errors import StoreCorruptError, StoreNotFoundError
from cytosae_cache.format.metadata import ATTRIBUTES_KEY
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.store import ActivationStore
from tests.support.stores import make_activations, make_int8_store, make_store, make_table, seal


def test_tables_round_trip(tmp_path):
    table = make_table(6, labels=("ä", ""), patients=("", "p", "q"))
    store = make_store(tmp_path / "s.zarr", make_activations(6), table=table, invalid=[4])
    assert store.images == table
    assert store.column("images/reason").tolist() == ["", "", "", "", "cannot be read", ""]
    assert store.column("images/sha256")[5].tolist() == [5] * 32
    assert store.column("images/sha256")[4].tolist() == [0] * 32
    assert store.describe()["n_skipped"] == 1


def test_moments_are_exact(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[3, 10])
    kept = np.delete(activations.astype(np.float64), [3, 10], axis=0).reshape(-1, 8)
    moments = store.moments
    assert moments.count.sum() == len(kept)
    np.testing.assert_allclose(moments.sum.sum(axis=0), kept.sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.sum_sq.sum(axis=0), (kept**2).sum(axis=0), rtol=1e-13)


def test_a_missing_store_is_an_error_that_says_what_to_type(tmp_path):
    with pytest.raises(StoreNotFoundError, match="no activation store at .*cytosae-cache list"):
        ActivationStore.open(tmp_path)


def test_other_zarr_groups_are_refused(tmp_path):
    zarr.create_group(tmp_path / "g", zarr_format=3)
    with pytest.raises(StoreCorruptError, match="is a Zarr group but not an activation store"):
        ActivationStore.open(tmp_path / "g")


def _edit(path: Path, change) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_another_format_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    _edit(store.path / "zarr.json", lambda value: value["attributes"][ATTRIBUTES_KEY].update(format=2))
    with pytest.raises(StoreCorruptError, match="has format 2, this version reads format 1"):
        ActivationStore.open(store.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: array.update(data_type="float32"),
        lambda array: array.update(shape=[3, 5, 9]),
        lambda array: array.update(shape=[10**12, 5, 8]),
        lambda array: array.update(shape="abc"),
        lambda array: array.update(codecs=[{"name": "pickle"}]),
        lambda array: array["codecs"][0]["configuration"].update(index_location="start"),
        lambda array: array["codecs"][0]["configuration"]["codecs"].append({"name": "evil"}),
        lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[0, 5, 8]),
        lambda array: array.update(chunk_key_encoding={"name": "v2"}),
    ],
)
def test_an_array_with_another_layout_is_refused(tmp_path, change):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    _edit(store.path / "activations" / "zarr.json", change)
    with pytest.raises(StoreCorruptError, match="was changed or damaged"):
        ActivationStore.open(store.path)
    seal(store)
    with pytest.raises(StoreCorruptError, match="not laid out as"):
        ActivationStore.open(store.path)


def test_metadata_that_is_not_json_or_too_large_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    path = store.path / "activations" / "zarr.json"
    path.write_text("{")
    seal(store)
    with pytest.raises(StoreCorruptError, match="is not JSON"):
        ActivationStore.open(store.path)
    path.write_text(" " * (1 << 21))
    seal(store)
    with pytest.raises(StoreCorruptError, match="larger than any metadata"):
        ActivationStore.open(store.path)
    path.unlink()
    with pytest.raises(StoreCorruptError, match="is missing"):
        ActivationStore.open(store.path)


def test_impossible_channels_are_refused(tmp_path):
    _, store = make_int8_store(tmp_path / "s.zarr")
    zarr.open_group(store.path, mode="r+")["channels/std"][3] = 0
    seal(store)
    with pytest.raises(StoreCorruptError, match="channels of store .* must be 16 finite means and positive deviations"):
        StoreReader(ActivationStore.open(store.path))
