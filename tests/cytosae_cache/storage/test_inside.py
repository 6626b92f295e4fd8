"""Files are opened inside their folder only, and as the path itself would lead."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.storage import inside
from cytosae_cache.storage.inside import open_inside
from cytosae_cache.storage.local import LocalStorage


@pytest.fixture(params=[True, False], ids=["from folder to folder", "by path"])
def root(request, tmp_path, monkeypatch) -> Path:
    """A folder with links in it, opened in both ways."""
    if not request.param:
        monkeypatch.setattr(inside.os, "supports_dir_fd", set())
    return make_tree(tmp_path)


def make_tree(place: Path) -> Path:
    (place / "outside").mkdir()
    (place / "outside" / "f").write_text("outside")
    root = place / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "f").write_text("inside")
    (root / "link").symlink_to("a/b/f")
    (root / "folder").symlink_to("a")
    (root / "absolute").symlink_to(root.resolve() / "a")
    (root / "a" / "up").symlink_to("../a/b")
    (root / "out").symlink_to("../outside/f")
    (root / "out-folder").symlink_to("../outside")
    (root / "a" / "dangling").symlink_to("nothing")
    (root / "a" / "loop").symlink_to("loop")
    (root / "self").symlink_to(".")
    os.mkfifo(root / "a" / "pipe")
    return root


def read(root: Path, name: str) -> str:
    file = open_inside(root, name)
    try:
        return os.read(file, 100).decode()
    finally:
        os.close(file)


@pytest.mark.parametrize("name", ["a/b/f", "link", "folder/b/f", "absolute/b/f", "a/up/f"])
def test_links_that_stay_inside_are_followed(root, name):
    assert read(root, name) == "inside"
    (root.parent / "another").symlink_to(root)
    assert read(root.parent / "another", name) == "inside"


@pytest.mark.parametrize("name", ["out", "out-folder/f", "../outside/f", "folder/../../outside/f", "/etc/hostname"])
def test_nothing_outside_is_opened(root, name):
    with pytest.raises(StoreCorruptError, match="leads out of the store; it is not followed"):
        open_inside(root, name)


@pytest.mark.parametrize(
    "name", ["a\0b", "a" * 5000, "a/" + "b" * 300, "a/loop", "a/../a/b/f", "./a/b/f", "a//b/f", ""]
)
def test_names_that_are_none_are_refused(root, name):
    with pytest.raises(StoreCorruptError, match="lists an invalid file name"):
        open_inside(root, name)


@pytest.mark.parametrize("name", ["nothing", "nothing/f", "a/dangling"])
def test_a_missing_file_is_named_in_full(root, name):
    with pytest.raises(FileNotFoundError) as caught:
        open_inside(root, name)
    assert caught.value.filename == str(root / name)


@pytest.mark.parametrize("name", ["a/b/f/g", "link/g"])
def test_a_file_in_place_of_a_folder(root, name):
    with pytest.raises(NotADirectoryError) as caught:
        open_inside(root, name)
    assert caught.value.filename == str(root / name)


@pytest.mark.parametrize("name", ["a/pipe", "a/b", "self", "folder", "folder/pipe"])
def test_pipes_and_folders_are_refused_before_they_are_opened(tmp_path, name):
    with pytest.raises(StoreCorruptError, match="is neither a file nor a link"):
        open_inside(make_tree(tmp_path), name)


def test_no_descriptor_is_lost(root):
    before = len(os.listdir("/proc/self/fd"))
    for name in ("a/b/f", "link", "folder/b/f", "out", "nothing/f", "a/b/f/g", "a" * 5000):
        try:
            read(root, name)
        except (OSError, StoreCorruptError):
            continue
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_that_appears_after_the_path_was_checked_is_not_followed(tmp_path, monkeypatch):
    root = make_tree(tmp_path)
    check = inside.check_inside

    def swap(root, name):
        check(root, name)
        (root / "a" / "b" / "f").unlink()
        (root / "a" / "b" / "f").symlink_to("../../../outside/f")

    monkeypatch.setattr(inside, "check_inside", swap)
    with pytest.raises(StoreCorruptError, match="leads out of the store; it is not followed"):
        open_inside(root, "link")


def test_a_link_that_appears_after_it_was_resolved_is_not_followed(tmp_path, monkeypatch):
    root = make_tree(tmp_path)
    walk, calls = inside._walk, []

    def swap(root, parts):
        calls.append(parts)
        if len(calls) == 2:
            (root / "a" / "b" / "f").unlink()
            (root / "a" / "b" / "f").symlink_to("../../../outside/f")
        return walk(root, parts)

    monkeypatch.setattr(inside, "_walk", swap)
    with pytest.raises(StoreCorruptError, match="lists an invalid file name"):
        open_inside(root, "link")
    assert len(calls) == 2


PARTS = st.sampled_from(["a", "b", "f", "link", "folder", "absolute", "up", "out", "out-folder", "nothing"])


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree"))


def outcome(function: Callable[[], str]) -> str:
    """What it returns; nothing if it refuses."""
    try:
        return function()
    except (StoreCorruptError, OSError):
        return ""


@settings(max_examples=200, deadline=None)
@given(st.lists(PARTS, min_size=1, max_size=5))
def test_walking_gives_what_the_resolved_path_gives(tree, parts):
    name = "/".join(parts)
    expected = outcome(lambda: LocalStorage(tree).read(name).decode())
    assert outcome(lambda: read(tree, name)) == expected != "outside"


def test_a_file_that_is_replaced_keeps_its_bytes_for_who_has_it_open(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.write("f", [b"old" * 1000])
    for direct in (False, True):
        file = storage.open("f", direct=direct)
        storage.write("f", [random.Random(0).randbytes(3000)])
        view = memoryview(bytearray(3000))
        file.read_at(0, view)
        assert bytes(view) == b"old" * 1000
        storage.write("f", [b"old" * 1000])
