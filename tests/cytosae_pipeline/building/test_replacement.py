"""`build --overwrite` and `import --overwrite`: the old store stays whole until the new one is complete."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.pictures import LAYOUT, change_pictures

KILLED_AT_SHARD = """
import os, signal, sys
from cytosae_cache import writer

n, real = 0, writer.write_mark

def killing(*arguments, **options):
    global n
    n += 1
    if n == int(os.environ["KILLED_AT_SHARD"]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(*arguments, **options)

writer.write_mark = killing
from cytosae_pipeline.cli.app import main
sys.argv[0] = "cytosae-cache"
main()
"""


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_command(place, *more):
    return [
        "build", "--root_dir", place.root, "--dataset_name", "toy", "--model_path", place.vit, "--layout", LAYOUT,
        "--workers", "0", "--shard_images", "5", *more,
    ]  # fmt: skip


def kill(command, at_shard):
    env = {**os.environ, "KILLED_AT_SHARD": str(at_shard)}
    done = subprocess.run([sys.executable, "-c", KILLED_AT_SHARD, *map(str, command)], env=env, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.fixture(autouse=True)
def fixed_time(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def test_a_killed_replacement_leaves_the_old_store_and_the_same_command_finishes_it(with_store, tmp_path):
    store, old = with_store.store, files(with_store.store)
    change_pictures(with_store.images)
    for at_shard in (1, 3):
        kill(build_command(with_store, "--overwrite"), at_shard)
        assert files(store) == old
        assert verify_store(ActivationStore.open(store)).sound
    output = with_store.build("--overwrite").output
    assert "resuming after 10 images" in output
    new = files(store)
    assert new != old
    shutil.rmtree(store)
    with_store.build()
    assert files(store) == new
    assert sorted(path.name for path in store.parent.iterdir()) == [store.name, f"{store.name}.skipped.csv"]


def test_images_that_change_while_a_replacement_is_interrupted_begin_it_anew(with_store):
    kill(build_command(with_store, "--overwrite"), 3)
    change_pictures(with_store.images)
    output = with_store.build("--overwrite").output
    assert "starting again from scratch, as --overwrite asks" in output
    new = files(with_store.store)
    shutil.rmtree(with_store.store)
    with_store.build()
    assert files(with_store.store) == new


def test_a_replacement_with_other_options_begins_anew(with_store):
    kill(build_command(with_store, "--overwrite"), 3)
    output = with_store.build("--overwrite", "--shard_images", 4).output
    assert "starting again from scratch, as --overwrite asks: the unfinished store" in output
    assert ActivationStore(with_store.store).shard_images == 4


def test_a_build_without_overwrite_mentions_an_unfinished_replacement(with_store):
    kill(build_command(with_store, "--overwrite"), 3)
    output = with_store.build().output
    assert f"'{with_store.store}.replacing' is the unfinished replacement of this store" in output
    assert "already complete: nothing to do" in output


def test_an_unfinished_store_is_resumed_even_with_overwrite(with_images):
    kill(build_command(with_images), 3)
    assert "resuming after 10 images" in with_images.build("--overwrite").output


def test_the_old_store_is_deleted_first_if_the_user_asks_for_it(with_store):
    change_pictures(with_store.images)
    kill(build_command(with_store, "--overwrite", "--delete_first"), 3)
    assert not ActivationStore(with_store.store).complete
    assert not with_store.store.with_name(f"{with_store.store.name}.replacing").exists()
    assert "resuming after 10 images" in with_store.build("--overwrite", "--delete_first").output
    output = with_store.build("--delete_first", code=2).output
    assert "delete_first says how an existing store is replaced: give overwrite as well" in output


def test_no_room_for_both_names_the_option(with_store, monkeypatch):
    monkeypatch.setattr("cytosae_pipeline.building.store_place.free_bytes", lambda store: 100)
    old = files(with_store.store)
    output = with_store.build("--overwrite", code=1).output
    assert "or add --delete-first to delete the old store before" in output
    assert files(with_store.store) == old


def test_a_store_behind_a_link_is_replaced_where_the_link_leads(with_store, tmp_path):
    there = tmp_path / "disk2" / "x.zarr"
    there.parent.mkdir()
    shutil.move(with_store.store, there)
    link = with_store.root / "out" / "activations" / "toy" / "linked.zarr"
    link.symlink_to(there)
    before = files(there)
    change_pictures(with_store.images)
    with_store.build("--overwrite", "--store", link)
    assert link.is_symlink()
    assert files(there) != before
    assert verify_store(ActivationStore.open(link)).sound
    assert [path.name for path in there.parent.iterdir() if path.is_dir()] == ["x.zarr"]


def test_a_store_of_other_options_at_a_chosen_place_is_refused(with_store):
    output = with_store.build("--store", with_store.store, "--block_layer", -3, code=1).output
    assert "is not the one that the options describe (store, options): block: 2, 1" in output


def test_an_import_is_replaced_in_the_same_way(with_images, tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "x.npy"
    options = [source, "--dataset_name", "e", "--model_name", "m", "--shard_images", "5"]
    np.save(source, rng.standard_normal((20, 8)).astype(np.float32))
    with_images.run("import", *options)
    (store,) = (with_images.root / "out" / "activations" / "e").glob("*.zarr")
    old = files(store)
    np.save(source, rng.standard_normal((20, 8)).astype(np.float32))
    kill(["import", *options, "--root_dir", with_images.root, "--overwrite"], 3)
    assert files(store) == old
    with_images.run("import", *options, "--overwrite")
    new = files(store)
    shutil.rmtree(store)
    with_images.run("import", *options)
    assert new == files(store) != old


def test_a_store_without_a_readable_image_replaces_no_other(with_store):
    old = files(with_store.store)
    for path in with_store.images.rglob("*.png"):
        path.write_bytes(b"")
    assert "no image could be read of 23 images" in with_store.build("--overwrite", code=1).output
    assert files(with_store.store) == old
    assert not with_store.store.with_name(f"{with_store.store.name}.replacing").exists()
    change_pictures(with_store.images)
    with_store.build("--overwrite")
    assert ActivationStore(with_store.store).valid.sum() == 22


def test_the_list_of_unreadable_images_goes_with_them(with_store):
    skipped = with_store.store.with_name(f"{with_store.store.name}.skipped.csv")
    assert skipped.exists()
    next(with_store.images.rglob("broken.png")).write_bytes(next(with_store.images.rglob("000.png")).read_bytes())
    with_store.build("--overwrite")
    assert not skipped.exists()


def test_a_damaged_store_is_repaired_though_the_new_one_states_the_same(with_images):
    with_images.build()
    shard = next(path for path in with_images.store.glob("activations/c/**/*") if path.is_file())
    sound = files(with_images.store)
    shard.write_bytes(shard.read_bytes()[:-1])
    with_images.build("--overwrite")
    assert files(with_images.store) == sound
