"""Columns of texts behave like lists and take a fraction of their memory."""

import tracemalloc

import numpy as np
import pytest
import zarr

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.texts import Names, Texts, to_texts
from cytosae_cache.store import ActivationStore
from tests.support.stores import make_activations, make_hollow_store, make_store, seal

VALUES = ["a", "", "ä" * 40, "a", "b\nc", "", "a"]


@pytest.mark.parametrize("make", [lambda: Texts(to_texts(VALUES)), lambda: Names.of(Texts(to_texts(VALUES)))])
def test_a_column_behaves_like_the_list(make):
    column = make()
    assert len(column) == 7
    assert (column == VALUES, VALUES == column, column == make()) == (True, True, True)
    assert (column == VALUES[:-1], column == [*VALUES[:-1], "x"], column == "a") == (False, False, False)
    assert column != ["x"]
    assert [column[at] for at in (0, -1, np.int64(4))] == ["a", "a", "b\nc"]
    assert all(type(text) is str for text in [column[2], *column, *column[1:3]])
    assert column[1:3] == VALUES[1:3]
    assert list(column) == VALUES
    assert set(column) == set(VALUES)
    assert "b\nc" in column
    assert column.index("b\nc") == 4
    assert list(column.take(np.array([4, 0]))) == ["b\nc", "a"]
    assert np.array(column).tolist() == VALUES
    assert np.array(column, dtype=object).tolist() == VALUES
    assert repr(column).endswith("... 7 in all>")
    with pytest.raises(IndexError):
        column[7]
    assert (list(make().take(np.array([], dtype=int))), len(make().take(np.array([], dtype=int)))) == ([], 0)


def test_a_table_of_a_store_equals_the_one_that_it_was_made_from(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    images = store.images
    assert images == ImageTable(*map(list, images))
    assert images.take(np.array([3, 1])) == ImageTable(*([column[3], column[1]] for column in images))


def test_the_names_of_many_images_take_few_bytes_each(tmp_path):
    n = 50_000
    path = make_hollow_store(tmp_path / "s.zarr", n, shard_images=1000).path
    tracemalloc.start()
    try:
        images = ActivationStore.open(path).images
        per_image = tracemalloc.get_traced_memory()[0] / n
    finally:
        tracemalloc.stop()
    assert len(set(images.patient)) == 3
    assert per_image < 40


def test_a_table_of_numbers_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    group = zarr.open_group(store.path, mode="r+")
    del group["images/label"]
    group.create_array("images/label", data=np.arange(6))
    seal(store)
    with pytest.raises(StoreCorruptError, match=r"must be texts, one for each image, found .*, int64 \(6,\), "):
        _ = ActivationStore.open(store.path).images
