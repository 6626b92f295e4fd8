"""Stores on object storage: a real server on loopback, its faults, and the command line over it."""

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime

import fsspec
import numpy as np
import pytest

from cytosae_cache.creation import create_store
from cytosae_cache.errors import (
    StoreCorruptError,
    StoreError,
    StoreIncompleteError,
    StoreNotFoundError,
    StoreUnreachableError,
)
from cytosae_cache.format.shard import shard_name
from cytosae_cache.reading.concat import ConcatReader
from cytosae_cache.reading.loader import ShuffledLoader
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.storage import remote
from cytosae_cache.storage.local import LocalStorage
from cytosae_cache.storage.open import open_storage
from cytosae_cache.storage.s3_uploads import UnfinishedUploads
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter
from tests.support.patience import wait_until
from tests.support.pictures import HEARING_MAIN, LAYOUT
from tests.support.s3 import serve_s3
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_shard, make_spec, make_store, make_table

URL = "s3://cells/stores/toy.zarr"


@pytest.fixture
def s3(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    with serve_s3(monkeypatch) as faults:
        yield faults


def _files(location) -> dict[str, bytes]:
    storage = open_storage(location)
    return {name: storage.read(name) for name in storage.names()}


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_remote_store_is_byte_for_byte_the_local_one(s3, tmp_path, compression):
    activations = make_activations(11)
    local = make_store(tmp_path / "s.zarr", activations, invalid=[3], compression=compression)
    store = make_store(URL, activations, invalid=[3], compression=compression)
    assert _files(URL) == _files(local.path)
    activations[3] = np.nan
    with StoreReader(store) as reader:
        rows = np.array([10, 0, 3, 3, 7])
        assert np.array_equal(reader.read(rows), activations[rows], equal_nan=True)
    assert verify_store(store).sound
    assert store.images == local.images
    assert np.array_equal(store.zarr_array()[...], activations, equal_nan=True)
    assert np.array_equal(store.dask().compute(), activations, equal_nan=True)


def test_loaders_give_the_batches_of_the_local_store(s3, tmp_path):
    activations = make_activations(11)
    batches = []
    for location in (URL, tmp_path / "s.zarr"):
        with StoreReader(make_store(location, activations)) as reader:
            stream = ShuffledLoader(ConcatReader([reader]), batch_images=4, seed=1, stop=30)
            batches.append([batch.activations.copy() for batch in stream])
    assert len(batches[0]) == len(batches[1]) == 8
    assert all(np.array_equal(first, second) for first, second in zip(*batches, strict=True))


def test_any_protocol_of_fsspec_works():
    url = "memory://toy.zarr"
    store = make_store(url, make_activations(6))
    assert verify_store(store).sound
    assert np.array_equal(store[4], make_activations(6)[4])
    open_storage(url).delete()
    with pytest.raises(StoreNotFoundError):
        ActivationStore(url)


def test_file_urls_are_local(tmp_path):
    assert isinstance(open_storage(f"file://{tmp_path}"), LocalStorage)


def test_temporary_errors_are_retried(s3):
    s3.remaining, s3.methods = 3, ("PUT",)
    store = make_store(URL, make_activations(6))
    assert s3.n_failed == 3
    s3.remaining, s3.methods = 3, ("GET",)
    with StoreReader(store) as reader:
        assert np.array_equal(reader.read(np.arange(6)), make_activations(6))
    assert s3.n_failed == 6


def test_our_retries_come_on_top_of_those_of_the_library(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)
    storage = open_storage("memory://attempts")
    storage.write("a", [b"xy"])
    calls = []
    original = storage._system.cat_file

    def flaky(path, **more):
        calls.append(path)
        if len(calls) < remote.N_ATTEMPTS:
            raise TimeoutError("slow")
        return original(path, **more)

    monkeypatch.setattr(storage._system, "cat_file", flaky)
    assert storage.read("a") == b"xy"
    assert len(calls) == remote.N_ATTEMPTS
    storage.delete()


def test_storage_that_does_not_respond_is_one_message(monkeypatch):
    monkeypatch.setattr(remote, "_FIRST_PAUSE_S", 0.001)
    storage = open_storage("memory://silent")

    def silent(path, **more):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(storage._system, "cat_file", silent)
    with pytest.raises(StoreUnreachableError, match=r"cannot read 'memory://silent/a' after 5 attempts: reset by peer"):
        storage.read("a")


def test_permanent_errors_are_not_retried(s3):
    with pytest.raises(StoreNotFoundError, match="no activation store at 's3://cells/none.zarr'"):
        ActivationStore("s3://cells/none.zarr")
    assert s3.n_requests < 8


def test_unknown_protocols_and_names_that_lead_out_are_refused(s3):
    with pytest.raises(StoreError, match="neither a path nor a URL that fsspec knows"):
        open_storage("nosuch://a/b")
    with pytest.raises(StoreCorruptError, match="leads out of the store"):
        open_storage(URL).read("../other/secret")


def test_a_missing_package_is_named(monkeypatch):
    def absent(url, **more):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    with pytest.raises(StoreError, match=r"pip install '\.\[s3\]'"):
        open_storage(URL)


def test_an_unfinished_remote_store_is_resumed(s3, tmp_path):
    activations = make_activations(15)
    store = create_store(URL, make_spec(), make_table(15), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard in (0, 1, 2):
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop]))
    with pytest.raises(StoreIncompleteError, match="3 of 4 shards"):
        ActivationStore.open(URL)
    store.storage.write(shard_name(1), [b"cut off"])
    with StoreWriter(store) as writer:
        assert writer.missing_shards() == [1, 3]
    fill_store(store, activations)
    assert _files(URL) == _files(make_store(tmp_path / "s.zarr", activations, spec=make_spec()).path)


