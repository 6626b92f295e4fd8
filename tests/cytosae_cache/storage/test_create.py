"""Files that are created once: of several writers one wins, on a disk and on S3, and none of theirs is swept away."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cytosae_cache.storage import atomic, remote
from cytosae_cache.storage.atomic import writer_name
from cytosae_cache.storage.local import LocalStorage
from cytosae_cache.storage.open import open_storage
from tests.support.s3 import serve_s3


@pytest.fixture(params=["disk", "s3"])
def location(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield str(tmp_path / "s.zarr")
        return
    with serve_s3(monkeypatch):
        yield "s3://cells/s.zarr"


def test_of_many_writers_one_wins(location):
    def write(number):
        return number if open_storage(location).create("a/b", [b"%d" % number, b"!"], sync=True) else None

    with ThreadPoolExecutor(16) as pool:
        won = [number for number in pool.map(write, range(16)) if number is not None]
    storage = open_storage(location)
    assert len(won) == 1
    assert storage.read("a/b") == b"%d!" % won[0]
    assert storage.names() == ["a/b"]
    storage.write("a/b", [b"new"])
    assert not storage.create("a/b", [b"old"])
    assert storage.read("a/b") == b"new"


def test_a_large_object_is_created_once(monkeypatch):
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)
    with serve_s3(monkeypatch):
        storage = open_storage("s3://cells/s.zarr")
        data = os.urandom(11 << 20)
        assert storage.create("a", [data])
        assert not storage.create("a", [data[::-1]])
        assert storage.read("a") == data


def test_a_disk_without_hard_links_does_the_same(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = LocalStorage(tmp_path)
    assert storage.create("a", [b"1"])
    assert not storage.create("a", [b"2"])
    assert storage.names() == ["a"]
    assert storage.read("a") == b"1"


def test_only_what_no_writer_needs_is_swept_away(tmp_path, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    storage, path = LocalStorage(tmp_path), tmp_path / "0"
    kept = [writer_name(path)]
    with monkeypatch.context() as changed:
        changed.setattr(atomic.platform, "node", lambda: "elsewhere")
        kept.append(writer_name(path))
        changed.setattr(atomic.os, "getpid", lambda: ended.pid)
        kept.append(writer_name(path))
    monkeypatch.setattr(atomic.os, "getpid", lambda: ended.pid)
    swept = [writer_name(path), path.with_name("0.123.partial")]
    monkeypatch.undo()
    for stray in kept + swept:
        stray.touch()
    storage.remove_partials()
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    storage.remove_partials(of_everyone=True)
    assert not list(tmp_path.iterdir())
