"""What else is known about the images of a store."""

import shutil

import numpy as np
import pytest
import zarr

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_spec, make_store, make_table, seal

COLUMNS = {
    "site": np.array(["A", "", "../../x", "ü\n"] * 2, dtype=np.dtypes.StringDType()),
    "x/../y": np.arange(8, dtype=np.int64) - 3,
    "age": np.array([1.5, np.nan] * 4),
}


def _with_columns(path, columns=COLUMNS):
    store = create_store(path, make_spec(), make_table(8), PROVENANCE, shard_images=4, columns=columns)
    return fill_store(store, make_activations(8))


def test_further_columns_of_images(tmp_path):
    store = _with_columns(tmp_path / "s.zarr")
    for found in (store.image_columns, ActivationStore.open(store.path).image_columns):
        assert list(found) == list(COLUMNS)
        for name, column in COLUMNS.items():
            assert found[name].dtype == column.dtype
            np.testing.assert_array_equal(found[name], column)
    assert store.describe()["image_columns"] == {"site": "text", "x/../y": "int64", "age": "float64"}
    assert verify_store(store).problems == []
    assert {path.name for path in (store.path / "images" / "columns").iterdir()} == {
        "zarr.json",
        "names",
        "0",
        "1",
        "2",
    }


def test_further_columns_of_an_unfinished_store(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4, columns=COLUMNS)
    assert list(store.image_columns) == list(COLUMNS)


def test_a_store_without_further_columns_is_as_before(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(8))
    assert store.image_columns == {}
    assert "image_columns" not in store.describe()
    assert not (store.path / "images" / "columns").exists()


def test_columns_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="equally long"):
        _with_columns(tmp_path / "s.zarr", {"x": np.arange(7)})
    with pytest.raises(ValueError, match="at most 64 further columns of images, found 65"):
        _with_columns(tmp_path / "s.zarr", {str(number): np.arange(8) for number in range(65)})


@pytest.mark.parametrize("column", [np.zeros((8, 32)), np.zeros(8, np.uint8), np.zeros(7), np.zeros(8, complex)])
def test_hostile_columns_are_refused(tmp_path, column):
    store = _with_columns(tmp_path / "s.zarr")
    zarr.open_group(store.path, mode="a").create_array("images/columns/1", data=column, overwrite=True)
    seal(store)
    with pytest.raises(StoreCorruptError, match="images/columns"):
        _ = ActivationStore.open(store.path).image_columns
    assert verify_store(ActivationStore.open(store.path)).problems


def test_a_missing_column_is_named(tmp_path):
    store = _with_columns(tmp_path / "s.zarr")
    shutil.rmtree(store.path / "images" / "columns" / "2")
    seal(store)
    with pytest.raises(StoreCorruptError, match="images/columns/2/zarr.json' is missing"):
        _ = ActivationStore.open(store.path).image_columns
