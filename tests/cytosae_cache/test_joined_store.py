"""Stores that are joined behave like one store of all images."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
import torch

import cytosae_cache
from cytosae_cache import JoinedStore, join_stores
from cytosae_cache.creation import create_store
from cytosae_cache.errors import ChecksumError, StoreError, StoreIncompleteError, StoreMismatchError
from cytosae_cache.format.shard import shard_name
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import iter_row_blocks
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.torch_views import StoreBatches, StoreImages
from tests.support.stores import PROVENANCE, make_activations, make_spec, make_store, make_table


def named(dataset):
    return dataclasses.replace(PROVENANCE, dataset=dataset, list_digest=dataset[0] * 64)


@pytest.fixture
def parts(tmp_path):
    """Stores of 11, 6 and 9 images, with other sizes of shards and one image each that cannot be read."""
    made = []
    for number, (name, n, shard_images, patients) in enumerate(
        [("north", 11, 4, ("n1", "n2")), ("south", 6, 3, ("s1",)), ("west", 9, 5, ("w1", "w2", ""))]
    ):
        made.append(
            make_store(
                tmp_path / f"{name}.zarr", make_activations(n, seed=number), table=make_table(n, patients=patients),
                shard_images=shard_images, invalid=[2], provenance=named(name),
            )
        )  # fmt: skip
    return made


def all_of(parts):
    return np.concatenate([part[:] for part in parts])


def test_activations_are_those_of_the_parts(parts):
    joined, expected = JoinedStore(parts), all_of(parts)
    assert len(joined) == 26
    assert np.array_equal(joined[:], expected, equal_nan=True)
    rows = np.random.default_rng(0).permutation(26)
    assert np.array_equal(joined[rows], expected[rows], equal_nan=True)
    assert np.array_equal(joined[-1], expected[-1])
    assert joined[[]].shape == (0, 5, 8)
    joined.close()
    assert np.array_equal(joined[12], expected[12])


@pytest.mark.parametrize(
    "rows",
    [
        25, -26, np.int64(12), slice(3, 20), slice(None, None, -1), slice(20, 3, -3), slice(5, 5), slice(-3, None),
        [1, -1], np.array([3, 25, 11]), np.arange(26) % 3 == 0, np.zeros(26, bool), np.uint8([9, 12]),
    ],
)  # fmt: skip
def test_rows_are_chosen_as_of_an_array(parts, rows):
    assert np.array_equal(JoinedStore(parts)[rows], all_of(parts)[rows], equal_nan=True)


@pytest.mark.parametrize("rows", [26, -27, [0, 26], np.ones(25, bool), [1.0]])
def test_rows_that_are_not_there_are_refused(parts, rows):
    with pytest.raises(IndexError):
        JoinedStore(parts)[rows]


def test_shards_cover_the_rows_and_none_crosses_a_part(parts):
    joined = JoinedStore(parts)
    ranges = [joined.shard_rows(shard) for shard in range(joined.n_shards)]
    assert [len(rows) for rows in ranges] == [4, 4, 3, 3, 3, 5, 4]
    assert [row for rows in ranges for row in rows] == [*range(26)]
    assert joined.shard_starts.tolist() == [rows.start for rows in ranges]


def test_tables_are_joined(parts):
    joined = JoinedStore(parts)
    assert joined.names == ("north", "south", "west")
    assert joined.images.path[0] == "north/img_0000.png"
    assert joined.images.path[25] == "west/img_0008.png"
    assert [*joined.images.label] == [name for part in parts for name in part.images.label]
    assert [*joined.images.patient] == [name for part in parts for name in part.images.patient]
    assert joined.images.take(np.array([25, 0])).path == ["west/img_0008.png", "north/img_0000.png"]
    assert joined.valid.tolist() == [flag for part in parts for flag in part.valid.tolist()]
    assert [*joined.image_columns["dataset"]] == ["north"] * 11 + ["south"] * 6 + ["west"] * 9
    assert np.array_equal(
        joined.column("images/sha256"), np.concatenate([part.column("images/sha256") for part in parts])
    )
    assert joined.moments.count.sum() == 23 * 5
    whole = all_of(parts)[joined.valid].astype("f8")
    np.testing.assert_allclose(joined.moments.sum.sum(axis=0), whole.sum(axis=(0, 1)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(joined.moments.sum_sq.sum(axis=0), (whole**2).sum(axis=(0, 1)), rtol=1e-12)


def test_who_it_is(parts):
    joined = JoinedStore(parts)
    assert joined.provenance.dataset == "north+south+west"
    assert joined.spec == parts[0].spec
    assert joined.complete
    others = [
        JoinedStore(parts[:2]),
        JoinedStore([parts[1], parts[0], parts[2]]),
        JoinedStore(parts, joined_patients="separate"),
    ]  # fmt: skip
    assert len({store.contents for store in (joined, *others)}) == 4
    assert len({store.provenance.list_digest for store in (joined, *others)}) == 4
    assert JoinedStore(parts).contents == joined.contents
    assert "north+south+west" in repr(joined)
    assert "26 images" in joined._repr_html_()


def test_it_travels_to_other_processes_as_the_places_of_its_parts(parts):
    joined = pickle.loads(pickle.dumps(JoinedStore(parts, joined_patients="separate")))
    assert joined.joined_patients == "separate"
    assert joined.contents == JoinedStore(parts, joined_patients="separate").contents
    assert joined.images.patient[0] == "north/n1"


@pytest.mark.parametrize(
    ("patients", "names"),
    [("same", ["p", "q", "p", "p", ""]), ("separate", ["north/p", "north/q", "north/p", "south/p", ""])],
)
def test_patients_of_the_same_name(tmp_path, patients, names):
    north = make_store(
        tmp_path / "n.zarr", make_activations(3), table=make_table(3, patients=("p", "q")), provenance=named("north")
    )
    south = make_store(
        tmp_path / "s.zarr", make_activations(2), table=make_table(2, patients=("p", "")), provenance=named("south")
    )
    with pytest.raises(
        StoreMismatchError, match=r"1 name of patients stands in several .* 'north', 'south': 'p'\. Say"
    ):
        JoinedStore([north, south])
    assert [*JoinedStore([north, south], joined_patients=patients).images.patient] == names


def test_many_patients_of_the_same_name_are_not_all_listed(tmp_path):
    table = make_table(5, patients=("a", "b", "c", "d", "e"))
    parts = [
        make_store(tmp_path / f"{name}.zarr", make_activations(5), table=table, provenance=named(name))
        for name in ("north", "south")
    ]
    with pytest.raises(StoreMismatchError, match=r"5 names of patients stand in .*: 'a', 'b', 'c' and 2 more\. Say"):
        JoinedStore(parts)


def with_columns(place, name, **columns):
    n = len(next(iter(columns.values())))
    return make_store(
        place / f"{name}.zarr", make_activations(n), provenance=named(name), columns=columns,
        table=make_table(n, patients=(name,)),
    )  # fmt: skip


def test_columns_take_a_type_that_holds_those_of_all_parts(tmp_path):
    texts = np.dtypes.StringDType()
    north = with_columns(
        tmp_path, "north", age=np.array([30, 40]), x=np.array([1, 2]), scanner=np.array([1, 2]),
        score=np.array([0.5, np.nan]), stain=np.array(["a", "b"], dtype=texts),
    )  # fmt: skip
    south = with_columns(
        tmp_path, "south", age=np.array([50, 60]), x=np.array([0.5, np.nan]),
        scanner=np.array(["A", ""], dtype=texts), only=np.array([7, 8]),
    )  # fmt: skip
    columns = JoinedStore([north, south]).image_columns
    assert [*columns] == ["dataset", "age", "x", "scanner", "score", "stain", "only"]
    assert columns["age"].dtype == np.int64
    assert columns["age"].tolist() == [30, 40, 50, 60]
    assert np.array_equal(columns["x"], [1, 2, 0.5, np.nan], equal_nan=True)
    assert columns["scanner"].tolist() == ["1", "2", "A", ""]
    assert np.array_equal(columns["score"], [0.5, np.nan, np.nan, np.nan], equal_nan=True)
    assert columns["stain"].tolist() == ["a", "b", "", ""]
    assert np.array_equal(columns["only"], [np.nan, np.nan, 7, 8], equal_nan=True)


def test_a_column_of_that_name_stays_as_it_is(tmp_path):
    north = with_columns(tmp_path, "north", dataset=np.array([1, 2]), joined_dataset=np.array([3, 4]))
    south = with_columns(tmp_path, "south", age=np.array([5]))
    joined = JoinedStore([north, south])
    assert joined.dataset_column == "joined_joined_dataset"
    assert [*joined.image_columns[joined.dataset_column]] == ["north", "north", "south"]
    assert np.array_equal(joined.image_columns["dataset"], [1, 2, np.nan], equal_nan=True)


def test_views_show_all_parts(parts):
    joined, expected = JoinedStore(parts), all_of(parts).astype("f4")
    assert np.array_equal(joined.dask().compute(scheduler="threads"), expected, equal_nan=True)
    labelled = joined.xarray()
    assert np.array_equal(labelled.activations.to_numpy(), expected, equal_nan=True)
    assert labelled.path.to_numpy()[-1] == "west/img_0008.png"
    assert labelled.dataset.to_numpy()[11] == "south"


def test_data_sets_of_torch_are_those_of_several_stores(parts):
    joined, places = JoinedStore(parts), [part.path for part in parts]
    images = joined.torch_images()
    assert images.rows.tolist() == np.flatnonzero(joined.valid).tolist()
    expected = torch.from_numpy(all_of(parts)[joined.valid]).float()
    assert torch.equal(torch.stack(images.__getitems__([*range(len(images))])), expected)
    assert torch.equal(StoreImages(places)[22], expected[22])
    batches = [*joined.torch_batches(batch_size=4, seed=3, with_rows=True)]
    others = [*StoreBatches(places, batch_size=4, seed=3, with_rows=True)]
    for (rows, batch), (other_rows, other) in zip(batches, others, strict=True):
        assert torch.equal(rows, other_rows)
        assert torch.equal(batch, other)
    assert sorted(int(row) for rows, _ in batches for row in rows) == images.rows.tolist()


def test_a_reader_serves_blocks_and_orders_over_all_parts(parts):
    joined, expected = JoinedStore(parts), all_of(parts)
    with joined.open_reader(n_threads=2) as reader:
        blocks = [(block.first, block.activations.copy()) for block in iter_row_blocks(reader, block_rows=7)]
        assert [first for first, _ in blocks] == [0, 7, 14, 21]
        found = np.concatenate([values for _, values in blocks])
        assert np.array_equal(found[joined.valid], expected[joined.valid])
        one = ConcatReader([reader])
        with StoreReader(parts[0]) as a, StoreReader(parts[1]) as b, StoreReader(parts[2]) as c:
            several = ConcatReader([a, b, c])
            assert np.array_equal(one.rows, several.rows)
            assert np.array_equal(one.layout.shard_bounds, several.layout.shard_bounds)
            assert np.array_equal(one.read_all(), several.read_all())


def test_a_reader_refuses_what_does_not_fit(parts):
    joined = JoinedStore(parts)
    with joined.open_reader() as reader:
        with pytest.raises(ValueError, match=r"rows must lie in 0\.\.25, found 3\.\.26"):
            reader.read(np.array([3, 26]))
        with pytest.raises(ValueError, match=r"out must be C-contiguous float16 of shape \(1, 5, 8\)"):
            reader.read_rows(np.array([0]), aligned_buffer((1, 5, 8), np.dtype("f4")))


def test_a_damaged_image_is_refused_whatever_part_it_is_in(parts):
    path = parts[1].path / shard_name(1)
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    joined = JoinedStore(parts)
    with joined.open_reader() as reader, pytest.raises(ChecksumError, match=r"row 3 .*south\.zarr"):
        reader.read(np.arange(26))
    with joined.open_reader(verify=False) as reader:
        assert reader.read(np.arange(26)).shape == (26, 5, 8)


def test_int8_stores_are_decoded_each_with_its_own_channels(tmp_path):
    spec = make_spec(d_model=16, store_dtype="int8")
    values = np.random.default_rng(0).normal(size=(4, *spec.image_shape)).astype("<f2")
    first, second = (
        make_store(
            tmp_path / f"{name}.zarr",
            values * scale,
            spec=spec,
            provenance=named(name),
            table=make_table(4, patients=(name,)),
        )
        for name, scale in (("a", 1), ("b", 8))
    )
    assert not np.allclose(first.channels.std, second.channels.std)
    joined = JoinedStore([first, second])
    assert np.array_equal(joined[:], all_of([first, second]))


def test_what_cannot_be_joined_is_refused(parts, tmp_path):
    north, south, _ = parts
    with pytest.raises(StoreError, match="joining takes at least 2 stores, found 1"):
        JoinedStore([north])
    with pytest.raises(StoreMismatchError, match=r"north\.zarr' was given twice"):
        JoinedStore([north, cytosae_cache.open(north.path)])
    again = make_store(tmp_path / "again.zarr", make_activations(3), provenance=named("north"))
    with pytest.raises(StoreMismatchError, match="are stores of data sets of the same name, 'north'"):
        JoinedStore([north, south, again])
    spec = make_spec(block=1)
    other = make_store(tmp_path / "o.zarr", make_activations(3, spec), spec=spec, provenance=named("other"))
    with pytest.raises(StoreMismatchError, match="cannot be streamed as one: block"):
        JoinedStore([north, other])
    unfinished = create_store(tmp_path / "u.zarr", make_spec(), make_table(4), named("unfinished"), shard_images=2)
    with pytest.raises(StoreIncompleteError, match="is unfinished"):
        JoinedStore([north, unfinished])


def test_one_place_is_no_list_of_stores(parts):
    for place in (parts[0].path, str(parts[0].path), parts[0]):
        for join in (JoinedStore, join_stores):
            with pytest.raises(TypeError, match=r"must be a list of stores or places, found '.*north\.zarr' alone"):
                join(place)


def test_what_patients_mean_is_one_of_two_words(parts):
    with pytest.raises(ValueError, match=r"joined_patients must be 'same', 'separate' or None, found 'both'"):
        JoinedStore(parts, joined_patients="both")


def test_what_was_stated_about_patients_is_not_lost_by_joining_further(parts):
    first = JoinedStore(parts[:2], joined_patients="separate")
    for stated in (None, "same"):
        with pytest.raises(StoreMismatchError, match=f"with joined_patients 'separate', found {stated!r}: state the "):
            JoinedStore([first, parts[2]], joined_patients=stated)
    both = JoinedStore([first, parts[2]], joined_patients="separate")
    assert both.contents == JoinedStore(parts, joined_patients="separate").contents


def test_what_only_parts_have_is_asked_of_them(parts):
    joined = JoinedStore(parts)
    assert joined.parts == tuple(parts)
    with pytest.raises(StoreError, match=r"are several stores that are read as one: they have no Zarr array"):
        joined.zarr_array()
    with pytest.raises(StoreError, match=r"they have no array 'channels/mean'\. Ask one of \.parts"):
        joined.column("channels/mean")
    with pytest.raises(StoreError, match=r"found where the place of one is expected\. Name their data sets instead"):
        os.fspath(joined)
    with pytest.raises(StoreError, match="found where the place of one is expected"):
        joined.read_file("zarr.json")


def test_one_store_stays_as_it_is_and_joined_ones_can_be_joined_further(parts):
    assert join_stores([parts[0]]) is parts[0]
    assert join_stores([parts[0].path]).path == parts[0].path
    assert parts[0].parts == (parts[0],)
    assert join_stores([join_stores(parts[:2]), parts[2]]).contents == JoinedStore(parts).contents
