"""Locks: one writer at a time, none outlives its process, and no file of the user is touched."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_cache.storage import lock as lock_module
from cytosae_cache.storage.lock import Owner, locked

HOLD = """
import sys
from pathlib import Path
from cytosae_cache.storage.lock import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without locks."""

    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def _hold(path, code=HOLD):
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_the_message_names_the_owner_and_a_killed_owner_is_forgotten(tmp_path):
    path = tmp_path / "x.lock"
    process = _hold(path)
    with pytest.raises(
        StoreBusyError, match=rf"another process \(process {process.pid} on .+, since .+ UTC\) is writing"
    ):
        with locked(path, "it"):
            pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with locked(path, "it"):
        assert json.loads(path.read_bytes())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "contents", [b"the lock of another program", b"", b"{}", b'{"mark": "cytosae-cache lock"}', b"[" * 4000]
)
def test_a_file_of_the_user_is_left_alone(tmp_path, contents):
    path = tmp_path / "poetry.lock"
    path.write_bytes(contents)
    with locked(path, "it"), pytest.raises(StoreBusyError, match="another process is writing 'it'"), locked(path, "it"):
        pass
    assert path.read_bytes() == contents


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / "x.lock").symlink_to(tmp_path / "precious.txt")
    with (
        pytest.raises(StoreBusyError, match="is a link or a folder, but the lock of 'it' must be a file"),
        locked(tmp_path / "x.lock", "it"),
    ):
        pass
    assert (tmp_path / "precious.txt").read_text() == "precious"
    (tmp_path / "y.lock").mkdir()
    with pytest.raises(StoreBusyError, match="is a link or a folder"), locked(tmp_path / "y.lock", "it"):
        pass


def test_a_lock_on_a_removed_file_does_not_count(tmp_path, monkeypatch):
    """The owner removes the file between another's opening and locking it: the other must lock the new one."""
    path, real = tmp_path / "x.lock", fcntl.flock
    calls = []

    def remove_first(file, how):
        if not calls:
            path.unlink()
        calls.append(file)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(path, "it"):
        assert len(calls) == 2
        monkeypatch.setattr(fcntl, "flock", real)
        with pytest.raises(StoreBusyError), locked(path, "it"):
            pass


def test_without_locks_a_file_names_the_owner(tmp_path, no_flock):
    path = tmp_path / "x.lock"
    with locked(path, "it"):
        with pytest.raises(StoreBusyError, match=f"process {os.getpid()} on"), locked(path, "it"):
            pass
        assert [item.name for item in tmp_path.iterdir()] == ["x.lock.owner"]
    assert list(tmp_path.iterdir()) == []


def test_without_locks_an_owner_that_has_ended_or_is_silent_is_replaced(tmp_path, no_flock):
    path, place = tmp_path / "x.lock", tmp_path / "x.lock.owner"
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    mine = Owner.this()
    for owner, age in ((Owner(mine.host, int(gone.stdout), "then"), 0.0), (Owner("elsewhere", 1, "then"), 3600.0)):
        place.write_text(json.dumps({"mark": "cytosae-cache lock", **vars(owner)}))
        os.utime(place, (time.time() - age,) * 2)
        with locked(path, "it"):
            assert json.loads(place.read_bytes())["pid"] == mine.pid
    place.write_text(json.dumps({"mark": "cytosae-cache lock", **vars(Owner("elsewhere", 1, "then"))}))
    with pytest.raises(StoreBusyError, match="process 1 on elsewhere, since then"), locked(path, "it"):
        pass
    place.write_text("a file of the user")
    with pytest.raises(StoreBusyError, match="is not a file of cytosae-cache"), locked(path, "it"):
        pass
    assert place.read_text() == "a file of the user"


def test_without_locks_an_owner_gives_signs_of_life(tmp_path, no_flock, monkeypatch):
    monkeypatch.setattr(lock_module, "_SECONDS_BETWEEN_SIGNS", 0.01)
    place = tmp_path / "x.lock.owner"
    with locked(tmp_path / "x.lock", "it"):
        os.utime(place, (0, 0))
        while place.stat().st_mtime == 0:
            time.sleep(0.01)


def test_other_errors_are_not_taken_for_missing_locks(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), locked(tmp_path / "x.lock", "it"):
        pass


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_lock_that_cannot_be_written_leaves_no_file(tmp_path, monkeypatch, request, has_locks):
    def fail(file, data, offset):
        raise OSError(errno.ENOSPC, "full")

    if not has_locks:
        request.getfixturevalue("no_flock")
    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(WriteError, match="^'it' cannot be written: No space left on device"):
        with locked(tmp_path / "x.lock", "it"):
            pass
    assert list(tmp_path.iterdir()) == []
