"""Finishing a store: what is synced and in which order, what a kill leaves, and how much memory it takes."""

import collections
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreCorruptError
from cytosae_cache.format.marks import ShardMark, make_tables, mark_name, read_mark, write_mark
from cytosae_cache.format.shard import shard_name
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter
from tests.support.stores import (
    PROVENANCE,
    fill_store,
    make_activations,
    make_shard,
    make_spec,
    make_store,
    make_table,
    read_files,
)


def _record_events(monkeypatch) -> list[tuple[str, str]]:
    """Names of what is synced and renamed from now on, in order; the real calls are made."""
    events: list[tuple[str, str]] = []
    sync, replace = os.fsync, Path.replace

    def record_sync(file):
        events.append(("sync", str(Path(f"/proc/self/fd/{file}").readlink())))
        sync(file)

    def record_replace(path, target):
        events.append(("rename", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    return events


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names open files as Linux does")
def test_a_shard_is_synced_before_its_mark_appears_and_nothing_is_synced_twice(tmp_path, monkeypatch):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(12), PROVENANCE, shard_images=1)
    events = _record_events(monkeypatch)
    fill_store(store, make_activations(12))
    for shard in range(12):
        name = str(store.path / shard_name(shard))
        synced = next(at for at, (what, where) in enumerate(events) if what == "sync" and where.startswith(f"{name}."))
        marked = events.index(("rename", str(store.path / mark_name(shard))))
        assert synced < events.index(("rename", name)) < marked
    counts = collections.Counter(where for what, where in events if what == "sync")
    assert not [where for where in counts if "/progress" in where]
    # The outermost folders contain the tables, the shards and the group's metadata, which is last.
    assert {where for where, n in counts.items() if n > 1} <= {str(tmp_path), str(store.path)}
    assert sum("/activations/c/" in where for where in counts.elements()) == 3 * 12


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from cytosae_cache.store import ActivationStore
from tests.support.stores import fill_store, make_activations
left, replace = int(sys.argv[2]), Path.replace

def kill(path, target):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)

Path.replace = kill
fill_store(ActivationStore(Path(sys.argv[1])), make_activations(6), invalid=[3])
"""


def test_a_build_killed_before_any_of_its_renames_ends_with_the_same_bytes(tmp_path):
    whole = make_store(tmp_path / "whole.zarr", make_activations(6), invalid=[3], shard_images=2)
    expected = read_files(whole.path)
    store = create_store(tmp_path / "s.zarr", make_spec(grid=(1, 4)), make_table(6), PROVENANCE, shard_images=2)
    kills = 0
    for number in (1, 2, 4, 9, 12):
        command = [sys.executable, "-c", KILLED, str(store.path), str(number)]
        kills += subprocess.run(command, check=False).returncode == -signal.SIGKILL
        for shard in range(3):
            mark = read_mark(store.storage, shard)
            assert mark is None or store.storage.size(shard_name(shard)) == mark.n_bytes
    assert kills == 5
    store = fill_store(ActivationStore(store.path), make_activations(6), invalid=[3])
    assert read_files(store.path) == expected
    assert verify_store(store).sound


def _mark(shard: int, shard_images: int, d_model: int) -> ShardMark:
    rows = range(shard * shard_images, (shard + 1) * shard_images)
    sums = [float(shard)] * d_model
    return ShardMark(
        n_bytes=1000 + shard, crc32c=shard, image_crc32c=list(rows), sha256=[f"{row:064x}" for row in rows],
        source_bytes=list(rows), reason=["bad" if row % 7 == 0 else "" for row in rows], count=5, sum=sums, sum_sq=sums,
    )  # fmt: skip


def test_tables_take_the_memory_of_their_arrays_however_many_marks_there_are():
    n_shards, shard_images, d_model = 300, 16, 256
    tracemalloc.start()
    try:
        tables = make_tables(
            (_mark(shard, shard_images, d_model) for shard in range(n_shards)),
            n_images=n_shards * shard_images, shard_images=shard_images, d_model=d_model,
        )  # fmt: skip
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * sum(table.nbytes for table in tables.values()) + (1 << 17)
    assert tables["images/crc32c"].tolist() == list(range(n_shards * shard_images))
    assert np.array_equal(tables["images/valid"], np.arange(n_shards * shard_images) % 7 != 0)
    assert bytes(tables["images/sha256"][1234]) == (1234).to_bytes(32)
    assert tables["moments/sum"][-1].tolist() == [n_shards - 1.0] * d_model


def test_a_mark_of_other_images_is_refused(tmp_path):
    store = create_store(tmp_path / "s.zarr", make_spec(), make_table(6), PROVENANCE, shard_images=4)
    with StoreWriter(store) as writer:
        for shard, rows in ((0, slice(0, 4)), (1, slice(4, 6))):
            writer.submit(make_shard(store, shard, make_activations(6)[rows]))
    write_mark(store.storage, 1, read_mark(store.storage, 0))
    with (
        StoreWriter(ActivationStore(store.path)) as writer,
        pytest.raises(
            StoreCorruptError, match=r"'progress/1.json' describes 4 images and 8 channels, expected 2 and 8"
        ),
    ):
        writer.finish()
