"""Readers return exactly what was written, by our writer or by zarr-python, and never a damaged image."""

import gc
import os

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.codec import make_codec
from cytosae_cache.format.shard import as_bytes, make_index, shard_name
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.reading.shard_files import ShardFiles
from cytosae_cache.storage.local import is_aligned
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.stores import make_activations, make_int8_store, make_spec, make_store, seal

CODECS = ["none", "lz4", "zstd"]


@pytest.mark.parametrize("compression", CODECS)
@pytest.mark.parametrize(("n", "shard_images"), [(1, 1), (1, 5), (4, 5), (5, 5), (6, 5), (11, 4), (3, 1)])
def test_round_trip_at_odd_sizes(tmp_path, n, shard_images, compression):
    activations = make_activations(n)
    invalid = [1] if n > 2 else []
    activations[invalid] = np.nan
    store = make_store(
        tmp_path / "s.zarr", activations, shard_images=shard_images, invalid=invalid, compression=compression
    )
    with StoreReader(store) as reader:
        assert np.array_equal(reader.read(np.arange(n)), activations, equal_nan=True)
    assert np.array_equal(zarr.open_group(store.path, mode="r")["activations"][...], activations, equal_nan=True)
    assert store.valid_rows.tolist() == [row for row in range(n) if row not in invalid]


@pytest.mark.parametrize(("verify", "direct", "n_images"), [(True, False, 2), (False, False, 5), (True, True, 5)])
def test_images_whose_checksums_follow_are_read_few_at_a_time(tmp_path, monkeypatch, verify, direct, n_images):
    activations = make_activations(10)
    store = make_store(tmp_path / "s.zarr", activations, shard_images=5)
    monkeypatch.setattr("cytosae_cache.reading.reader._CHECKED_BYTES", 2 * store.spec.record_bytes + 1)
    read, sizes = ShardFiles.read, []

    def record(self, shard, first, target):
        sizes.append(len(target))
        return read(self, shard, first, target)

    monkeypatch.setattr(ShardFiles, "read", record)
    with StoreReader(store, verify=verify, direct=direct) as reader:
        assert np.array_equal(reader.read(np.arange(10)), activations)
    assert (sum(sizes), max(sizes)) == (10, n_images)


def test_an_empty_store_round_trips(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(0))
    assert store.complete
    assert store.n_shards == 0
    with StoreReader(store) as reader:
        assert reader.read(np.arange(0)).shape == (0, 5, 8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 13), st.integers(1, 6), st.lists(st.integers(0, 12), max_size=20), st.integers(1, 3))
def test_any_rows_in_any_order(tmp_path_factory, n, shard_images, rows, n_threads):
    activations = make_activations(n)
    store = make_store(tmp_path_factory.mktemp("s") / "s.zarr", activations, shard_images=shard_images)
    rows = np.array([row % n for row in rows], dtype=np.int64)
    with StoreReader(store, n_threads=n_threads) as reader:
        assert np.array_equal(reader.read(rows), activations[rows])


@pytest.mark.parametrize("compression", CODECS)
def test_images_written_by_zarr_python_are_read_by_us(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2], compression=compression)
    array = zarr.open_group(store.path, mode="r+")["activations"]
    replaced = make_activations(11, seed=1)
    replaced[2] = np.nan  # zarr-python leaves it out of the shard, so the images are no longer contiguous
    array[...] = replaced
    with StoreReader(store, verify=False) as reader:
        assert np.array_equal(reader.read(np.arange(11)), replaced, equal_nan=True)


@pytest.mark.parametrize("compression", CODECS)
def test_int8_stores_halve_the_bytes_and_keep_the_numbers(tmp_path, compression):
    activations, store = make_int8_store(tmp_path / "s.zarr", invalid=[2, 7], compression=compression)
    found = store[:]
    assert found.dtype == np.float16
    assert np.isnan(found[[2, 7]]).all()
    kept = store.valid_rows
    error = found[kept].astype(np.float64) - activations[kept].astype(np.float64)
    assert np.sqrt((error**2).mean()) < 0.01
    assert np.array_equal(store[[9, 0]], found[[9, 0]])
    assert verify_store(store).sound
    if compression == "none":
        assert (store.path / shard_name(0)).stat().st_size == 4 * 5 * (16 + 4) + 4 * 16 + 4
    total = found[kept].astype(np.float64).reshape(-1, 16).sum(axis=0)
    np.testing.assert_allclose(store.moments.sum.sum(axis=0), total, rtol=1e-12)


def test_codes_are_documented_well_enough_to_decode_them_without_us(tmp_path):
    _, store = make_int8_store(tmp_path / "s.zarr", invalid=[3])
    group = zarr.open_group(store.path, mode="r")
    records = group["activations"][...]
    codes, scales = records[..., :16], np.ascontiguousarray(records[..., 16:]).view("<f4")
    values = group["channels/mean"][...] + group["channels/std"][...] * (scales * codes)
    assert np.array_equal(values.astype(np.float16), store[:], equal_nan=True)


