"""Stores in folders: one build at a time, no lock survives a crash, and what is written is on the disk."""

import errno
import os
import subprocess
import sys
import threading

import pytest

from cytosae_cache.errors import StoreBusyError
from cytosae_cache.storage import local
from cytosae_cache.storage.atomic import start_flush
from cytosae_cache.storage.local import LocalStorage
from cytosae_cache.storage.open import open_storage


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
    assert f"another process (process {os.getpid()} on" in answers[0]
    assert f"is writing '{path}'" in answers[0]
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


@pytest.mark.parametrize("sync", [True, False])
@pytest.mark.parametrize("lengths", [[], [0], [5], [64], [65], [200, 3, 0, 128], [10] * 40])
def test_large_files_are_written_in_pieces_that_the_disk_begins_with(tmp_path, monkeypatch, lengths, sync):
    flushed = []
    monkeypatch.setattr(local, "_FLUSH_BYTES", 64)
    monkeypatch.setattr(local, "start_flush", lambda file, offset, n_bytes: flushed.append((offset, n_bytes)))
    parts = [bytes([number % 256]) * length for number, length in enumerate(lengths)]
    LocalStorage(tmp_path).write("a/f", parts, sync=sync)
    assert (tmp_path / "a/f").read_bytes() == b"".join(parts)
    ends = [offset + n_bytes for offset, n_bytes in flushed]
    assert [offset for offset, _ in flushed] == [0, *ends][:-1] if flushed else True
    assert all(n_bytes >= 64 for _, n_bytes in flushed)
    assert bool(flushed) == (sync and sum(lengths) >= 64)


def test_the_advice_to_begin_with_a_file_keeps_its_bytes(tmp_path):
    with (tmp_path / "f").open("w+b") as file:
        file.write(b"x" * 100_000)
        file.flush()
        start_flush(file.fileno(), 0, 100_000)
        os.fsync(file.fileno())
        file.seek(0)
        assert file.read() == b"x" * 100_000
    start_flush(10**6, 0, 1)  # an error is left to the sync


@pytest.mark.parametrize("contents", [True, False])
def test_only_what_is_named_is_synced_with_the_folders_above_it(tmp_path, monkeypatch, contents):
    root = tmp_path / "s.zarr"
    storage = LocalStorage(root)
    names = ["zarr.json", "images/path/c/0", "activations/c/0/0/0", "activations/c/1/0/0", "activations/zarr.json"]
    for name in [*names, "progress/0.json"]:
        storage.write(name, [b"x"])
    synced = []
    for name in ("sync_file", "sync_folder"):
        monkeypatch.setattr(local, name, synced.append)
    storage.sync(names, contents=contents)
    files = {root / name for name in names} if contents else set()
    folders = {tmp_path, root, *(path for path in root.rglob("*") if path.is_dir() and path.name != "progress")}
    assert sorted(synced) == sorted(files | folders)


def test_a_disk_that_fails_to_sync_one_file_is_an_error(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)
    for number in range(20):
        storage.write(str(number), [b"x"])

    def fail(path):
        if path.name == "13":
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(local, "sync_file", fail)
    with pytest.raises(OSError, match="broken"):
        storage.sync(map(str, range(20)))
