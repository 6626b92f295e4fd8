"""`import`: embeddings of another program as an activation store, written shard by shard and resumable."""

import functools
import hashlib
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from cytosae_cache.creation import create_store
from cytosae_cache.errors import StoreMismatchError
from cytosae_cache.format.layout import ImageTable
from cytosae_cache.format.marks import remove_marks
from cytosae_cache.format.spec import StoreSpec, TokenLayout
from cytosae_cache.shard_data import ShardData
from cytosae_cache.storage.base import Location, StorageBackend
from cytosae_cache.storage.open import open_storage
from cytosae_cache.store import ActivationStore, iter_stores
from cytosae_cache.writer import StoreWriter
from cytosae_pipeline.building.replacement import choose_place, put_in_place, reopen
from cytosae_pipeline.building.store_place import disk_messages, make_provenance, require_space
from cytosae_pipeline.config.imports import ImportConfig, parse_grid
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.importing.labels import describe_rows
from cytosae_pipeline.importing.part import Part
from cytosae_pipeline.importing.rounding import Rounding, find_finite
from cytosae_pipeline.importing.source import Source, open_source
from cytosae_pipeline.importing.texts import RowTexts
from cytosae_pipeline.runtime.progress import Progress
from cytosae_pipeline.workspace.find import training_command
from cytosae_pipeline.workspace.paths import Workspace

logger = logging.getLogger(__name__)

_SHARD_BYTES, _MOST_SHARD_ROWS = 1 << 27, 4096

NOT_FINITE = "contains NaN or infinity"
"""Reason for a row that is set aside."""

Status = Literal["imported", "resumed", "already complete"]
"""What had to be done."""


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
    status: Status
    """What had to be done."""
    seconds: float
    """Duration in seconds."""
    next: str
    """The command that trains an autoencoder on it."""
    notes: tuple[str, ...] = ()
    """What should be known about the store, as messages."""


