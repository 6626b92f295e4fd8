"""The images of a data set as a fixed, sorted list with label, patient and further columns."""

import hashlib
import itertools
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from cytosae_cache.format.layout import ImageTable
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.images.files import FileStamp

STORED = "store"
"""Layout of a list that was taken from a store."""

_NAMED = 5  # names that look alike


class DatasetError(UserError):
    """A data set cannot be used; the message says what was found and what was expected."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """The folder or manifest does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image."""

    path: str
    """POSIX path relative to the data set's root."""
    label: str
    """Class, '' where unknown."""
    patient: str
    """Patient, '' where unknown."""
    seen: FileStamp | None = field(default=None, compare=False)
    """The file's stamp when it was listed; None if there was no file, or it was not checked."""
    cells: tuple[str, ...] = ()
    """Cells of the list's further columns."""


class StoredRows(Sequence[ImageRow]):
    """The images of a store, which are sorted already; each row is made when it is asked for.

    Args:
        table: The store's own columns.
    """

    def __init__(self, table: ImageTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table.path)

    @overload
    def __getitem__(self, place: int) -> ImageRow: ...
    @overload
    def __getitem__(self, place: slice) -> list[ImageRow]: ...
    def __getitem__(self, place: int | slice) -> ImageRow | list[ImageRow]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        path, label, patient = (column[place] for column in self.table)
        return ImageRow(path, label, patient)

    def __iter__(self) -> Iterator[ImageRow]:
        return itertools.starmap(ImageRow, zip(*self.table, strict=True))


class SeveralRoots(NamedTuple):
    """Where the images of joined stores are."""

    folders: dict[str, Path]
    """The folder of each data set that was found; its name is the first part of a path."""


Root = Path | SeveralRoots
"""Folder that paths start from, or those of several data sets."""


@dataclass(frozen=True)
class ImageList:
    """The images of a data set in row order: sorted by the bytes of their paths, data set by data set if joined."""

    root: Root
    """Folder that the paths start from."""
    rows: Sequence[ImageRow]
    """The images."""
    layout: str
    """Where labels and patients come from: `manifest`, `flat`, `STORED`, or a layout of folders."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was left out or read in a way worth checking, as messages."""
    columns: tuple[str, ...] = ()
    """Names of further columns of a manifest."""
    levels: str = field(default="", compare=False)
    """What each level of folders was read as, as text."""

    def __post_init__(self) -> None:
        if not isinstance(self.rows, StoredRows):
            object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.path.encode())))

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def paths(self) -> Sequence[str]:
        """Paths in row order."""
        return self.rows.table.path if isinstance(self.rows, StoredRows) else [row.path for row in self.rows]

    @cached_property
    def labels(self) -> Sequence[str]:
        """Labels in row order."""
        return self.rows.table.label if isinstance(self.rows, StoredRows) else [row.label for row in self.rows]

    @cached_property
    def patients(self) -> Sequence[str]:
        """Patients in row order."""
        return self.rows.table.patient if isinstance(self.rows, StoredRows) else [row.patient for row in self.rows]

    def digest(self) -> str:
        """SHA-256 of the list, 64 hex digits: changes with any path, label, patient, or cell of a further column."""
        digest = hashlib.sha256()
        if self.columns:
            digest.update(json.dumps(self.columns).encode() + b"\n")
        for row in self.rows:
            digest.update(json.dumps([row.path, row.label, row.patient, *row.cells]).encode() + b"\n")
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """How the list was read and what it consists of, as JSON values."""
        labels, patients = count_names(self.labels), count_names(self.patients)
        return {
            "layout": self.layout,
            "labels": dict(sorted(labels.items())),
            "n_patients": len(patients),
            "columns": list(self.columns),
            "notes": list(self.notes),
        }

    def without_columns(self) -> "ImageList":
        """The list without further columns."""
        rows = tuple(replace(row, cells=()) for row in self.rows)
        return ImageList(self.root, rows, self.layout, self.notes)

    def spread(self, n: int) -> "ImageList":
        """A list of `n` images spread evenly over this one, so that all its folders appear."""
        n = min(n, len(self))
        rows = tuple(self.rows[(2 * slot + 1) * len(self) // (2 * n)] for slot in range(n))
        return replace(self, rows=rows)


def count_names(names: Sequence[str]) -> Counter[str]:
    """How many images have each name; '' stands for none and is not counted."""
    return Counter(name for name in names if name)


def join_lines(name: str) -> str:
    """A label or patient as one line: a line break in it becomes a blank."""
    lines = name.splitlines()
    return " ".join(filter(None, map(str.strip, lines))) if lines != [name] else name


def unify_names(rows: Sequence[ImageRow]) -> tuple[tuple[ImageRow, ...], list[str]]:
    """Give labels and patients that Unicode regards as the same text the same spelling.

    Args:
        rows: The images.

    Returns:
        The images, and notes about what was changed and about names that differ in upper and lower case alone.
    """
    notes: list[str] = []
    respelt = {}
    for what in ("label", "patient"):
        names = {getattr(row, what) for row in rows}
        groups = _group(names, lambda name: unicodedata.normalize("NFC", name))
        twins = {nfc: group for nfc, group in groups.items() if len(group) > 1}
        respelt[what] = {name: nfc for nfc, group in twins.items() for name in group}
        notes += [f"{what} {quote(nfc)} is spelt with two encodings of its letters: read as one" for nfc in twins]
        alike = _group(groups, str.casefold)
        notes += [
            f"{what}s {' and '.join(map(quote, sorted(group)))} differ in upper and lower case only: kept apart"
            for group in itertools.islice((group for group in alike.values() if len(group) > 1), _NAMED)
        ]
    if not any(respelt.values()):
        return tuple(rows), notes
    labels, patients = respelt["label"], respelt["patient"]
    changed = (
        replace(row, label=labels.get(row.label, row.label), patient=patients.get(row.patient, row.patient))
        for row in rows
    )
    return tuple(changed), notes


def _group(names: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    """Names by what they have in common."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return groups
