"""`verify` finds every damage of a store, and no problem in a sound one."""

import json
import shutil

import numpy as np
import pytest
import zarr

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreCorruptError, StoreError
from cytosae_cache.format.metadata import write_attributes
from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_spec, make_store, make_table, seal


@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_a_sound_store_has_no_problems(tmp_path, compression):
    store = make_store(tmp_path / "s.zarr", make_activations(11), invalid=[2], compression=compression)
    seen = []
    report = verify_store(store, on_shard=seen.append)
    assert report.sound
    assert report.n_shards == 3
    assert seen == [0, 1, 2]
    assert report.n_bytes == sum((store.path / shard_name(shard)).stat().st_size for shard in range(3))


def test_any_flipped_bit_of_a_shard_is_found(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / shard_name(1)
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for bit in rng.choice(len(sound) * 8, size=40, replace=False):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        assert any("expected" in problem for problem in verify_store(store).problems)
    path.write_bytes(sound)
    assert verify_store(store).sound


@pytest.mark.parametrize("damage", ["cut", "missing", "extra"])
def test_truncated_missing_and_extra_files_are_found(tmp_path, damage):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    path = store.path / shard_name(1)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif damage == "missing":
        path.unlink()
    else:
        path.with_name("9").write_bytes(b"x")
    message = {"cut": "expected", "missing": "is missing", "extra": "does not belong"}[damage]
    report = verify_store(store)
    assert any(message in line for line in [*report.problems, *report.foreign])


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("images/path", "zzz", "not sorted"),
        ("images/valid", False, "disagrees with images/reason"),
        ("images/crc32c", 1, "fail their checksum"),
        ("moments/count", 1, "does not match the valid images"),
        ("moments/sum", 1.5, "do not equal the sums of its activations"),
        ("moments/sum_sq", 1.5, "do not equal the sums of its activations"),
        ("shards/crc32c", 1, "expected"),
        ("shards/n_bytes", 1, "expected 1"),
    ],
)
def test_wrong_tables_are_found(tmp_path, place, value, message):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    zarr.open_group(store.path, mode="r+")[place][0] = value
    with pytest.raises(StoreCorruptError, match="was changed or damaged"):
        ActivationStore.open(store.path).column(place)
    # Sealed again, like a store of a faulty program: the rules between tables must catch it.
    seal(store)
    problems = verify_store(ActivationStore.open(store.path)).problems
    assert any(message in problem for problem in problems), problems


def test_any_flipped_bit_of_any_file_is_found_or_harmless(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6), invalid=[2])
    sound = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    described = store.describe()
    rng = np.random.default_rng(1)
    paths = sorted(sound)
    for number in range(150):
        path = paths[number % len(paths)]
        data = bytearray(sound[path])
        bit = int(rng.integers(len(data) * 8))
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            changed = ActivationStore.open(store.path)
            found = not verify_store(changed).sound
            harmless = changed.describe() == described
        except StoreError:
            found = True
        assert found or harmless, (path, bit)
        path.write_bytes(sound[path])
    assert verify_store(ActivationStore.open(store.path)).sound


def test_files_and_folders_that_do_not_belong_are_found_and_are_no_damage(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    for name in ("images/extra", "activations/notes", "mine/deep/a.txt", "mine/b.txt", "images/old/c.txt"):
        path = store.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    report = verify_store(store)
    assert not report.problems
    assert not report.sound
    assert report.foreign == [
        f"'{store.path}/activations/notes' does not belong to the store",
        f"'{store.path}/images/extra' does not belong to the store",
        f"'{store.path}/images/old/' (1 file) does not belong to the store",
        f"'{store.path}/mine/' (2 files) does not belong to the store",
    ]


LITTER = (
    ".DS_Store", "images/Thumbs.db", "images/label/._c", "activations/c/.nfs0000000001", "activations/c/0/desktop.ini",
    "@eaDir/zarr.json@SynoEAStream", "__MACOSX/images/._path", "progress/._0.json",
)  # fmt: skip


def test_what_operating_systems_leave_is_named_and_harmless(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    for name in LITTER:
        path = store.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    report = verify_store(ActivationStore.open(store.path))
    assert report.sound
    assert report.litter == sorted(f"{store.path}/{name}" for name in LITTER)


def test_litter_that_came_during_the_build_may_change_later(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    for name in LITTER:
        path = store.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    assert ActivationStore(store.path).n_finished_shards == 0
    store = fill_store(store, make_activations(6))
    assert not {name for name in store.files if name in LITTER}
    for name in LITTER:
        (store.path / name).write_text("changed")
    assert verify_store(ActivationStore.open(store.path)).sound
    # A store of an older version may have recorded them.
    attributes = json.loads((store.path / "zarr.json").read_bytes())["attributes"]["cytosae_cache"]
    files = {**attributes["files"], ".DS_Store": "0" * 64}
    write_attributes(store.storage, store.spec, store.provenance, complete=True, files=files)
    assert verify_store(ActivationStore.open(store.path)).sound


def test_a_folder_with_nothing_but_litter_counts_as_empty(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / ".DS_Store").write_text("x")
    assert verify_store(make_store(tmp_path / "s.zarr", make_activations(3))).sound


def test_a_missing_table_is_found(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    shutil.rmtree(store.path / "images" / "crc32c")
    assert any("images/crc32c" in problem for problem in verify_store(store).problems)
