"""Small real stores for tests."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cytosae_cache.creation import create_store
from cytosae_cache.format.columns import encode_hierarchy
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.metadata import Provenance, hash_tables, write_attributes
from cytosae_cache.format.shard import index_bytes, shard_name
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.shard_data import ShardData
from cytosae_cache.storage.base import ReadableFile
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import StoreWriter

PROVENANCE = Provenance("toy", "d" * 64, "0.0", "2026-01-01T00:00:00+00:00", "cpu")


def make_spec(d_model=8, grid=(2, 2), **changes) -> StoreSpec:
    values = {
        "model_name": "toy_vit",
        "weights_sha256": "ab" * 32,
        "block": 2,
        "n_blocks": 4,
        "d_model": d_model,
        "tokens": TokenLayout(1, 0, grid),
    }
    return StoreSpec(**{**values, **changes})


def make_activations(n, spec=None, seed=0) -> np.ndarray:
    spec = spec or make_spec()
    values = np.random.default_rng(seed).normal(size=(n, *spec.image_shape))
    return values.astype(np.dtype(spec.store_dtype).newbyteorder("<"))


def make_table(n, labels: Sequence[str] = ("a", "b"), patients: Sequence[str] = ("p", "q", "r")) -> ImageTable:
    rows = range(n)
    return ImageTable(
        [f"img_{row:04d}.png" for row in rows],
        [labels[row % len(labels)] for row in rows],
        [patients[row % len(patients)] for row in rows],
    )


def fill_store(store: ActivationStore, activations: np.ndarray, invalid: Sequence[int] = ()) -> ActivationStore:
    with StoreWriter(store) as writer:
        missing = writer.missing_shards()
        writer.discard(missing)
        for shard in missing:
            rows = store.shard_rows(shard)
            writer.submit(make_shard(store, shard, activations[rows.start : rows.stop], invalid))
        return writer.finish()


def make_shard(store, shard, activations, invalid=()) -> ShardData:
    rows = store.shard_rows(shard)
    values = activations.copy()
    for slot, row in enumerate(rows):
        if row in invalid:
            values[slot] = np.nan
    return ShardData(
        shard,
        values,
        [None if row in invalid else bytes([row % 256]) * 32 for row in rows],
        ["cannot be read" if row in invalid else "" for row in rows],
        [0 if row in invalid else 100 + row for row in rows],
    )


def seal(store: ActivationStore) -> None:
    """Record the digests of the files as they are now, like a hostile or faulty program that knows the format."""
    write_attributes(store.storage, store.spec, store.provenance, complete=True, files=hash_tables(store.storage))


def make_store(
    path: Path, activations: np.ndarray, *, spec=None, shard_images=4, invalid=(), compression="none", table=None,
    provenance=PROVENANCE, columns=None,
) -> ActivationStore:  # fmt: skip
    spec = spec or make_spec(d_model=activations.shape[2], grid=(1, activations.shape[1] - 1))
    store = create_store(
        path,
        spec,
        table or make_table(len(activations)),
        provenance,
        columns=columns or {},
        shard_images=shard_images,
        compression=compression,
    )
    return fill_store(store, activations, invalid)


def make_int8_store(path: Path, n: int = 11, **options) -> tuple[np.ndarray, ActivationStore]:
    """Random float16 activations, shape `(n, 5, 16)`, and an int8 store made from them."""
    spec = make_spec(d_model=16, store_dtype="int8")
    activations = np.random.default_rng(0).normal(size=(n, *spec.image_shape)).astype(np.float16)
    return activations, make_store(path, activations, spec=spec, **options)


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder, by relative path."""
    return {str(item.relative_to(folder)): item.read_bytes() for item in sorted(folder.rglob("*")) if item.is_file()}


def record_opens(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every file name is added that the store's storage opens from now on."""
    opened: list[str] = []
    open_file = store.storage.open

    def record(name: str, *, direct: bool = False, n_bytes: int | None = None) -> ReadableFile:
        opened.append(name)
        return open_file(name, direct=direct, n_bytes=n_bytes)

    monkeypatch.setattr(store.storage, "open", record)
    return opened


def make_hollow_store(path: Path, n_images: int, *, shard_images=1, d_model=1) -> ActivationStore:
    """A complete store whose metadata and tables are real, and whose only shard file, the one looked at, is sparse."""
    spec = make_spec(d_model=d_model, grid=(0, 0))
    table = make_table(n_images)
    store = create_store(path, spec, table._replace(path=sorted(table.path)), PROVENANCE, shard_images=shard_images)
    tables = {
        "images/valid": np.ones(n_images, dtype=bool),
        "images/crc32c": np.arange(n_images, dtype=np.uint32),
        "shards/n_bytes": np.full(store.n_shards, 100, dtype=np.uint64),
    }
    for name, data in encode_hierarchy(tables).items():
        store.storage.write(name, [data])
    shard = path / shard_name(store.n_shards // 16)
    shard.parent.mkdir(parents=True)
    with shard.open("wb") as file:
        file.truncate(index_bytes(shard_images) + shard_images * spec.record_bytes)
    seal(store)
    return ActivationStore.open(path)


@contextlib.contextmanager
def count_system_calls() -> Iterator[Counter[str]]:
    """Count the calls of this thread to the operating system by name, such as `open` and `stat`."""
    calls: Counter[str] = Counter()

    def count(frame: Any, event: str, called: Any) -> None:
        name = called.__name__ if event == "c_call" else ""
        if getattr(called, "__module__", None) in ("posix", "nt", "io") and name not in (
            "",
            "fspath",
            "_path_normpath",
        ):
            calls[name] += 1

    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(None)