def test_damage_in_remote_bytes_is_found(s3):
    store = make_store(URL, make_activations(6))
    data = bytearray(store.storage.read(shard_name(0)))
    data[5] ^= 1
    store.storage.write(shard_name(0), [bytes(data)])
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="fails its checksum"):
        reader.read(np.array([0]))
    assert not verify_store(store).sound
    store.storage.remove([shard_name(1)])
    with StoreReader(store) as reader, pytest.raises(StoreCorruptError, match="is missing"):
        reader.read(np.array([5]))


def test_the_whole_job_on_remote_storage(s3, with_images):
    place = with_images
    place.build("--store", URL)
    assert "already complete" in place.build("--store", URL).output
    facts = json.loads(place.run("info", URL, "--json").stdout)
    assert facts["path"] == URL
    assert "sound" in place.run("verify", URL).output
    place.train("--store", URL, "--run_name", "remote")
    place.run("features", "--store", URL, "--sae_path", place.sae("remote"))
    place.build()
    place.train("--run_name", "local")
    place.run("features", "--dataset_name", "toy", "--sae_path", place.sae("local"))
    for name in ("max_activating_image_indices.pt", "sae_sparsity.pt", "sae_mean_acts.pt"):
        assert (place.features("remote") / name).read_bytes() == (place.features("local") / name).read_bytes()
    (skipped,) = (place.root / "out" / "activations" / "toy").glob("toy.zarr.skipped.csv")
    assert "broken.png" in skipped.read_text()


def test_a_remote_store_is_deleted_only_if_the_user_says_so_and_nothing_else_is(s3, with_images):
    other = open_storage("s3://cells/stores/other")
    other.write("notes.txt", [b"keep"])
    with_images.build("--store", URL)
    before = open_storage(URL).read("zarr.json")
    output = with_images.build("--store", URL, "--overwrite", code=1).output
    assert "is a complete store. Nothing can be renamed on object storage" in output
    assert "add --delete-first to delete the old one before" in output
    assert open_storage(URL).read("zarr.json") == before
    with_images.build("--store", URL, "--overwrite", "--delete-first")
    assert ActivationStore(URL).complete
    assert other.names() == ["notes.txt"]
    output = with_images.build("--store", "s3://cells/stores/other", "--overwrite", code=1).output
    assert "is neither empty nor an unfinished store (found 'notes.txt')" in output
    assert other.read("notes.txt") == b"keep"


