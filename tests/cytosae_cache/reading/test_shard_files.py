"""Shard files are opened and closed as descriptors allow; what is known of them stays, and never misleads."""

import os
import tracemalloc

import numpy as np
import pytest
import zarr

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.shard import MISSING, ShardIndex, shard_name
from cytosae_cache.reading import open_files, shard_files
from cytosae_cache.reading.open_files import OpenFiles
from cytosae_cache.reading.reader import StoreReader
from tests.support.stores import make_activations, make_store, record_opens

CODECS = ["none", "lz4", "zstd"]


@pytest.fixture(autouse=True)
def _one_open_file(monkeypatch):
    """Every file is closed when another one is read."""
    monkeypatch.setattr(open_files, "_of_process", OpenFiles(1))


def count_indexes(monkeypatch) -> list[str]:
    """A list to which every shard is added whose index is read from now on."""
    found = []
    read_index = shard_files.read_index

    def record(file, shard_images, where):
        found.append(where)
        return read_index(file, shard_images, where)

    monkeypatch.setattr(shard_files, "read_index", record)
    return found


@pytest.mark.parametrize("compression", CODECS)
def test_an_index_is_read_once_however_often_its_file_is_opened(tmp_path, monkeypatch, compression):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, compression=compression)
    indexes, opened = count_indexes(monkeypatch), record_opens(store, monkeypatch)
    with StoreReader(store, n_threads=1) as reader:
        for rows in ([0, 4, 8], [10, 5, 1], [3, 7, 9]):
            assert np.array_equal(reader.read(np.array(rows)), activations[rows])
    assert len(indexes) == 3
    assert len(opened) == 7  # the last shard of a call is the first of the next one


@pytest.mark.parametrize("compression", CODECS)
def test_shards_of_zarr_python_with_missing_images_are_opened_again(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2], compression=compression)
    replaced = make_activations(11, seed=1)
    replaced[[2, 9]] = np.nan  # left out of the shards
    zarr.open_group(store.path, mode="r+")["activations"][...] = replaced
    with StoreReader(store, verify=False, n_threads=1) as reader:
        for _ in range(3):
            assert np.array_equal(reader.read(np.arange(11)), replaced, equal_nan=True)


def rewrite(path, data: bytes) -> None:
    """Another file of the same name, with another time of change."""
    before = path.stat()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize("verify", [True, False])
def test_a_shard_that_is_removed_while_it_is_closed_is_missing(tmp_path, verify):
    store = make_store(tmp_path / "s.zarr", make_activations(12))
    with StoreReader(store, n_threads=1, verify=verify) as reader:
        reader.read(np.array([0, 4, 8]))
        for shard in range(2):
            (store.path / shard_name(shard)).unlink()
        folder = (store.path / shard_name(1)).parent
        folder.rmdir()
        folder.write_text("a file in place of the folder")
        for shard in range(2):
            with pytest.raises(StoreCorruptError, match=f"shard file '.*/c/{shard}/0/0' is missing"):
                reader.read(np.array([4 * shard]))
        assert reader.read(np.array([9])).shape == (1, 5, 8)


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize("n_others", [8, 7])
def test_a_shard_that_is_replaced_while_it_is_closed_fails_its_checksums(tmp_path, compression, n_others):
    store = make_store(tmp_path / "s.zarr", make_activations(8), compression=compression)
    other = make_store(tmp_path / "o.zarr", make_activations(n_others, seed=1), compression=compression)
    with StoreReader(store, n_threads=1) as reader:
        reader.read(np.array([4, 0]))
        rewrite(store.path / shard_name(1), (other.path / shard_name(1)).read_bytes())
        with pytest.raises(StoreCorruptError, match="row 5 .* fails its checksum"):
            reader.read(np.array([5]))


@pytest.mark.parametrize("compression", CODECS)
def test_a_shard_that_is_restored_with_the_same_bytes_is_read_on(tmp_path, compression):
    activations = make_activations(8)
    store = make_store(tmp_path / "s.zarr", activations, compression=compression)
    path = store.path / shard_name(1)
    with StoreReader(store, n_threads=1) as reader:
        for _ in range(2):
            assert np.array_equal(reader.read(np.array([4, 0])), activations[[4, 0]])
            rewrite(path, path.read_bytes())


def test_a_shard_that_is_replaced_is_refused_where_no_checksum_would_tell(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(8))
    with StoreReader(store, n_threads=1, verify=False) as reader:
        reader.read(np.array([4, 0]))
        rewrite(store.path / shard_name(1), bytes((store.path / shard_name(1)).stat().st_size))
        with pytest.raises(
            StoreCorruptError,
            match=r"c/1/0/0' was changed or replaced .*: cytosae-cache verify .*s.zarr; then run the command again",
        ):
            reader.read(np.array([5]))


def test_a_shard_that_becomes_a_link_out_of_the_store_is_refused(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(8))
    path = store.path / shard_name(1)
    with StoreReader(store, n_threads=1) as reader:
        reader.read(np.array([4, 0]))
        path.rename(tmp_path / "outside")
        path.symlink_to(tmp_path / "outside")
        with pytest.raises(StoreCorruptError, match="leads out of the store; it is not followed"):
            reader.read(np.array([5]))


@pytest.mark.parametrize(("kind", "most"), [("plain", 0), ("contiguous", 4), ("in any order", 16)])
def test_what_is_kept_of_an_index_takes_few_bytes_per_image(kind, most):
    n, size = 1000, 100
    lengths = np.full(n, size, dtype=np.uint64)
    if kind == "contiguous":
        lengths += np.arange(n, dtype=np.uint64) % 7
    offsets = np.cumsum(lengths, dtype=np.uint64) - lengths
    table = np.stack([offsets, lengths], axis=1)
    if kind == "in any order":
        table = table[::-1].copy()
        table[5] = MISSING
    index = ShardIndex(table, size if kind == "plain" else None)
    assert index.is_plain == (kind == "plain")
    if not index.is_plain:
        expected = [None if row[0] == MISSING else tuple(row) for row in table.tolist()]
        assert [index.find(image) for image in range(n)] == expected
    tracemalloc.start()
    try:
        kept = [ShardIndex(table, size if kind == "plain" else None) for _ in range(20)]
        per_shard = tracemalloc.get_traced_memory()[0] / len(kept)
    finally:
        tracemalloc.stop()
    assert per_shard < most * n + 300


def test_indexes_beyond_4_gb_are_exact():
    lengths = np.array([3 << 30, 5, 2 << 30], dtype=np.uint64)
    offsets = np.cumsum(lengths, dtype=np.uint64) - lengths
    index = ShardIndex(np.stack([offsets, lengths], axis=1), None)
    assert [index.find(image) for image in range(3)] == [(0, 3 << 30), (3 << 30, 5), ((3 << 30) + 5, 2 << 30)]
