"""A store gives activations by row number through one kept reader."""

import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cytosae_cache
from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreCorruptError, StoreIncompleteError, StoreNotFoundError
from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from tests.support.patience import wait_until
from tests.support.stores import PROVENANCE, make_activations, make_spec, make_store, make_table, record_opens


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_indexing_reads_only_the_requested_rows(tmp_path, compression):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations, compression=compression)
    for shard in (0, 2):
        (store.path / shard_name(shard)).unlink()
    assert len(store) == 11
    assert np.array_equal(store[5], activations[5])
    assert np.array_equal(store[-5], activations[6])
    assert np.array_equal(store[[7, 4]], activations[[7, 4]])
    assert np.array_equal(store[4:8:3], activations[4:8:3])
    assert store[np.array([], dtype=int)].shape == (0, 5, 8)
    with pytest.raises(IndexError):
        store[11]
    with pytest.raises(StoreCorruptError, match="is missing"):
        store[0]


def test_a_hundred_accesses_open_each_shard_file_once(tmp_path, monkeypatch):
    activations = make_activations(20)
    store = make_store(tmp_path / "s.zarr", activations)
    opened = record_opens(store, monkeypatch)
    for row in np.random.default_rng(0).integers(0, 20, size=100):
        assert np.array_equal(store[row], activations[row])
    assert sorted(opened) == [shard_name(shard) for shard in range(5)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("store-reader")]


def test_threads_share_the_kept_reader(tmp_path, monkeypatch):
    activations = make_activations(20)
    store = make_store(tmp_path / "s.zarr", activations)
    opened = record_opens(store, monkeypatch)
    start = threading.Barrier(8)

    def read(seed):
        rows = np.random.default_rng(seed).integers(0, 20, size=(50, 6))
        start.wait()
        return all(np.array_equal(store[part], activations[part]) for part in rows)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert sorted(opened) == [shard_name(shard) for shard in range(5)]


def _n_open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
@pytest.mark.parametrize("how", ["close", "with", "last reference"])
def test_files_and_threads_of_the_kept_reader_are_released(tmp_path, how):
    activations = make_activations(20)
    store = make_store(tmp_path / "s.zarr", activations)
    before = _n_open_files()
    gc.disable()  # releasing files must not depend on the collector of cycles
    try:
        store[:]
        assert _n_open_files() == before + 5
        if how == "close":
            store.close()
            store.close()
        elif how == "with":
            with store:
                assert np.array_equal(store[3], activations[3])
        else:
            del store
        assert _n_open_files() == before
    finally:
        gc.enable()
    wait_until(lambda: not [one for one in threading.enumerate() if one.name.startswith("store-reader")])


def test_a_closed_store_can_be_read_again(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations)
    for _ in range(2):
        assert np.array_equal(store[:], activations)
        store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_reads_through_a_reader_of_its_own(tmp_path, monkeypatch):
    activations = make_activations(20)
    store = make_store(tmp_path / "s.zarr", activations)
    assert np.array_equal(store[:], activations)  # its threads do not survive the fork
    opened = record_opens(store, monkeypatch)
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if np.array_equal(store[:], activations) and len(opened) == 5 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(store[:], activations)
    assert not opened


def test_a_pickled_store_is_opened_again(tmp_path):
    activations = make_activations(11)
    store = make_store(tmp_path / "s.zarr", activations)
    assert np.array_equal(store[:], activations)
    copy = pickle.loads(pickle.dumps(store))
    assert type(copy) is ActivationStore
    assert np.array_equal(copy[:], activations)
    (store.path / "zarr.json").unlink()
    with pytest.raises(StoreNotFoundError):
        pickle.loads(pickle.dumps(store))


def test_an_unfinished_store_gives_no_activations(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with pytest.raises(StoreIncompleteError, match=r"0 of 2 shards written.*cytosae-cache build"):
        store[0]


def test_open_returns_a_complete_store(tmp_path):
    make_store(tmp_path / "s.zarr", make_activations(5))
    store = cytosae_cache.open(str(tmp_path / "s.zarr"))
    assert isinstance(store, ActivationStore)
    with pytest.raises(cytosae_cache.StoreNotFoundError):
        cytosae_cache.open(tmp_path / "other.zarr")


def test_repr_and_table_describe_the_store(tmp_path):
    store = make_store(tmp_path / "s<b>.zarr", make_activations(5))
    assert "toy; 5 images x 5 tokens x 8; toy_vit, block -2;" in repr(store)
    assert repr(store).endswith("complete>")
    page = store._repr_html_()
    assert "s&lt;b&gt;.zarr" in page
    assert "<th>shape</th><td>5 images x 5 tokens x 8</td>" in page


def test_public_names_are_listed_and_exist():
    assert {"open", "ActivationStore", "StoreBatches", "StoreError"} <= set(dir(cytosae_cache))
    assert all(getattr(cytosae_cache, name) for name in cytosae_cache.__all__)


def test_importing_the_package_imports_neither_zarr_nor_torch():
    code = "import cytosae_cache, sys; assert not {'zarr', 'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import cytosae_cache, sys; cytosae_cache.open; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
