"""Sets of files: old or new, never both and never halves, whatever is killed or fails, and at whatever call."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cytosae_cache.errors import StoreBusyError, WriteError
from cytosae_cache.storage.file_set import replacing_set, undo_set

ROOT = Path(__file__).parents[3]
NAMES = ("a.csv", "b.zarr", "c.csv")

REPLACE = """
import os, signal, sys
from pathlib import Path
from cytosae_cache.storage.file_set import replacing_set

left = int(sys.argv[2])

def killing(real):
    def call(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for name in ("rename", "replace", "unlink", "rmdir", "fsync", "open", "mkdir"):
    setattr(os, name, killing(getattr(os, name)))
from tests.cytosae_cache.storage.test_file_set import write
write(Path(sys.argv[1]), "new")
"""


def write(folder, text):
    """Write the set: two files and a folder."""
    with replacing_set([folder / name for name in NAMES]) as (one, two, three):
        one.write_text(text)
        two.mkdir()
        (two / "x").write_text(text)
        (two / "y").write_text(text)
        three.write_text(text)


def contents(folder):
    """What a reader finds: the text of each member, None where it is missing."""
    found = []
    for name in NAMES:
        path = folder / name
        files = [path / "x", path / "y"] if path.suffix == ".zarr" else [path]
        texts = {file.read_text() if file.exists() else None for file in files}
        assert len(texts) == 1, f"half of {name}"
        found.append(texts.pop())
    return found


def put_back(folder):
    """What the same command does first."""
    undo_set([folder / name for name in NAMES])


@pytest.mark.parametrize("before", [None, "old"])
def test_a_set_that_was_killed_at_any_call_is_undone(tmp_path, before):
    states = set()
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        if before:
            write(folder, before)
        (folder / "mine.txt").write_text("mine")
        ended = subprocess.run([sys.executable, "-c", REPLACE, str(folder), str(number)], check=False, cwd=ROOT)
        if ended.returncode == 0:
            assert contents(folder) == ["new"] * 3
            break
        assert ended.returncode == -signal.SIGKILL
        found = contents(folder)
        assert not {"old", "new"} <= set(found), "a mixture"
        states.add(tuple(found))
        put_back(folder)
        assert contents(folder) in (["new"] * 3, [before] * 3)
        write(folder, "newer")
        assert contents(folder) == ["newer"] * 3
        assert sorted(path.name for path in folder.iterdir()) == sorted([*NAMES, "mine.txt"])
    else:
        raise AssertionError("it never ended")
    assert len(states) >= 4, "kills came between the renames, too"


@pytest.mark.parametrize("before", [None, "old"])
@pytest.mark.parametrize("call", ["rename", "fsync", "open", "unlink"])
def test_a_call_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, before, call):
    real, n_failed = getattr(os, call), 0
    for number in range(1, 200):
        folder, left = tmp_path / str(number), [number]
        folder.mkdir()
        if before:
            write(folder, before)

        def fail(*arguments, left=left, **options):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "broken")
            return real(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            try:
                write(folder, "new")
            except WriteError as error:
                n_failed += 1
                assert str(error) == (  # noqa: PT017 - some calls may fail
                    f"'{folder}' cannot be written: Input/output error. Check the disk, then run the command again"
                )
                assert contents(folder) == [before] * 3
                assert sorted(path.name for path in folder.iterdir()) == (sorted(NAMES) if before else [])
            else:
                assert contents(folder) == ["new"] * 3
        write(folder, "newer")
        assert sorted(path.name for path in folder.iterdir()) == sorted(NAMES)
        if left[0] > 0:
            break
    assert n_failed or call == "unlink"  # too late to fail: everything is in place


def test_files_of_the_user_are_left_alone(tmp_path):
    """A file that has the name of one of the set by now, and one that has the journal's name."""
    for number in range(1, 200):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", REPLACE, str(folder), str(number)], check=False, cwd=ROOT)
        if (folder / "a.csv").exists():
            break
    assert contents(folder)[2] is None
    (folder / "a.csv").unlink()
    (folder / "a.csv").write_text("mine")
    put_back(folder)
    assert (folder / "a.csv").read_text() == "mine"
    journal = folder / "c.csv.journal"
    for text in ("mine", "{}", "[" * 5000, json.dumps({"mark": "cytosae-cache files", "pid": "1", "files": {}})):
        journal.write_text(text)
        with pytest.raises(
            StoreBusyError, match=r"c.csv.journal' is not a file of cytosae-cache, but a set of files needs"
        ):
            write(folder, "new")
        assert journal.read_text() == text
    assert (folder / "a.csv").read_text() == "mine"


def test_a_set_of_one_is_replaced_in_one_step(tmp_path):
    for text in ("old", "new"):
        with replacing_set([tmp_path / "a.csv"]) as (temporary,):
            temporary.write_text(text)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "new"}
