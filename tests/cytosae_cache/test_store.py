"""Stores round-trip, are what zarr-python thinks they are, and go on after every interruption."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae_cache.errors import (
    NotFiniteError,
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from cytosae_cache.format.codec import make_codec, make_compressors
from cytosae_cache.format.metadata import ATTRIBUTES_KEY
from cytosae_cache.format.moments import widen
from cytosae_cache.format.shard import as_bytes, make_index, shard_name
from cytosae_cache.reading.reader import StoreReader, aligned_buffer
from cytosae_cache.storage.atomic import replacing, write_file
from cytosae_cache.storage.local import is_aligned
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter, create_store
from cytosae_pipeline.building.build import widen_with_torch
from tests.support.stores import (
    PROVENANCE,
    fill_store,
    make_activations,
    make_shard,
    make_spec,
    make_store,
    make_table,
    seal,
)

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


def _int8_store(path, n=11, *, invalid=(), compression="none", shard_images=4):
    spec = make_spec(d_model=16, store_dtype="int8")
    activations = np.random.default_rng(0).normal(size=(n, *spec.image_shape)).astype(np.float16)
    return activations, make_store(
        path, activations, spec=spec, invalid=invalid, compression=compression, shard_images=shard_images
    )


@pytest.mark.parametrize("compression", CODECS)
def test_int8_stores_halve_the_bytes_and_keep_the_numbers(tmp_path, compression):
    activations, store = _int8_store(tmp_path / "s.zarr", invalid=[2, 7], compression=compression)
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
    _, store = _int8_store(tmp_path / "s.zarr", invalid=[3])
    group = zarr.open_group(store.path, mode="r")
    records = group["activations"][...]
    codes, scales = records[..., :16], np.ascontiguousarray(records[..., 16:]).view("<f4")
    values = group["channels/mean"][...] + group["channels/std"][...] * (scales * codes)
    assert np.array_equal(values.astype(np.float16), store[:], equal_nan=True)


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_an_int8_build_resumes_to_the_same_bytes(tmp_path, n_before):
    activations, whole = _int8_store(tmp_path / "a" / "s.zarr")
    path = tmp_path / "b" / "s.zarr"
    store = create_store(path, whole.spec, make_table(11), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard in range(n_before):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    fill_store(ActivationStore(path), activations)
    assert _snapshot(path) == _snapshot(whole.path)


def test_an_int8_store_without_a_readable_image_in_its_first_shard(tmp_path):
    activations, store = _int8_store(tmp_path / "s.zarr", invalid=[0, 1, 2, 3])
    assert np.isnan(store[:4]).all()
    np.testing.assert_allclose(store[4:], activations[4:], atol=0.05)
    assert verify_store(store).sound


def test_infinity_stops_an_int8_build_and_leaves_it_resumable(tmp_path):
    activations, whole = _int8_store(tmp_path / "a" / "s.zarr")
    path = tmp_path / "b" / "s.zarr"
    store = create_store(path, whole.spec, make_table(11), PROVENANCE, shard_images=4)
    broken = activations.copy()
    broken[1, 0, 0] = np.inf
    with pytest.raises(NotFiniteError, match=r"img_0001\.png.*NaN or infinity"):
        fill_store(store, broken)
    fill_store(ActivationStore(path), activations)
    assert _snapshot(path) == _snapshot(whole.path)


def test_channels_that_cannot_be(tmp_path):
    _, store = _int8_store(tmp_path / "s.zarr")
    zarr.open_group(store.path, mode="r+")["channels/std"][3] = 0
    seal(store)
    with pytest.raises(StoreCorruptError, match="channels of store .* must be 16 finite means and positive deviations"):
        StoreReader(ActivationStore.open(store.path))


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


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("compression", CODECS)
def test_shard_files_are_byte_for_byte_those_of_zarr_python(tmp_path, compression, dtype):
    spec = make_spec(store_dtype=dtype)
    activations = make_activations(11, spec)
    store = make_store(tmp_path / "ours.zarr", activations, compression=compression, spec=spec)
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr",
        shape=activations.shape,
        dtype=dtype,
        shards=(4, 5, 8),
        chunks=(1, 5, 8),
        fill_value=float("nan"),
        filters=None,
        compressors=make_compressors(compression, activations.itemsize),
        zarr_format=3,
        dimension_names=("image", "token", "channel"),
    )
    theirs[...] = activations
    for shard in range(3):
        there = tmp_path / "theirs.zarr" / shard_name(shard).removeprefix("activations/")
        assert (store.path / shard_name(shard)).read_bytes() == there.read_bytes()
    metadata = [
        json.loads((path / "zarr.json").read_text()) for path in (store.path / "activations", theirs.store.root)
    ]
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("compression", CODECS)
def test_images_written_by_zarr_python_are_read_by_us(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2], compression=compression)
    array = zarr.open_group(store.path, mode="r+")["activations"]
    replaced = make_activations(11, seed=1)
    replaced[2] = np.nan  # left out of the shard by zarr-python, so the images are no longer a plain run
    array[...] = replaced
    with StoreReader(store, verify=False) as reader:
        assert np.array_equal(reader.read(np.arange(11)), replaced, equal_nan=True)


def test_both_conversions_to_float64_are_exact():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(64, 1024)
    plain, fast = np.empty(every.shape), np.empty(every.shape)
    widen(plain, every)
    widen_with_torch(fast, every)
    assert np.array_equal(plain, fast, equal_nan=True)
    values = np.random.default_rng(0).normal(size=(7, 50_000)).astype(np.float32)
    plain, fast = np.empty(values.shape), np.empty(values.shape)
    widen(plain, values)
    widen_with_torch(fast, values)
    assert np.array_equal(plain, fast)


@pytest.mark.parametrize("d_model", [256, 8])
def test_reading_past_the_page_cache_gives_the_same_numbers(tmp_path, d_model):
    # 5 x 256 float16 are 2,560 bytes an image: aligned, as ViT-B's; 5 x 8 are not, and go through the cache.
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


def test_a_file_cut_off_is_found_past_the_page_cache_too(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(8, make_spec(d_model=256)), shard_images=8)
    with StoreReader(store, direct=True) as reader:
        reader.read(np.array([0]))
        os.truncate(store.path / shard_name(0), 3 * store.image_bytes + 100)
        with pytest.raises(StoreCorruptError, match="ends before byte .* it was truncated"):
            reader.read(np.array([3]))


@pytest.mark.parametrize("damage", ["bytes", "size"])
@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_images_that_cannot_be_decoded(tmp_path, compression, damage):
    store = make_store(tmp_path / "s.zarr", make_activations(4), compression=compression)
    codec = make_codec(compression, 2)
    encoded = [b"\xff" * 30 if damage == "bytes" else codec.encode(np.zeros(400, dtype=np.float16))] * 4
    store.storage.write(shard_name(0), [*encoded, make_index([len(image) for image in encoded], 4)])
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="image 1 of shard .* cannot be decoded"):
        reader.read(np.array([1]))


def test_image_i_lies_at_byte_i_times_image_bytes(tmp_path):
    activations = make_activations(6)
    store = make_store(tmp_path / "s.zarr", activations)
    data = (store.path / shard_name(1)).read_bytes()
    assert data[store.image_bytes : 2 * store.image_bytes] == activations[5].tobytes()
    assert data[2 * store.image_bytes :] == make_index([store.image_bytes] * 2, 4)


def test_moments_are_exact(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, invalid=[3, 10])
    kept = np.delete(activations.astype(np.float64), [3, 10], axis=0).reshape(-1, 8)
    moments = store.moments
    assert moments.count.sum() == len(kept)
    np.testing.assert_allclose(moments.sum.sum(axis=0), kept.sum(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.sum_sq.sum(axis=0), (kept**2).sum(axis=0), rtol=1e-13)


def test_tables(tmp_path):
    table = make_table(6, labels=("ä", ""), patients=("", "p", "q"))
    store = make_store(tmp_path / "s.zarr", make_activations(6), table=table, invalid=[4])
    assert store.images == table
    assert store.column("images/reason").tolist() == ["", "", "", "", "cannot be read", ""]
    assert store.column("images/sha256")[5].tolist() == [5] * 32
    assert store.column("images/sha256")[4].tolist() == [0] * 32
    assert store.describe()["n_skipped"] == 1


def test_rows_and_buffers_are_checked(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    with StoreReader(store) as reader:
        with pytest.raises(ValueError, match=r"rows must lie in 0\.\.2"):
            reader.read(np.array([3]))
        with pytest.raises(ValueError, match="out must be C-contiguous"):
            reader.read_rows(np.array([0]), np.empty((1, 5, 8), dtype=np.float32))


def test_no_store_there(tmp_path):
    with pytest.raises(StoreNotFoundError, match="no activation store at .*cytosae-cache list"):
        ActivationStore.open(tmp_path)


def test_another_zarr_group_is_no_store(tmp_path):
    zarr.create_group(tmp_path / "g", zarr_format=3)
    with pytest.raises(StoreCorruptError, match="no activation store"):
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
def test_an_array_laid_out_otherwise_is_refused(tmp_path, change):
    store = make_store(tmp_path / "s.zarr", make_activations(3))
    _edit(store.path / "activations" / "zarr.json", change)
    with pytest.raises(StoreCorruptError, match="was changed or damaged"):
        ActivationStore.open(store.path)
    seal(store)
    with pytest.raises(StoreCorruptError, match="not laid out as"):
        ActivationStore.open(store.path)


def test_metadata_that_is_no_json_or_too_large(tmp_path):
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


def test_an_unfinished_store_can_be_inspected_but_not_used(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        writer.submit(make_shard(store, 0, make_activations(4)))
    assert ActivationStore(store.path).describe()["n_finished_shards"] == 1
    with pytest.raises(StoreIncompleteError, match="1 of 2 shards .* cytosae-cache build"):
        ActivationStore.open(store.path)


def _snapshot(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


def test_resuming_rewrites_only_what_does_not_verify_and_ends_with_the_same_bytes(tmp_path):
    activations = make_activations(15)
    whole = make_store(tmp_path / "a" / "s.zarr", activations, spec=make_spec())
    store = create_store(tmp_path / "b" / "s.zarr", make_spec(), make_table(15), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard in (0, 1, 2):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    damaged = store.path / shard_name(1)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stray = (store.path / shard_name(3)).with_name("0.123.partial")
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    with StoreWriter(store) as writer:
        assert writer.missing_shards() == [1, 3]
    fill_store(store, activations)
    assert _snapshot(store.path) == _snapshot(whole.path)


_CHILD = """
import sys, time
from pathlib import Path
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter, create_store
from tests.support.stores import PROVENANCE, make_activations, make_shard, make_spec, make_table
path = Path(sys.argv[1])
store = (
    ActivationStore(path) if (path / "zarr.json").exists()
    else create_store(path, make_spec(), make_table(60), PROVENANCE, shard_images=2)
)
if not store.complete:
    activations = make_activations(60)
    with StoreWriter(store) as writer:
        missing = writer.missing_shards()
        writer.discard(missing)
        for shard in missing:
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start:rows.stop]))
            print(shard, flush=True)
        writer.finish()
