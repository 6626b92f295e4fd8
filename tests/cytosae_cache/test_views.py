"""Views for other tools are lazy, one task per shard, and give the same numbers."""

import sys

import numpy as np
import pytest

from cytosae_cache.errors import StoreCorruptError, StoreError
from cytosae_cache.format.shard import shard_name
from cytosae_cache.writer import create_store
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_spec, make_store, make_table


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_view_has_the_numbers_of_the_store(tmp_path, compression):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, compression=compression)
    view = store.dask()
    assert view.chunks == ((4, 4, 3), (5,), (8,))
    assert view.dtype == store.dtype
    assert np.array_equal(view.compute(scheduler="threads"), activations)
    mean = view.astype("f8").mean(axis=(0, 1)).compute(scheduler="threads")
    np.testing.assert_allclose(mean, activations.astype("f8").mean(axis=(0, 1)), rtol=1e-12)


def test_a_slice_reads_only_its_shards(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations)
    (store.path / shard_name(2)).unlink()
    assert np.array_equal(store.dask()[:8].compute(scheduler="threads"), activations[:8])


def test_the_view_of_an_empty_store(tmp_path):
    assert make_store(tmp_path / "s.zarr", make_activations(0)).dask().shape == (0, 5, 8)


def test_xarray_is_lazy_labelled_and_checked(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[2])
    data = store.xarray()
    assert data.activations.dims == ("image", "token", "channel")
    assert data.activations.chunks[0] == (4, 4, 3)
    assert data.path.values.tolist() == store.images.path
    kept = data.activations[data.valid.values & (data.label.values == "a")]
    expected = activations[[row for row in range(0, 11, 2) if row != 2]]
    assert np.array_equal(kept.compute().values, expected)
    assert data.attrs["dataset"] == "toy"
    (store.path / shard_name(2)).unlink()
    with pytest.raises(StoreCorruptError, match="is missing"):
        data.activations[9].compute()


def test_without_xarray_the_message_says_what_to_install(tmp_path, monkeypatch):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(StoreError, match=r"pip install 'cytosae-cache\[xarray\]'"):
        store.xarray()


def test_xarray_has_the_further_columns(tmp_path):
    pytest.importorskip("xarray")
    columns = {"x": np.arange(8), "site": np.array(["S"] * 8, dtype=np.dtypes.StringDType()), "label": np.arange(8)}
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4, columns=columns)
    data = fill_store(store, make_activations(8)).xarray()
    assert data.x.values.tolist() == list(range(8))
    assert data.site.values.tolist() == ["S"] * 8
    assert data.label.values.tolist() == store.images.label
