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
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreNotFoundError,
)
from cytosae_cache.metadata import ATTRIBUTES_KEY
from cytosae_cache.reader import StoreReader
from cytosae_cache.shard import make_index, replacing, shard_path, write_file
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import NotFiniteError, StoreWriter, store_lock
from tests.stores import PROVENANCE, fill_store, make_activations, make_shard, make_spec, make_store, make_table, seal

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


def test_shard_files_are_byte_for_byte_those_of_zarr_python(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "ours.zarr", activations)
    theirs = zarr.create_array(
        tmp_path / "theirs.zarr",
        shape=activations.shape,
        dtype="float16",
        shards=(4, 5, 8),
        chunks=(1, 5, 8),
        fill_value=float("nan"),
        filters=None,
        compressors=None,
        zarr_format=3,
        dimension_names=("image", "token", "channel"),
    )
    theirs[...] = activations
    for shard in range(3):
        ours_bytes = shard_path(store.path / "activations", shard).read_bytes()
        assert ours_bytes == shard_path(tmp_path / "theirs.zarr", shard).read_bytes()
    metadata = [
        json.loads((path / "zarr.json").read_text()) for path in (store.path / "activations", theirs.store.root)
    ]
    assert metadata[0] == metadata[1]


def test_images_written_by_zarr_python_are_read_by_us(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2])
    array = zarr.open_group(store.path, mode="r+")["activations"]
    replaced = make_activations(11, seed=1)
    replaced[2] = np.nan  # left out of the shard by zarr-python, so the images are no longer a plain run
    array[...] = replaced
    with StoreReader(store, verify=False) as reader:
        assert np.array_equal(reader.read(np.arange(11)), replaced, equal_nan=True)


def test_image_i_lies_at_byte_i_times_image_bytes(tmp_path):
    activations = make_activations(6)
    store = make_store(tmp_path / "s.zarr", activations)
    data = shard_path(store.path / "activations", 1).read_bytes()
    assert data[store.image_bytes : 2 * store.image_bytes] == activations[5].tobytes()
    assert data[2 * store.image_bytes :] == make_index(2, 4, store.image_bytes)


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
        with pytest.raises(ValueError, match="need C-contiguous"):
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
    store = ActivationStore.create(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
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
    store = ActivationStore.create(tmp_path / "b" / "s.zarr", make_spec(), make_table(15), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard in (0, 1, 2):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    damaged = shard_path(store.path / "activations", 1)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    stray = shard_path(store.path / "activations", 3).with_name("0.123.partial")
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
from cytosae_cache.writer import StoreWriter
from tests.stores import PROVENANCE, make_activations, make_shard, make_spec, make_table
path = Path(sys.argv[1])
store = (
    ActivationStore(path) if (path / "zarr.json").exists()
    else ActivationStore.create(path, make_spec(), make_table(60), PROVENANCE, shard_images=2)
)
if not store.complete:
    activations = make_activations(60)
    with StoreWriter(store) as writer:
        for shard in writer.missing_shards():
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
    store = ActivationStore.create(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with pytest.raises(NotFiniteError, match=r"img_0005\.png.*NaN or infinity"):
        fill_store(store, activations)
    assert not ActivationStore(store.path).complete


def test_a_failing_disk_reaches_the_caller_and_leaves_nothing_half_written(tmp_path):
    store = ActivationStore.create(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
    (store.path / "activations" / "c").write_text("in the way")
    with pytest.raises(OSError, match="c/0/0"):
        fill_store(store, make_activations(8))
    assert not list(store.path.rglob("*.partial"))


def test_a_store_with_a_missing_shard_cannot_be_finished(tmp_path):
    store = ActivationStore.create(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
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
    path = shard_path(store.path / "activations", 0)
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
    path = shard_path(store.path / "activations", 1)
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


def test_one_build_at_a_time(tmp_path):
    path = tmp_path / "s.zarr"
    with store_lock(path):
        answers = []

        def other():
            try:
                with store_lock(path):
                    answers.append("held")
            except StoreBusyError as error:
                answers.append(str(error))

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "another process is building" in answers[0]
    with store_lock(path):
        pass


def test_a_crashed_build_leaves_no_lock(tmp_path):
    code = (
        "import os,sys; from pathlib import Path; from cytosae_cache.writer import store_lock\n"
        "with store_lock(Path(sys.argv[1])): print('held', flush=True); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": "cache"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "s.zarr")], env=environment, check=False)
    with store_lock(tmp_path / "s.zarr"):
        pass