def test_an_int8_store_without_a_readable_image_in_its_first_shard(tmp_path):
    activations, store = make_int8_store(tmp_path / "s.zarr", invalid=[0, 1, 2, 3])
    assert np.isnan(store[:4]).all()
    np.testing.assert_allclose(store[4:], activations[4:], atol=0.05)
    assert verify_store(store).sound


@pytest.mark.parametrize("d_model", [256, 8])
def test_bypassing_the_page_cache_gives_the_same_numbers(tmp_path, d_model):
    # Images of 5 x 256 float16 have 2,560 bytes: aligned, like those of ViT-B. 5 x 8 are not, and go through the cache.
    activations = make_activations(40, make_spec(d_model=d_model))
    store = make_store(tmp_path / "s.zarr", activations, shard_images=9)
    rows = np.random.default_rng(0).integers(0, 40, size=64)
    with StoreReader(store, direct=True) as reader:
        buffer = aligned_buffer((64, 5, d_model), store.dtype)
        assert is_aligned(as_bytes(buffer)[:512])
        assert is_aligned(as_bytes(buffer[1])) == (d_model == 256)
        reader.read_rows(rows, buffer)
        assert np.array_equal(buffer, activations[rows])
        anywhere = np.empty(buffer.nbytes + 2, dtype=np.uint8)[2:].view(np.float16).reshape(buffer.shape)
        reader.read_rows(rows, anywhere)
        assert np.array_equal(anywhere, activations[rows])


def test_a_truncated_file_is_found_when_the_page_cache_is_bypassed(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(8, make_spec(d_model=256)), shard_images=8)
    with StoreReader(store, direct=True) as reader:
        reader.read(np.array([0]))
        os.truncate(store.path / shard_name(0), 3 * store.image_bytes + 100)
        with pytest.raises(StoreCorruptError, match="ends before byte .* it was truncated"):
            reader.read(np.array([3]))


@pytest.mark.parametrize("damage", ["bytes", "size"])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_images_that_cannot_be_decoded_are_an_error(tmp_path, compression, damage):
    store = make_store(tmp_path / "s.zarr", make_activations(4), compression=compression)
    codec = make_codec(compression, 2)
    encoded = [b"\xff" * 30 if damage == "bytes" else codec.encode(np.zeros(400, dtype=np.float16))] * 4
    store.storage.write(shard_name(0), [*encoded, make_index([len(image) for image in encoded], 4)])
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="image 1 of shard .* cannot be decoded"):
        reader.read(np.array([1]))


def test_rows_and_buffers_are_checked(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    with StoreReader(store) as reader:
        with pytest.raises(ValueError, match=r"rows must lie in 0\.\.2"):
            reader.read(np.array([3]))
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            reader.read_rows(np.array([0]), np.empty((1, 5, 8), dtype=np.float32))


def test_a_damaged_image_is_never_served(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / shard_name(0)
    data = bytearray(path.read_bytes())
    data[3 * store.image_bytes + 7] ^= 1
    path.write_bytes(data)
    with StoreReader(store) as reader:
        assert len(reader.read(np.array([0, 1, 2]))) == 3
        with pytest.raises(
            StoreCorruptError, match=r"row 3 \('img_0003.png'\).*fails its checksum.*cytosae-cache verify"
        ):
            reader.read(np.array([3]))
    with StoreReader(store, verify=False) as reader:
        assert len(reader.read(np.array([3]))) == 1


@pytest.mark.parametrize("damage", ["missing", "short", "index"])
def test_a_damaged_shard_file_is_an_error(tmp_path, damage):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / shard_name(1)
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:20])
    else:
        data[-10] ^= 1
        path.write_bytes(data)
    message = {"missing": "is missing", "short": "too few for its index", "index": "index .* fails its checksum"}
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match=message[damage]):
        reader.read(np.array([4]))


def test_a_link_that_leads_out_of_the_store_is_not_followed(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    outside = tmp_path / "outside"
    path = store.path / shard_name(0)
    path.rename(outside)
    path.symlink_to(outside)
    with (
        StoreReader(store) as reader,
        pytest.raises(StoreCorruptError, match="leads out of the store; it is not followed"),
    ):
        reader.read(np.array([0]))
    assert not verify_store(store).sound


def test_a_reader_that_nothing_refers_to_closes_its_files(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6), shard_images=1)
    before = len(os.listdir("/proc/self/fd"))
    reader = StoreReader(store)
    reader.read(np.arange(6))
    assert len(os.listdir("/proc/self/fd")) > before
    del reader
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize("name", ["crc32c", "valid"])
def test_a_table_with_too_few_rows_is_refused_before_anything_is_read(tmp_path, name):
    store = make_store(tmp_path / "s.zarr", make_activations(6), shard_images=2)
    values = store.column(f"images/{name}")[:3]  # as many as there are shards
    group = zarr.open_group(store.path, mode="r+")
    del group[f"images/{name}"]
    group.create_array(f"images/{name}", data=values)
    seal(store)
    with pytest.raises(StoreCorruptError, match=rf"'images/{name}' .* has shape \(3,\)"):
        ConcatReader([StoreReader(ActivationStore.open(store.path))])
