"""Several writers of one store, on a disk and on S3: the bytes are those of a single writer, whoever is killed."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from cytosae_cache import writer as writers
from cytosae_cache.format.shard import shard_name
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.verify import verify_store
from cytosae_cache.writer import StoreWriter, create_store
from tests.support.s3 import serve_s3
from tests.support.stores import PROVENANCE, fill_store, make_activations, make_shard, make_spec, make_table

N, SHARD_IMAGES = 46, 4
N_SHARDS = 12
START = multiprocessing.get_context("spawn")


@pytest.fixture(params=["disk", "s3"])
def location(request, tmp_path, monkeypatch):
    if request.param == "disk":
        yield str(tmp_path / "s.zarr")
        return
    with serve_s3(monkeypatch):
        yield "s3://cells/s.zarr"


def _create(location: str, dtype: str = "float16") -> ActivationStore:
    spec = make_spec(d_model=8, grid=(1, 4), store_dtype=dtype)
    return create_store(location, spec, make_table(N), PROVENANCE, shard_images=SHARD_IMAGES)


def _activations() -> np.ndarray:
    return make_activations(N, make_spec(d_model=8, grid=(1, 4)))


def _work(location: str, shards: list[int], killed_at: int | None = None) -> None:
    """A writer of some shards, which is killed between the file and the mark of one of them."""
    store, activations, plain = ActivationStore(location), _activations(), writers.write_mark

    def write_mark(storage, shard, *arguments, **options):
        if shard == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(storage, shard, *arguments, **options)

    writers.write_mark = write_mark
    with StoreWriter(store, shared=True) as writer:
        missing = writer.missing_shards(shards)
        writer.discard(missing)
        for shard in missing:
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop], [5]))
        writer.finish_if_last()


def _run(location: str, parts: list[list[int]], killed_at: int | None = None) -> list[int | None]:
    """Let a process write each part, all at once, the first of them killed; returns their exit codes."""
    children = [
        START.Process(target=_work, args=(location, part, None if number else killed_at))
        for number, part in enumerate(parts)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def _files(location: str) -> dict[str, bytes]:
    storage = open_storage(location)
    return {name: storage.read(name) for name in storage.names(with_litter=True)}


@pytest.fixture
def expected(tmp_path) -> dict[str, bytes]:
    path = str(tmp_path / "single.zarr")
    fill_store(_create(path), _activations(), [5])
    return _files(path)


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        [list(range(12)), list(range(12)), list(range(11, -1, -1))],
    ],
    ids=["apart", "all the same"],
)
def test_several_writers_leave_the_bytes_of_one(location, expected, parts):
    _create(location)
    assert _run(location, parts) == [0, 0, 0]
    assert _files(location) == expected
    assert verify_store(ActivationStore.open(location)).sound


def test_another_writer_takes_the_place_of_one_that_was_killed(location, expected):
    _create(location)
    assert _run(location, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], killed_at=3) == [-signal.SIGKILL, 0]
    assert not ActivationStore(location).complete
    assert _run(location, [[0, 1, 2, 3, 4, 5]]) == [0]
    assert _files(location) == expected


def test_a_damaged_shard_is_written_again(location, expected):
    store = _create(location)
    assert _run(location, [[0, 1, 2, 3]]) == [0]
    store.storage.write(shard_name(2), [b"short"])
    assert _run(location, [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]) == [0, 0]
    if not ActivationStore(location).complete:
        assert _run(location, [[]]) == [0]
    assert _files(location) == expected


def test_the_last_writer_does_not_complete_a_store_with_a_damaged_shard(location, expected):
    store = _create(location)
    assert _run(location, [[0, 1, 2, 3]]) == [0]
    store.storage.write(shard_name(2), [b"short"])
    assert _run(location, [list(range(4, 12))]) == [0]
    unfinished = ActivationStore(location)
    assert (unfinished.complete, unfinished.n_finished_shards) == (False, 11)
    assert _run(location, [[0, 1, 2, 3]]) == [0]
    assert _files(location) == expected


def test_a_writer_that_comes_too_late_changes_nothing(location, expected):
    store = _create(location)
    late = StoreWriter(store, shared=True)
    assert late.missing_shards() == list(range(N_SHARDS))
    assert _run(location, [list(range(12))]) == [0]
    with late:
        rows = store.shard_rows(1)
        late.submit(make_shard(store, 1, _activations()[rows.start : rows.stop] + 1))
        assert late.finish_if_last().complete
    assert _files(location) == expected
