"""Stores are written exactly as zarr-python would write them, and resume after every interruption."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from cytosae_cache.creation import create_store
from cytosae_cache.errors import NotFiniteError, StoreError, StoreIncompleteError
from cytosae_cache.format.codec import make_compressors
from cytosae_cache.format.moments import widen
from cytosae_cache.format.shard import make_index, shard_name
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building.activations import widen_with_torch
from tests.support.stores import (
    PROVENANCE,
    fill_store,
    make_activations,
    make_int8_store,
    make_shard,
    make_spec,
    make_store,
    make_table,
    read_files,
)

CODECS = ["none", "lz4", "zstd"]


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


def test_image_i_lies_at_byte_i_times_image_bytes(tmp_path):
    activations = make_activations(6)
    store = make_store(tmp_path / "s.zarr", activations)
    data = (store.path / shard_name(1)).read_bytes()
    assert data[store.image_bytes : 2 * store.image_bytes] == activations[5].tobytes()
    assert data[2 * store.image_bytes :] == make_index([store.image_bytes] * 2, 4)


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


def test_an_unfinished_store_can_be_inspected_but_not_used(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        writer.submit(make_shard(store, 0, make_activations(4)))
    assert ActivationStore(store.path).describe()["n_finished_shards"] == 1
    with pytest.raises(StoreIncompleteError, match="1 of 2 shards .* `cytosae-cache build` command"):
        ActivationStore.open(store.path)


def test_resuming_rewrites_only_unverified_shards_and_ends_with_the_same_bytes(tmp_path):
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
    assert read_files(store.path) == read_files(whole.path)


_CHILD = """
import sys, time
from pathlib import Path
from cytosae_cache.store import ActivationStore
from cytosae_cache.creation import create_store
from cytosae_cache.writer import StoreWriter
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
    assert read_files(tmp_path / "b" / "s.zarr") == read_files(whole.path)


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_an_int8_build_resumes_to_the_same_bytes(tmp_path, n_before):
    activations, whole = make_int8_store(tmp_path / "a" / "s.zarr")
    path = tmp_path / "b" / "s.zarr"
    store = create_store(path, whole.spec, make_table(11), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard in range(n_before):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    fill_store(ActivationStore(path), activations)
    assert read_files(path) == read_files(whole.path)


def test_an_int8_build_killed_while_it_writes_its_channels_resumes_to_the_same_bytes(tmp_path):
    activations, whole = make_int8_store(tmp_path / "a" / "s.zarr")
    path = tmp_path / "b" / "s.zarr"
    store = create_store(path, whole.spec, make_table(11), PROVENANCE, shard_images=4)
    store.storage.write("channels/mean/zarr.json", [(whole.path / "channels/mean/zarr.json").read_bytes()])
    fill_store(ActivationStore(path), activations)
    assert read_files(path) == read_files(whole.path)


def test_infinity_stops_an_int8_build_and_leaves_it_resumable(tmp_path):
    activations, whole = make_int8_store(tmp_path / "a" / "s.zarr")
    path = tmp_path / "b" / "s.zarr"
    store = create_store(path, whole.spec, make_table(11), PROVENANCE, shard_images=4)
    broken = activations.copy()
    broken[1, 0, 0] = np.inf
    with pytest.raises(NotFiniteError, match=r"img_0001\.png.*NaN or infinity"):
        fill_store(store, broken)
    fill_store(ActivationStore(path), activations)
    assert read_files(path) == read_files(whole.path)


def test_nan_and_infinity_stop_the_build_and_name_the_image(tmp_path):
    activations = make_activations(6)
    activations[5, 0, 0] = np.inf
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with pytest.raises(NotFiniteError, match=r"img_0005\.png.*NaN or infinity"):
        fill_store(store, activations)
    assert not ActivationStore(store.path).complete


def test_disk_errors_reach_the_caller_and_leave_no_partial_file(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
    (store.path / "activations" / "c").write_text("in the way")
    with pytest.raises(OSError, match="c/0/0"):
        fill_store(store, make_activations(8))
    assert not list(store.path.rglob("*.partial"))


def test_a_store_with_a_missing_shard_cannot_be_finished(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(8), PROVENANCE, shard_images=4)
    with pytest.raises(StoreError, match="shard 0 .* was never written"), StoreWriter(store) as writer:
        writer.finish()


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"is neither empty nor an unfinished store \(found 'thesis.txt'\)"):
        make_store(tmp_path / "s.zarr", make_activations(3))
    assert (tmp_path / "s.zarr" / "thesis.txt").read_text() == "mine"


def test_asking_for_missing_shards_changes_nothing_and_discarding_does(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(15), PROVENANCE, shard_images=4)
    activations = make_activations(15)
    with StoreWriter(store) as writer:
        for shard in range(4):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    os.truncate(store.path / shard_name(1), 10)
    (store.path / shard_name(2)).with_name("0.123.partial").write_bytes(b"half")
    before = read_files(store.path)
    with StoreWriter(store) as writer:
        assert writer.missing_shards() == [1]
        assert read_files(store.path) == before
        writer.discard([1, 3])
        assert writer.missing_shards() == [1, 3]
    changed = {"progress/1.json", "progress/3.json", "activations/c/2/0/0.123.partial"}
    assert read_files(store.path) == {name: data for name, data in before.items() if name not in changed}
