"""Files and folders appear only once they are complete, and are replaced in one step."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cytosae_cache.errors import WriteError
from cytosae_cache.storage import atomic
from cytosae_cache.storage.atomic import create_file, make_folder, replacing, replacing_path, write_file

ROOT = Path(__file__).parents[3]

KILLED = """
import os, signal, sys
from pathlib import Path
from cytosae_cache.storage import atomic

left, real = int(sys.argv[2]), os.rename
if sys.argv[3] == "no exchange":
    atomic._exchange = lambda one, other: False

def killing(*arguments, real):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

for name in ("rename", "replace", "rmdir"):
    setattr(os, name, lambda *arguments, real=getattr(os, name), **options: killing(*arguments, real=real))
with atomic.replacing_path(Path(sys.argv[1])) as temporary:
    temporary.mkdir()
    (temporary / "new").touch()
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_keeps_its_old_contents_until_it_is_replaced(tmp_path):
    path = tmp_path / "f"
    write_file(path, b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:  # noqa: PT012
        os.write(file, b"ne")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_small_files_remove_what_killed_processes_left(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"f.{dead.pid}.partial").touch()
    write_file(tmp_path / "f", b"new")
    assert names(tmp_path) == ["f"]


@pytest.mark.parametrize("how", ["exchange", "no exchange"])
def test_a_folder_that_was_killed_while_it_is_replaced_is_whole_again_at_the_next_call(tmp_path, how):
    path = tmp_path / "page"
    for number in range(1, 20):
        path.mkdir(exist_ok=True)
        (path / "old").touch()
        (path / "new").unlink(missing_ok=True)
        ended = subprocess.run([sys.executable, "-c", KILLED, str(path), str(number), how], check=False, cwd=ROOT)
        if how == "exchange":
            assert path.is_dir(), "never missing"
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL
        with pytest.raises(KeyError), replacing_path(path):
            raise KeyError
        assert names(path) in (["old"], ["new"])
        assert names(tmp_path) == ["page"]
    assert number > 1
    assert names(path) == ["new"]


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("folder", [True, False])
def test_a_name_that_cannot_be_made_durable_is_taken_back(tmp_path, monkeypatch, before, folder):
    path = tmp_path / "x"

    def write(text):
        with replacing_path(path) as temporary:
            if folder:
                temporary.mkdir()
            (temporary / "y" if folder else temporary).write_bytes(text)

    if before:
        write(before)

    def fail(place):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(atomic, "sync_folder", fail)
    with pytest.raises(WriteError, match="x' cannot be written: Input/output error"):
        write(b"new")
    assert names(tmp_path) == (["x"] if before else [])
    if before:
        assert (path / "y" if folder else path).read_bytes() == before


def test_permissions_stay(tmp_path):
    for kind in ("file", "folder"):
        path = tmp_path / kind
        path.mkdir() if kind == "folder" else path.touch()
        path.chmod(0o700)
        with replacing_path(path) as temporary:
            temporary.mkdir() if kind == "folder" else temporary.touch()
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("links", [True, False])
def test_a_file_is_created_once(tmp_path, monkeypatch, links):
    def fail(*arguments):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "key"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"key.{dead.pid}.partial").touch()
    assert create_file(path, b"first", mode=0o600)
    assert not create_file(path, b"second", mode=0o600)
    assert path.read_bytes() == b"first"
    assert path.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["key"]

    def refuse(*arguments):
        raise OSError(errno.EROFS, "read-only by now")

    monkeypatch.setattr(os, "open", refuse)
    assert not create_file(path, b"third")


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "x"
    with pytest.raises(WriteError, match=f"^'{place}' cannot be written: Not a directory. Use another --root_dir or"):
        make_folder(place)
