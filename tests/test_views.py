"""The dask view is lazy, one task a shard, and gives the same numbers."""

import numpy as np
import pytest

from cytosae_cache.shard import shard_path
from tests.stores import make_activations, make_store


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_view_holds_the_stores_numbers(tmp_path, compression):
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
    shard_path(store.path / "activations", 2).unlink()
    assert np.array_equal(store.dask()[:8].compute(scheduler="threads"), activations[:8])


def test_an_empty_store(tmp_path):
    assert make_store(tmp_path / "s.zarr", make_activations(0)).dask().shape == (0, 5, 8)
