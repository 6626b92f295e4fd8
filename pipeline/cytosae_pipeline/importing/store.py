"""`import`: embeddings of another program as an activation store, written shard by shard and resumable."""

import hashlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.marks import remove_marks
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore
from cytosae_cache.writer import ShardData, StoreWriter, create_store
from cytosae_pipeline.building.store_place import delete_store, disk_messages, make_provenance, require_space
from cytosae_pipeline.config.imports import ImportConfig, parse_grid
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.labels import RowTexts, describe_rows
from cytosae_pipeline.importing.part import Part
from cytosae_pipeline.importing.source import hash_source, open_parts, read_rows
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

_SHARD_BYTES, _MOST_SHARD_ROWS = 1 << 27, 4096

NOT_FINITE = "contains NaN or infinity"
"""Reason for a row that is set aside."""


@dataclass(frozen=True)
class ImportResult:
    """What `import` did."""

    store: Location
    """The complete store."""
    n_images: int
    """Rows of the store."""
    n_skipped: int
    """Rows set aside because they are not finite."""
    n_tokens: int
    """Tokens per row."""
    d_model: int
    """Channels."""
    status: Literal["imported", "resumed", "already complete"]
    """What had to be done."""
    seconds: float
    """Duration in seconds."""


def import_embeddings(config: ImportConfig) -> ImportResult:
    """Write embeddings of another program as a store, resume an interrupted import, or do nothing if it is complete.

    Raises:
        UserError: If the source, the labels or an option do not fit.
        StoreError: If an existing store was made from something else, or the disk is full.
    """
    started = time.monotonic()
    if config.dataset_name is None:
        raise UserError("name the data set: --dataset_name NAME")
    parts = open_parts(config)
    source = hash_source(parts)
    spec = make_imported_spec(parts[0], source, config)
    place = open_storage(config.store or Workspace(config.root_dir).store_path(config.dataset_name, spec.hash))
    table, order = make_table(parts, describe_rows(parts, config.labels))
    logger.info(
        f"{len(table.path):,} rows of {spec.tokens.n_tokens} x {spec.d_model} from {len(parts):,} "
        f"file{'s' * (len(parts) > 1)}, such as {table.path[0]!r}: label {table.label[0]!r}, patient "
        f"{table.patient[0]!r}\nstore '{place}'"
    )
    shard_images = config.shard_images or max(1, min(_MOST_SHARD_ROWS, _SHARD_BYTES // spec.record_bytes))
    shard_images = min(shard_images, len(table.path))
    with disk_messages(place.location), place.lock():
        if config.overwrite:
            delete_store(place, chosen=config.store is not None)
        store, status = _open_or_create(place, spec, table, source, config, shard_images)
        if status != "already complete":
            store = _fill(store, parts, order)
    n_skipped = int((~store.valid).sum())
    seconds = time.monotonic() - started
    return ImportResult(store.path, store.n_images, n_skipped, store.n_tokens, store.d_model, status, seconds)


def make_imported_spec(part: Part, source: str, config: ImportConfig) -> StoreSpec:
    """The spec of imported embeddings: in place of the weights it has a digest of what is known about their origin.

    Args:
        part: One of the files.
        source: Digest of all of them.
        config: Options.

    Raises:
        UserError: If the tokens of a row are not explained.
    """
    assert config.source is not None
    name = config.model_name or config.source.stem
    origin = f"model {name}" if config.model_name else f"files {source}"
    _, n_tokens, width = part.shape
    return StoreSpec(
        model_name=name,
        weights_sha256=hashlib.sha256(f"imported\n{origin}".encode()).hexdigest(),
        block=0,
        n_blocks=1,
        d_model=width,
        tokens=_token_layout(n_tokens, config),
        store_dtype=config.store_dtype,
        imported=True,
    )


def make_table(parts: Sequence[Part], texts: Sequence[RowTexts]) -> tuple[ImageTable, npt.NDArray[np.int64] | None]:
    """The rows of the store, sorted by name.

    Args:
        parts: The files.
        texts: What is known about their rows.

    Returns:
        The table of N rows, and the place of each in the files, shape `(N,)`; None if they are in that order already.

    Raises:
        UserError: If there are no rows, or two have the same name.
    """
    table = ImageTable([], [], [])
    for part, known in zip(parts, texts, strict=True):
        width = len(str(max(part.shape[0] - 1, 0)))
        names = known.names or [f"{row:0{width}d}" for row in range(part.shape[0])]
        prefix = f"{part.slide}/" if len(parts) > 1 or known.are_numbers else ""
        for column, values in zip(
            table, ([f"{prefix}{name}" for name in names], known.labels, known.patients), strict=True
        ):
            column.extend(values)  # type: ignore[attr-defined] # they are lists
    if not table.path:
        raise UserError(f"there are no embeddings in '{parts[0].path}'")
    keys = [path.encode() for path in table.path]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    twice = next((keys[a] for a, b in itertools.pairwise(order) if keys[a] == keys[b]), None)
    if twice is not None:
        raise UserError(
            f"two rows are named {twice.decode()!r}: names must differ (--name_column, or path in --labels)"
        )
    if (np.diff(order) == 1).all():
        return table, None
    return table.take(order), order


def _token_layout(n_tokens: int, config: ImportConfig) -> TokenLayout:
    """What the tokens of a row are.

    Raises:
        UserError: If the options do not explain them.
    """
    grid = parse_grid(config.grid)
    if n_tokens == 1 and grid is None:
        return TokenLayout(1, 0, (0, 0))
    if grid is None:
        side = int(np.sqrt(n_tokens))
        raise UserError(
            f"each row has {n_tokens} tokens: say what they are, for example --grid {side}x{side} for the patches, "
            "--n_cls 0 or 1 and --n_registers for what comes before them"
        )
    layout = TokenLayout(config.n_cls, config.n_registers, grid)
    if layout.n_tokens != n_tokens:
        raise UserError(
            f"--n_cls {config.n_cls}, --n_registers {config.n_registers} and --grid {config.grid} make "
            f"{layout.n_tokens} tokens, but each row has {n_tokens}"
        )
    return layout


def _open_or_create(
    place: StorageBackend, spec: StoreSpec, table: ImageTable, source: str, config: ImportConfig, shard_images: int
) -> tuple[ActivationStore, Literal["imported", "resumed", "already complete"]]:
    """The store to fill, and what has to be done."""
    assert config.dataset_name is not None
    digest = hashlib.sha256(f"{source}\n".encode())
    for row in zip(*table, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    if place.size("zarr.json") is None:
        if config.compression == "none":
            n_bytes = len(table.path) * spec.record_bytes
            require_space(place.location, n_bytes, "Free some space, or use another --root_dir")
        provenance = make_provenance(config.dataset_name, digest.hexdigest())
        store = create_store(
            place.location, spec, table, provenance, shard_images=shard_images, compression=config.compression
        )
        return store, "imported"
    store = ActivationStore(place.location)
    if store.provenance.list_digest != digest.hexdigest() or store.spec != spec:
        raise StoreMismatchError(
            f"store '{place}' was made from something else: the embeddings, labels, patients or options differ. Use "
            "another --dataset_name, or --overwrite to import it from scratch"
        )
    if store.complete:
        remove_marks(store.storage)
        return store, "already complete"
    if (store.shard_images, store.compression) != (shard_images, config.compression):
        raise StoreMismatchError(
            f"the unfinished store '{place}' was started with --shard_images {store.shard_images} --compression "
            f"{store.compression}. Give the same values, or --overwrite"
        )
    return store, "resumed"


def _fill(store: ActivationStore, parts: list[Part], order: npt.NDArray[np.int64] | None) -> ActivationStore:
    """Write the missing shards; returns the complete store."""
    with StoreWriter(store) as writer, Progress("import", store.n_images, "rows") as progress:
        todo = set(writer.missing_shards())
        writer.discard(sorted(todo))
        blocks = read_rows(parts, store.shard_images)
        with _in_order(blocks, order, store) as ordered:
            for shard, rows in enumerate(ordered):
                if shard in todo:
                    writer.submit(_make_shard(store, shard, rows))
                progress.advance(len(rows))
        return writer.finish()


@contextmanager
def _in_order(
    blocks: Iterator[npt.NDArray[np.float32]], order: npt.NDArray[np.int64] | None, store: ActivationStore
) -> Iterator[Iterator[npt.NDArray[np.float32]]]:
    """The embeddings in the order of the store's rows, a shard at a time; sorted in a temporary file if need be.

    Args:
        blocks: The embeddings in the order of the files, float32, shape `(n, T, D)`.
        order: Place of each row in the files; None if that is the store's order.
        store: The store.
    """
    if order is None:
        yield blocks
        return
    folder = None if isinstance(store.path, str) else store.path.parent
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks:
            file.write(np.ascontiguousarray(block).data)
        file.flush()
        rows = np.memmap(file, dtype="<f4", mode="r", shape=(len(order), *store.spec.image_shape))
        yield (rows[order[shard.start : shard.stop]] for shard in map(store.shard_rows, range(store.n_shards)))
        del rows


def _make_shard(store: ActivationStore, shard: int, rows: npt.NDArray[np.float32]) -> ShardData:
    """A shard on its way to disk; rows that are not finite are set aside."""
    is_finite = np.array([np.isfinite(row).all() for row in rows], dtype=bool)
    with np.errstate(over="ignore"):  # the writer names numbers beyond the range of float16
        activations = rows.astype(store.dtype)
    activations[~is_finite] = np.nan
    reasons = ["" if finite else NOT_FINITE for finite in is_finite.tolist()]
    digests = [
        None if reason else hashlib.sha256(row.tobytes()).digest() for row, reason in zip(rows, reasons, strict=True)
    ]
    return ShardData(shard, activations, digests, reasons)