def test_a_killed_remote_build_is_resumed_to_the_same_bytes(s3, with_images, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    place = with_images
    command = [
        sys.executable, "-c", HEARING_MAIN, "build", "--root_dir", str(place.root), "--dataset_name", "toy",
        "--model_path", str(place.vit), "--workers", "0", "--shard_images", "1", "--batch_size", "1", "--store", URL,
        "--layout", LAYOUT,
    ]  # fmt: skip
    storage = open_storage(URL)
    kills = 0
    for wanted in (2, 9, 15):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
        while child.poll() is None and len(storage.names("progress/")) < wanted:
            time.sleep(0.01)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        child.wait()
    assert kills >= 2
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=dict(os.environ))
    place.build("--shard_images", 1, "--batch_size", 1)
    assert _files(URL) == _files(place.store)


# Uploads in parts

KEY = "stores/toy.zarr/activations/c/0/0/0"
PUT = f"""
import sys
from cytosae_cache.storage.open import open_storage
from cytosae_cache.storage.s3_uploads import UnfinishedUploads
open_storage("{URL}").write("activations/c/0/0/0", [bytes(40 << 20)])
print("written")
"""


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)


def _client():
    import boto3

    return boto3.client("s3")


def _unfinished() -> list[str]:
    found = _client().list_multipart_uploads(Bucket="cells").get("Uploads", [])
    return sorted(upload["Key"] for upload in found)


def _leave_uploads(*keys: str) -> None:
    client = _client()
    for key in keys:
        upload = client.create_multipart_upload(Bucket="cells", Key=key)["UploadId"]
        client.upload_part(Bucket="cells", Key=key, UploadId=upload, PartNumber=1, Body=bytes(5 << 20))


def _abort_all() -> None:
    for upload in _client().list_multipart_uploads(Bucket="cells").get("Uploads", []):
        _client().abort_multipart_upload(Bucket="cells", Key=upload["Key"], UploadId=upload["UploadId"])


def test_a_killed_upload_is_aborted_when_the_same_object_is_written_again(s3, small_parts):
    source = f"from cytosae_cache.storage import remote; remote.PART_BYTES = 5 << 20\n{PUT}"
    child = subprocess.Popen([sys.executable, "-c", source], env=dict(os.environ))
    wait_until(_unfinished)
    child.kill()
    child.wait()
    assert _unfinished() == [KEY], "the kill came in time"
    _leave_uploads(KEY + "1", "stores/toy.zarr2/activations/c/0/0/0")
    data = bytes(range(256)) * (12 << 12)
    open_storage(URL).write("activations/c/0/0/0", [data])
    assert open_storage(URL).read("activations/c/0/0/0") == data
    assert _unfinished() == [KEY + "1", "stores/toy.zarr2/activations/c/0/0/0"]
    _abort_all()


def test_unfinished_uploads_of_a_store_go_with_the_next_build_and_with_the_store(s3):
    neighbours = ["stores/toy.zarr.skipped.csv", "stores/toy.zarr2/zarr.json"]
    _leave_uploads(KEY, "stores/toy.zarr", *neighbours)
    store = make_store(URL, make_activations(6))
    assert _unfinished() == neighbours
    _leave_uploads(KEY)
    store.storage.delete()
    assert _unfinished() == neighbours
    _abort_all()


def test_an_upload_of_a_writer_that_began_later_is_left_alone(s3, small_parts):
    storage = open_storage(URL)
    storage._uploads._since = datetime(2000, 1, 1, tzinfo=UTC)
    _leave_uploads(KEY)
    storage.write("activations/c/0/0/0", [bytes(11 << 20)])
    storage.remove_partials()
    assert _unfinished() == [KEY]
    _abort_all()


