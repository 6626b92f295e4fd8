"""A store takes the place of another one: whenever the process is killed, one of them is there, whole."""

import subprocess
import sys

import pytest

from cytosae_cache.storage import swap as swap_module
from cytosae_cache.storage.swap import finish_swap, place_beside, swap

KILLED_AT = """
import os, shutil, signal, sys
from pathlib import Path
from cytosae_cache.storage import swap as module

place, wanted, can_exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
n = 0

def killing(real):
    def call(*arguments, **options):
        global n
        n += 1
        if n == wanted:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

for name in ("replace", "rename", "unlink", "rmdir", "fsync"):
    setattr(os, name, killing(getattr(os, name)))
module.exchange = killing(module.exchange) if can_exchange else lambda one, other: False
module.swap(place)
"""


def make_store(folder, name):
    """Something that has the shape of a store."""
    (folder / "activations").mkdir(parents=True)
    (folder / "activations" / "data").write_text(name)
    (folder / "zarr.json").write_text(name)


def contents(folder):
    return {item.relative_to(folder).as_posix(): item.read_text() for item in folder.rglob("*") if item.is_file()}


OLD = {"activations/data": "old", "zarr.json": "old"}
NEW = {"activations/data": "new", "zarr.json": "new"}


@pytest.mark.parametrize("how", ["exchange", "rename"])
def test_a_kill_at_any_call_leaves_one_whole_store_and_the_rest_is_done_later(tmp_path, how):
    seen = set()
    for number in range(1, 40):
        place = tmp_path / str(number) / "a.zarr"
        make_store(place, "old")
        make_store(place_beside(place), "new")
        done = subprocess.run([sys.executable, "-c", KILLED_AT, place, str(number), how], check=False)
        if how == "exchange":
            assert contents(place) in (OLD, NEW)
            seen.add(contents(place) == NEW)
        finish_swap(place)
        # Before the note was written nothing had begun: the next `swap` does it all.
        if contents(place) == OLD:
            swap(place)
        assert contents(place) == NEW
        assert [item.name for item in place.parent.iterdir()] == ["a.zarr"]
        if done.returncode == 0:
            break
    else:
        raise AssertionError("it never ended")
    assert number > 5
    assert how == "rename" or seen == {True, False}


def test_a_note_about_stores_that_are_gone_is_removed(tmp_path):
    place = tmp_path / "a.zarr"
    make_store(place, "old")
    (tmp_path / "a.zarr.swap").write_text("0" * 64)
    finish_swap(place)
    assert contents(place) == OLD
    assert not (tmp_path / "a.zarr.swap").exists()


def test_a_store_that_states_the_same_as_the_old_one_takes_its_place(tmp_path):
    place = tmp_path / "a.zarr"
    for folder, data in ((place, "damaged"), (place_beside(place), "sound")):
        make_store(folder, "same")
        (folder / "activations" / "data").write_text(data)
    swap(place)
    assert contents(place) == {"activations/data": "sound", "zarr.json": "same"}
    assert [item.name for item in tmp_path.iterdir()] == ["a.zarr"]


def test_without_an_old_store_the_new_one_gets_its_place(tmp_path):
    place = tmp_path / "a.zarr"
    make_store(place_beside(place), "new")
    swap(place)
    assert contents(place) == NEW


def test_an_old_store_that_was_moved_aside_comes_back_if_the_new_one_is_gone(tmp_path):
    place = tmp_path / "a.zarr"
    make_store(tmp_path / "a.zarr.replaced", "old")
    (tmp_path / "a.zarr.swap").write_text("0" * 64)
    finish_swap(place)
    assert contents(place) == OLD


def test_names_are_exchanged_in_one_step_here(tmp_path):
    make_store(tmp_path / "a", "old")
    make_store(tmp_path / "b", "new")
    assert swap_module.exchange(tmp_path / "a", tmp_path / "b") == (sys.platform == "linux")
    if sys.platform == "linux":
        assert (contents(tmp_path / "a"), contents(tmp_path / "b")) == (NEW, OLD)