def import_embeddings(config: ImportConfig) -> ImportResult:
    """Write embeddings of another program as a store, resume an interrupted import, or do nothing if it is complete.

    Raises:
        UserError: If the source, the labels or an option do not fit.
        StoreError: If an existing store was made from something else, or the disk is full.
    """
    started = time.monotonic()
    if config.dataset_name is None:
        raise UserError("name the data set: --dataset_name NAME")
    source = open_source(config)
    digest = source.hash()
    spec = make_imported_spec(source.parts[0], digest, config)
    place = open_storage(config.store or Workspace(config.root_dir).store_path(config.dataset_name, spec.hash))
    if place.size("zarr.json") is None:  # before rows are named, which takes memory for each
        _require_space(place, source.n_rows, spec, config)
    table, order = make_table(source.parts, describe_rows(source.parts, config.labels))
    logger.info(f"{_describe_table(table, spec, source)}\nstore '{place}'")
    notes = [] if config.store else _describe_namesakes(place, spec, config)
    shard_images = config.shard_images or max(1, min(_MOST_SHARD_ROWS, _SHARD_BYTES // spec.record_bytes))
    shard_images = min(shard_images, len(table.path))
    with disk_messages(place.location), place.lock():
        store, status = _open_or_create(place, spec, table, digest, config, shard_images)
        if not store.complete:
            store, lost = _fill(store, source, order)
            notes += [lost] if lost else []
        store = put_in_place(store, place.location)
    for note in notes:
        logger.warning(note)
    n_skipped = int((~store.valid).sum())
    if n_skipped == store.n_images:
        raise UserError(
            f"no row of '{config.source}' can be used, of {say_count(n_skipped, 'row')}: each {NOT_FINITE}. Compute "
            "the embeddings again, then import them with --overwrite"
        )
    seconds = time.monotonic() - started
    return ImportResult(
        store=store.path,
        n_images=store.n_images,
        n_skipped=n_skipped,
        n_tokens=store.n_tokens,
        d_model=store.d_model,
        status=status,
        seconds=seconds,
        next=training_command(store, config),
        notes=tuple(notes),
    )


def _describe_table(table: ImageTable, spec: StoreSpec, source: Source) -> str:
    """What will be imported, as text."""
    n_files = len(source.parts)
    text = f"{say_count(len(table.path), 'row')} of {spec.tokens.n_tokens} x {spec.d_model} from {n_files:,} file"
    text += f"{'s' * (n_files > 1)}, such as {quote(table.path[0])}"
    for what, names in (("label", table.label), ("patient", table.patient)):
        known, n_unknown = set(filter(None, names)), names.count("")
        text += f"; {len(known) or 'no'} {what}{'s' * (len(known) != 1)}"
        text += f" ({n_unknown:,} rows without)" if known and n_unknown else ""
    return text


def _describe_namesakes(place: StorageBackend, spec: StoreSpec, config: ImportConfig) -> list[str]:
    """Notes about stores of the data set that were imported under the same name from something else."""
    assert config.dataset_name is not None
    folder = Workspace(config.root_dir).stores_dir(config.dataset_name)
    others = [
        str(path)
        for path in iter_stores(folder)
        if path != place.location and (path / "zarr.json").is_file() and _is_namesake(ActivationStore(path).spec, spec)
    ]
    if not others:
        return []
    return [
        f"data set {quote(config.dataset_name)} has another store that was imported under the name "
        f"{quote(spec.model_name)} from other files: {join_few(map(quote, others), 3)}. Both are kept: verbs need "
        "--store PATH to choose, or delete the old one"
    ]


def _is_namesake(other: StoreSpec, spec: StoreSpec) -> bool:
    """Whether two stores differ in what they were imported from, and in nothing else that a user chose."""
    return other.imported and other != spec and replace(other, weights_sha256=spec.weights_sha256) == spec


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
    tokens, width = _token_layout(part, config), part.shape[2]
    try:
        return StoreSpec(
            model_name=name,
            weights_sha256=hashlib.sha256(f"imported\n{origin}".encode()).hexdigest(),
            block=0,
            n_blocks=1,
            d_model=width,
            tokens=tokens,
            store_dtype=config.store_dtype,
            imported=True,
        )
    except ValueError as error:  # more numbers in a row than a store can have
        raise UserError(f"the rows of '{part.path}' are too large: {error}") from error


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
        _require_names(part, names)
        prefix = f"{part.slide}/" if len(parts) > 1 or known.are_numbers else ""
        for column, values in zip(
            table, ([f"{prefix}{name}" for name in names], known.labels, known.patients), strict=True
        ):
            column.extend(values)  # type: ignore[attr-defined] # they are lists
    keys = [path.encode() for path in table.path]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    twice = next((keys[a] for a, b in itertools.pairwise(order) if keys[a] == keys[b]), None)
    if twice is not None:
        raise UserError(
            f"two rows of '{parts[0].path}' are named {quote(twice.decode())}: names must differ (--name_column, or "
            "path in --labels)"
        )
    if (np.diff(order) == 1).all():
        return table, None
    return table.take(order), order


def _require_names(part: Part, names: Sequence[str]) -> None:
    """Refuse rows of which some have a name and others do not.

    Raises:
        UserError: If there are any.
    """
    n_unnamed = sum(not name for name in names)
    if n_unnamed:
        raise UserError(
            f"{n_unnamed:,} of {part.shape[0]:,} rows of '{part.path}' have no name: name all of them (--name_column, "
            "or path in --labels), or none"
        )


def _token_layout(part: Part, config: ImportConfig) -> TokenLayout:
    """What the tokens of a row are.

    Raises:
        UserError: If the options do not explain them.
    """
    n_tokens, grid = part.shape[1], parse_grid(config.grid)
    if n_tokens == 1 and grid is None:
        return TokenLayout(1, 0, (0, 0))
    if grid is None:
        side = int(np.sqrt(n_tokens))
        raise UserError(
            f"each row of '{part.path}' has {n_tokens:,} tokens: say what they are, for example --grid {side}x{side} "
            "for the patches, --n_cls 0 or 1 and --n_registers for what comes before them"
        )
    layout = TokenLayout(config.n_cls, config.n_registers, grid)
    if layout.n_tokens != n_tokens:
        raise UserError(
            f"--n_cls {config.n_cls}, --n_registers {config.n_registers} and --grid {config.grid} make "
            f"{layout.n_tokens:,} tokens, but each row of '{part.path}' has {n_tokens:,}"
        )
    return layout


def _open_or_create(
    place: StorageBackend, spec: StoreSpec, table: ImageTable, source: str, config: ImportConfig, shard_images: int
) -> tuple[ActivationStore, Status]:
    """The store to fill, and what has to be done."""
    assert config.dataset_name is not None
    digest = hashlib.sha256(f"{source}\n".encode())
    for row in zip(*table, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    chosen = config.store is not None
    where = choose_place(place.location, overwrite=config.overwrite, delete_first=config.delete_first, chosen=chosen)
    check = functools.partial(_check_existing, spec, digest.hexdigest(), config, shard_images)
    found = reopen(where, place.location, check, overwrite=config.overwrite)
    if found is not None:
        return found
    _require_space(open_storage(where), len(table.path), spec, config)
    provenance = make_provenance(config.dataset_name, digest.hexdigest())
    return create_store(
        where, spec, table, provenance, shard_images=shard_images, compression=config.compression
    ), "imported"


def _check_existing(
    spec: StoreSpec, list_digest: str, config: ImportConfig, shard_images: int, store: ActivationStore
) -> Status:
    """What has to be done for an existing store, if it is the one that is to be made.

    Raises:
        StoreMismatchError: If it is not.
    """
    if store.provenance.list_digest != list_digest or store.spec != spec:
        raise StoreMismatchError(
            f"store '{store.path}' was made from something else: the embeddings, labels, patients or options differ. "
            "Use another --dataset_name, or --overwrite to import it from scratch"
        )
    if store.complete:
        remove_marks(store.storage)
        return "already complete"
    if (store.shard_images, store.compression) != (shard_images, config.compression):
        raise StoreMismatchError(
            f"the unfinished store '{store.path}' was started with --shard_images {store.shard_images} --compression "
            f"{store.compression}. Give the same values, or --overwrite"
        )
    return "resumed"


def _require_space(place: StorageBackend, n_rows: int, spec: StoreSpec, config: ImportConfig) -> None:
    """Refuse a store that is larger than the free disk; compression may make it smaller."""
    if config.compression == "none":
        advice = "Free some space, or use another --root_dir"
        advice += ", or add --delete-first to delete the old store before" * (
            config.overwrite and not config.delete_first
        )
        require_space(place.location, n_rows * spec.record_bytes, advice)


def _fill(store: ActivationStore, source: Source, order: npt.NDArray[np.int64] | None) -> tuple[ActivationStore, str]:
    """Write the missing shards; returns the complete store, and what its type could not hold."""
    rounding = Rounding(store, source.path)
    with StoreWriter(store) as writer, Progress("import", store.n_images, "rows") as progress:
        todo = set(writer.missing_shards())
        writer.discard(sorted(todo))
        blocks = source.read_rows(store.shard_images)
        with _in_order(blocks, order, store) as ordered:
            for shard, rows in enumerate(ordered):
                converted = rounding.convert(rows, store.shard_rows(shard).start)  # counts finished shards, too
                if shard in todo:
                    writer.submit(_make_shard(shard, rows, converted))
                progress.advance(len(rows))
        return writer.finish(), rounding.describe()


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


def _make_shard(shard: int, rows: npt.NDArray[np.float32], converted: npt.NDArray[np.generic]) -> ShardData:
    """A shard on its way to disk; rows that are not finite are set aside.

    Args:
        shard: Its number.
        rows: Rows, float32, shape `(n, T, D)`.
        converted: The same in the type of the store.
    """
    reasons = ["" if finite else NOT_FINITE for finite in find_finite(rows).tolist()]
    digests = [
        None if reason else hashlib.sha256(row.tobytes()).digest() for row, reason in zip(rows, reasons, strict=True)
    ]
    return ShardData(shard, converted, digests, reasons)
