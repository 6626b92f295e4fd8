"""`verify` finds every damage of a store, and no problem in a sound one."""

import shutil

import numpy as np
import pytest
import zarr

from cytosae_cache.errors import StoreCorruptError, StoreError
from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from tests.support.stores import make_activations, make_store, seal


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
    assert any(message in problem for problem in verify_store(store).problems)


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


def test_a_file_that_does_not_belong_is_found(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    (store.path / "images" / "extra").write_text("x")
    assert any("does not belong" in problem for problem in verify_store(store).problems)


def test_a_missing_table_is_found(tmp_path):
    store = make_store(tmp_path / "s.zarr", make_activations(6))
    shutil.rmtree(store.path / "images" / "crc32c")
    assert any("images/crc32c" in problem for problem in verify_store(store).problems)
