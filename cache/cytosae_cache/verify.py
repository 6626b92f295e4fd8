"""Checking a store against its own metadata, checksums and sums."""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import numpy as np

from cytosae_cache.errors import ChecksumError, StoreCorruptError
from cytosae_cache.format.layout import StoreLayout
from cytosae_cache.format.metadata import table_names
from cytosae_cache.format.moments import image_sums
from cytosae_cache.format.shard import ShardDigest, digest_file, shard_name
from cytosae_cache.reading.permutation import spread_rows
from cytosae_cache.reading.reader import StoreReader
from cytosae_cache.storage.base import is_litter

_SUMMED_SHARDS = 8
"""Number of shards, spread over the store, whose moments are recomputed."""

_COLUMNS: dict[str, tuple[str, str]] = {
    "images/path": ("n_images", ""),
    "images/label": ("n_images", ""),
    "images/patient": ("n_images", ""),
    "images/reason": ("n_images", ""),
    "images/valid": ("n_images", "bool"),
    "images/crc32c": ("n_images", "uint32"),
    "images/sha256": ("n_images", "uint8"),
    "images/n_bytes": ("n_images", "uint64"),
    "moments/count": ("n_shards", "int64"),
    "moments/sum": ("n_shards", "float64"),
    "moments/sum_sq": ("n_shards", "float64"),
    "shards/n_bytes": ("n_shards", "uint64"),
    "shards/crc32c": ("n_shards", "uint32"),
}

_CHANNEL_COLUMNS = {"channels/mean": ("d_model", "float32"), "channels/std": ("d_model", "float32")}


@dataclass
class VerifyReport:
    """The result of a check."""

    n_shards: int = 0
    """Shard files checked."""
    n_bytes: int = 0
    """Bytes read from them."""
    problems: list[str] = field(default_factory=list)
    """One line per problem of the store's own files."""
    foreign: list[str] = field(default_factory=list)
    """One line per file or folder that does not belong to the store; the store itself may be intact."""
    litter: list[str] = field(default_factory=list)
    """Files that an operating system left there; they do no harm."""
    tail: str = ""
    """Place of the file with the rest of the network beside the store; '' if there is none, or it was not checked."""
    tail_problem: str = ""
    """What is wrong with that file, and what to type; the store itself may be intact."""

    @property
    def sound(self) -> bool:
        """Whether neither a problem nor a foreign file was found."""
        return not self.problems and not self.foreign and not self.tail_problem


class ShardFindings(NamedTuple):
    """What was found in some shards."""

    n_shards: int
    """Shard files checked."""
    n_bytes: int
    """Bytes read from them."""
    problems: tuple[tuple[int, str], ...]
    """Shard and text of each problem, by shard."""

    def merge(self, other: "ShardFindings") -> "ShardFindings":
        """These findings and those in other shards, in any order."""
        problems = sorted((*self.problems, *other.problems), key=lambda problem: problem[0])
        return ShardFindings(self.n_shards + other.n_shards, self.n_bytes + other.n_bytes, tuple(problems))


def verify_store(
    store: StoreLayout,
    *,
    on_shard: Callable[[int], None] = lambda shard: None,
    check: Callable[[], ShardFindings] | None = None,
) -> VerifyReport:
    """Check the tables, the files and every checksum of a complete store.

    Args:
        store: A complete store.
        on_shard: Called after each shard.
        check: Calls `verify_shards` for all shards where more than this process does it, and merges what is found.

    Returns:
        All problems found; checking continues after each one.
    """
    report = VerifyReport()
    try:
        store.storage.check_links()
        for name in store.files:
            if not is_litter(name):
                store.read_file(name)
        _check_tables(store, report)
    except StoreCorruptError as error:
        report.problems.append(str(error))
        return report
    if report.problems:
        return report
    _check_files(store, report)
    found = verify_shards(store, range(store.n_shards), on_shard=on_shard) if check is None else check()
    report.n_shards, report.n_bytes = found.n_shards, found.n_bytes
    report.problems += [text for _, text in found.problems]
    return report


def verify_shards(
    store: StoreLayout, shards: range, *, on_shard: Callable[[int], None] = lambda shard: None
) -> ShardFindings:
    """Check every checksum in some shards of a complete store whose tables are sound.

    Args:
        store: A complete store.
        shards: Consecutive shards.
        on_shard: Called after each shard.
    """
    summed = set(spread_rows(store.n_shards, _SUMMED_SHARDS).tolist())
    columns = [store.column(f"shards/{name}")[shards.start : shards.stop].tolist() for name in ShardDigest._fields]
    report, problems = VerifyReport(), list[tuple[int, str]]()
    with StoreReader(store, n_threads=1) as reader:
        for shard, digest in zip(shards, map(ShardDigest._make, zip(*columns, strict=True)), strict=True):
            report.problems.clear()
            try:
                _check_file(store, shard, digest, report)
                _check_images(store, reader, shard, report, sums=shard in summed)
            except FileNotFoundError:
                pass  # reported as a missing file
            except StoreCorruptError as error:
                report.problems.append(str(error))
            problems += [(shard, text) for text in report.problems]
            on_shard(shard)
    return ShardFindings(report.n_shards, report.n_bytes, tuple(problems))