def test_an_upload_that_fails_is_aborted_at_once(s3, small_parts, monkeypatch):
    storage = open_storage(URL)
    pipe_file = storage._system.pipe_file

    def interrupted(path, data, **more):
        _leave_uploads(path.removeprefix("cells/"))
        raise KeyboardInterrupt

    monkeypatch.setattr(storage._system, "pipe_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write("activations/c/0/0/0", [bytes(11 << 20)])
    assert _unfinished() == []
    gone = iter([FileNotFoundError("no such upload")])

    def aborted_once(path, data, **more):
        for error in gone:
            raise error
        pipe_file(path, data, **more)

    monkeypatch.setattr(storage._system, "pipe_file", aborted_once)
    storage.write("activations/c/0/0/0", [bytes(11 << 20)])
    assert storage.size("activations/c/0/0/0") == 11 << 20


def test_uploads_that_may_not_be_listed_are_one_warning(s3, small_parts, monkeypatch, caplog):
    storage = open_storage(URL)
    call = storage._system.call_s3

    def refused(method, **more):
        if method == "list_multipart_uploads":
            raise PermissionError("Access Denied")
        return call(method, **more)

    monkeypatch.setattr(storage._system, "call_s3", refused)
    storage.write("activations/c/0/0/0", [bytes(11 << 20)])
    storage.write("activations/c/0/0/0", [bytes(11 << 20)])
    storage.remove_partials()
    (line,) = caplog.messages
    assert "cannot be listed or aborted (Access Denied)" in line
    assert "s3:ListBucketMultipartUploads" in line


def test_uploads_are_listed_page_by_page(s3, small_parts):
    storage = open_storage(URL)
    pages = {
        "": {"Uploads": [_upload("a")], "IsTruncated": True, "NextKeyMarker": "a", "NextUploadIdMarker": "1"},
        "a": {"Uploads": [_upload("b")], "IsTruncated": False},
    }
    aborted = []

    class Paged:
        protocol = ("s3", "s3a")

        def call_s3(self, method, **more):
            if method == "abort_multipart_upload":
                aborted.append(more["Key"])
                return {}
            return pages[more.get("KeyMarker", "")]

    uploads = UnfinishedUploads(Paged(), datetime(2020, 1, 1, tzinfo=UTC))
    assert uploads.abort("bucket/store", below=True) == frozenset()
    assert aborted == ["store/a", "store/b"]
    assert UnfinishedUploads(open_storage("memory://x")._system).abort("x") == frozenset()
    storage.delete()


def _upload(name: str) -> dict[str, object]:
    return {"Key": f"store/{name}", "UploadId": name, "Initiated": datetime(2010, 1, 1, tzinfo=UTC)}


# Requests, counted


def test_opening_takes_three_requests_and_lists_nothing(s3):
    make_store(URL, make_activations(12), shard_images=1)
    s3.seen.clear()
    ActivationStore.open(URL)
    assert s3.seen == {"GET": 2, "HEAD": 1}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_random_read_is_one_get_an_image_and_one_index_a_shard(s3, compression):
    activations = make_activations(60)
    make_store(URL, activations, shard_images=2, compression=compression)
    store = ActivationStore.open(URL)
    rows = np.random.default_rng(0).permutation(60)[::2]
    with StoreReader(store) as reader:
        shards = len(set((rows // 2).tolist()))
        for expected in (shards + len(rows), len(rows)):
            s3.seen.clear()
            assert np.array_equal(reader.read(rows), activations[rows])
            assert s3.seen == {"GET": expected}


def test_a_shard_that_is_shorter_than_recorded_or_missing_is_said_so_at_once(s3):
    store = make_store(URL, make_activations(12))
    for name, data in ((shard_name(0), b"short"), (shard_name(1), store.storage.read(shard_name(1))[:-1])):
        store.storage.write(name, [data])
    store.storage.remove([shard_name(2)])
    store = ActivationStore.open(URL)
    with StoreReader(store) as reader:
        for row, message in ((0, "it was truncated"), (4, "it was truncated"), (8, "is missing. Repair it")):
            s3.n_requests = 0
            with pytest.raises(StoreCorruptError, match=message):
                reader.read(np.array([row]))
            assert s3.n_requests <= 3, "nothing is retried"


def test_marks_are_removed_with_one_request_for_a_thousand(s3):
    storage = open_storage(URL)
    names = [f"progress/{number}.json" for number in range(1200)]
    for name in names[:5] + names[-5:]:
        storage.write(name, [b"x"])
    s3.seen.clear()
    storage.remove(names)
    assert s3.seen == {"POST delete": 2}
    assert not storage.names()


def test_objects_are_removed_one_by_one_where_the_server_knows_no_other_way(s3):
    storage = open_storage(URL)
    names = [f"progress/{number}.json" for number in range(5)]
    for name in names:
        storage.write(name, [b"x"])
    s3.remaining, s3.methods = 99, ("POST",)
    storage.remove([*names, "progress/none.json"])
    assert s3.seen["DELETE"] == 6
    assert not storage.names()