print("done", flush=True)
"""


def test_a_killed_build_resumes_to_the_same_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "cache", "pipeline"])}
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "b" / "s.zarr")]
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(30):
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        lines = 0
        wait_for = int(rng.integers(1, 8))
        for line in child.stdout:
            lines += 1
            if line == "done\n" or lines == wait_for:
                break
        if line == "done\n":
            child.wait()
            child.stdout.close()
            break
        time.sleep(float(rng.uniform(0, 0.004)))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        kills += 1
    assert kills >= 3
    whole = make_store(tmp_path / "a" / "s.zarr", make_activations(60), spec=make_spec(), shard_images=2)
    assert _snapshot(tmp_path / "b" / "s.zarr") == _snapshot(whole.path)


def test_nan_and_infinity_stop_the_build_with_the_images_name(tmp_path):
    activations = make_activations(6)
    activations[5, 0, 0] = np.inf
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with pytest.raises(NotFiniteError, match=r"img_0005\.png.*NaN or infinity"):
        fill_store(store, activations)
    assert not ActivationStore(store.path).complete


def test_a_failing_disk_reaches_the_caller_and_leaves_nothing_half_written(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
    (store.path / "activations" / "c").write_text("in the way")
    with pytest.raises(OSError, match="c/0/0"):
        fill_store(store, make_activations(8))
    assert not list(store.path.rglob("*.partial"))


def test_a_store_with_a_missing_shard_cannot_be_finished(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
    with pytest.raises(StoreError, match="shard 0 .* was never written"), StoreWriter(store) as writer:
        writer.finish()


def test_a_replaced_file_is_the_old_one_until_the_end(tmp_path):
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        os.write(file, b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


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


def test_more_shards_than_open_files(tmp_path):
    activations = make_activations(300)
    store = make_store(tmp_path / "s.zarr", activations, shard_images=1)
    before = len(os.listdir("/proc/self/fd"))
    with StoreReader(store) as reader:
        for _ in range(2):
            assert np.array_equal(reader.read(np.arange(300)), activations)
        assert len(os.listdir("/proc/self/fd")) - before < 150
    del reader
    assert len(os.listdir("/proc/self/fd")) - before < 10


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


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is neither empty nor an unfinished store \(found 'thesis.txt'\)"):
        make_store(tmp_path / "s.zarr", make_activations(3))
    assert (tmp_path / "s.zarr" / "thesis.txt").read_text() == "mine"


def test_one_build_at_a_time(tmp_path):
    path = tmp_path / "s.zarr"
    with open_storage(path).lock():
        answers = []

        def other():
            try:
                with open_storage(path).lock():
                    answers.append("held")
            except StoreBusyError as error:
                answers.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another process is building" in answers[0]
    with open_storage(path).lock():
        pass


def test_a_crashed_build_leaves_no_lock(tmp_path):
    code = (
        "import os,sys; from pathlib import Path; from cytosae_cache.storage.open import open_storage\n"
        "with open_storage(Path(sys.argv[1])).lock(): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": "cache"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.zarr")], env=environment, check=False)
    with open_storage(tmp_path / "s.zarr").lock():
        pass