def _check_tables(store: StoreLayout, report: VerifyReport) -> None:
    """Check shapes and dtypes of the small arrays, and the rules that connect them."""
    columns = {**_COLUMNS, **(_CHANNEL_COLUMNS if store.spec.store_dtype == "int8" else {})}
    for place, (length, dtype) in columns.items():
        column = store.column(place)
        expected = getattr(store, length)
        if len(column) != expected or (dtype and column.dtype != dtype):
            report.problems.append(
                f"{place}: found {column.dtype} {column.shape}, expected {dtype or 'text'} of length {expected}"
            )
    _ = store.image_columns
    if report.problems:
        return
    if store.contents != store.compute_contents():
        report.problems.append("contents: the stated identity does not match the images and shards")
    paths = map(str.encode, store.images.path)
    if not all(one < following for one, following in itertools.pairwise(paths)):
        report.problems.append("images/path: rows are not sorted by path, or a path occurs twice")
    skipped = store.column("images/reason") != ""
    if not np.array_equal(~store.valid, skipped):
        report.problems.append("images/valid: disagrees with images/reason")
    n_tokens = [
        int(store.valid[rows.start : rows.stop].sum()) * store.n_tokens
        for rows in map(store.shard_rows, range(store.n_shards))
    ]
    if store.moments.count.tolist() != n_tokens:
        report.problems.append("moments/count: does not match the valid images")


def _check_files(store: StoreLayout, report: VerifyReport) -> None:
    """Find missing shard files, and files that do not belong to the store."""
    expected = {shard_name(shard) for shard in range(store.n_shards)}
    everything = store.storage.names(with_litter=True)
    found = {name for name in everything if name.startswith("activations/c/") and not is_litter(name)}
    report.problems += [f"shard '{store.path}/{name}' is missing" for name in sorted(expected - found)]
    report.litter += [f"{store.path}/{name}" for name in everything if is_litter(name)]
    ours = expected | set(store.files)
    others = [*(found - expected), *(name for name in table_names(everything) if name not in ours)]
    report.foreign += _describe_foreign(others, ours, str(store.path))


def _describe_foreign(names: Sequence[str], ours: Set[str], where: str) -> list[str]:
    """One line per foreign file, or per folder that contains nothing else.

    Args:
        names: The foreign files.
        ours: The store's own files.
        where: Name of the store.
    """
    folders = {str(folder) for name in ours for folder in PurePosixPath(name).parents}
    files_in: dict[str, int] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        tops = ("/".join(parts[:n]) for n in range(1, len(parts)))
        top = next((f"{folder}/" for folder in tops if folder not in folders), name)
        files_in[top] = files_in.get(top, 0) + 1
    return [
        repr(f"{where}/{top}")
        + (f" ({n:,} file{'s' * (n > 1)})" if top.endswith("/") else "")
        + " does not belong to the store"
        for top, n in sorted(files_in.items())
    ]


def _check_file(store: StoreLayout, shard: int, expected: ShardDigest, report: VerifyReport) -> None:
    """Check the length and checksum of a shard file."""
    file = store.storage.open(shard_name(shard))
    found = digest_file(file)
    report.n_shards, report.n_bytes = report.n_shards + 1, report.n_bytes + found.n_bytes
    if found != expected:
        report.problems.append(
            f"shard '{store.path}/{shard_name(shard)}': found {found.n_bytes} bytes with checksum {found.crc32c:08x}, "
            f"expected {expected.n_bytes} with {expected.crc32c:08x}"
        )


def _check_images(store: StoreLayout, reader: StoreReader, shard: int, report: VerifyReport, *, sums: bool) -> None:
    """Check every image's checksum, that exactly the unreadable images are NaN, and the shard's moments."""
    rows = store.shard_rows(shard)
    total, wide = np.zeros((2, store.d_model)), np.empty(store.spec.image_shape)
    for row in rows:
        try:
            image = reader.read(np.array([row]))
        except ChecksumError:
            report.problems.append(f"row {row} ({store.images.path[row]!r}): its activations fail their checksum")
            continue
        except StoreCorruptError as error:
            report.problems.append(str(error))
            return
        if np.isfinite(image).all() != store.valid[row]:
            report.problems.append(
                f"row {row} ({store.images.path[row]!r}): finite activations and images/valid disagree"
            )
        elif sums and store.valid[row]:
            total += image_sums(image[0], wide)
    moments = store.moments
    if sums and not np.array_equal(total, [moments.sum[shard], moments.sum_sq[shard]]):
        report.problems.append(f"moments of shard {shard}: do not equal the sums of its activations")
