"""Views for other tools are lazy, one task per shard, and give the same numbers."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from cytosae_cache import views as views_module
from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreCorruptError, StoreError, StoreMismatchError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from tests.support.stores import (
    PROVENANCE,
    fill_store,
    make_activations,
    make_int8_store,
    make_spec,
    make_store,
    make_table,
)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_view_has_the_numbers_of_the_store(tmp_path, compression):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, compression=compression)
    view = store.dask()
    assert view.chunks == ((4, 4, 3), (5,), (8,))
    assert view.dtype == np.float32
    assert np.array_equal(view.compute(scheduler="threads"), activations)
    mean = view.astype("f8").mean(axis=(0, 1)).compute(scheduler="threads")
    np.testing.assert_allclose(mean, activations.astype("f8").mean(axis=(0, 1)), rtol=1e-12)


@pytest.mark.parametrize("kind", ["float16", "int8", "float32"])
def test_reductions_are_those_of_the_numbers_and_not_of_float16(tmp_path, kind):
    spec = make_spec(d_model=64, grid=(8, 16), store_dtype=kind)
    values = (200 + np.random.default_rng(0).normal(size=(12, *spec.image_shape))).astype(spec.value_dtype)
    store = make_store(tmp_path / "s.zarr", values, spec=spec)
    true = store[:].astype("f8")
    # The sum of one shard is beyond float16's largest number, 65,504.
    assert true[:4].sum() > 65_504
    view, labelled = store.dask(), store.xarray().activations
    assert view.dtype == labelled.dtype == view[:1].compute().dtype == np.float32
    for found, expected in (
        (view.mean(), true.mean()),
        (view.std(), true.std()),
        (view.sum(), true.sum()),
        (view.mean(axis=(0, 1)), true.mean(axis=(0, 1))),
        (labelled.mean(("image", "token")), true.mean(axis=(0, 1))),
    ):
        np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-5)


def test_a_slice_reads_only_its_shards(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations)
    (store.path / shard_name(2)).unlink()
    assert np.array_equal(store.dask()[:8].compute(scheduler="threads"), activations[:8])


def _count_opened(monkeypatch) -> list[str]:
    opened: list[str] = []
    init = StoreLayout.__init__

    def record(self, location):
        opened.append(str(location))
        init(self, location)

    monkeypatch.setattr(StoreLayout, "__init__", record)
    return opened


def test_tasks_open_the_store_once(tmp_path, monkeypatch):
    activations = make_activations(40)
    view = make_store(tmp_path / "s.zarr", activations, shard_images=1).dask()
    opened = _count_opened(monkeypatch)
    for _ in range(2):
        assert np.array_equal(view.compute(scheduler="threads", num_workers=4), activations)
    assert opened == [str(tmp_path / "s.zarr")]


def test_a_view_is_read_from_another_working_directory(tmp_path, monkeypatch):
    activations = make_activations(11)
    make_store(tmp_path / "s.zarr", activations)
    monkeypatch.chdir(tmp_path)
    store = ActivationStore.open("s.zarr")
    view, pickled = store.dask(), pickle.dumps(store)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert np.array_equal(view.compute(scheduler="processes", num_workers=1), activations)
    assert np.array_equal(pickle.loads(pickled)[:], activations)


def test_a_view_of_a_store_that_was_built_again_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11))
    views = [store.dask(), store.dask()]
    assert np.array_equal(views[0].compute(scheduler="threads"), make_activations(11))
    store.storage.delete()
    other = make_store(tmp_path / "s.zarr", make_activations(11, seed=1))
    assert np.array_equal(other.dask().compute(scheduler="threads"), make_activations(11, seed=1))
    views_module._start_afresh()
    with pytest.raises(StoreMismatchError, match="built again meanwhile. Open it again and make a new view"):
        views[1].compute(scheduler="threads")


def test_tasks_keep_few_stores_open(tmp_path):
    for number in range(views_module._MOST_STORES + 2):
        store = make_store(tmp_path / f"{number}.zarr", make_activations(3, seed=number))
        assert np.array_equal(store.dask().compute(scheduler="threads"), make_activations(3, seed=number))
    assert len(views_module._stores._stores) == views_module._MOST_STORES


def test_the_view_of_an_empty_store(tmp_path):
    view = make_store(tmp_path / "s.zarr", make_activations(0)).dask()
    assert (view.shape, view.dtype) == ((0, 5, 8), np.float32)


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
    with pytest.raises(StoreError, match=r"pip install '\.\[xarray\]'"):
        store.xarray()


def test_xarray_has_the_further_columns(tmp_path):
    pytest.importorskip("xarray")
    columns = {"x": np.arange(8), "site": np.array(["S"] * 8, dtype=np.dtypes.StringDType()), "label": np.arange(8)}
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4, columns=columns)
    data = fill_store(store, make_activations(8)).xarray()
    assert data.x.values.tolist() == list(range(8))
    assert data.site.values.tolist() == ["S"] * 8
    assert data.label.values.tolist() == store.images.label


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_xarray_opens_the_files_by_itself(tmp_path, kind):
    xarray = pytest.importorskip("xarray")
    path = tmp_path / "s.zarr"
    store = make_store(path, make_activations(11), invalid=[2]) if kind == "float16" else make_int8_store(path)[1]
    options = {"consolidated": False, "chunks": {}}
    tree = xarray.open_datatree(path, engine="zarr", **options)
    assert tree["images/sha256"].sizes == {"image": 11, "byte": 32}
    assert tree["moments/sum"].sizes == {"shard": 3, "channel": store.d_model}
    assert tree["activations"].dims == ("image", "token", "channel" if kind == "float16" else "record")
    images = xarray.open_zarr(path, group="images", consolidated=False)
    assert images.path.values.tolist() == store.images.path
    assert np.array_equal(images.valid.values, store.valid)


def test_a_store_without_names_of_dimensions_is_read():
    (path,) = (Path(__file__).parents[1] / "data" / "format1" / "out" / "activations" / "cells").glob("*.zarr")
    assert "dimension_names" not in json.loads((path / "images" / "label" / "zarr.json").read_bytes())
    store = ActivationStore.open(path)
    assert store.xarray().label.values.tolist() == store.images.label
