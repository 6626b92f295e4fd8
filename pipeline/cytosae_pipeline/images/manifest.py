"""A CSV that lists images, with label, patient and whatever else is known about each."""

import itertools
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from cytosae_pipeline.errors import join_few, quote, say_count
from cytosae_pipeline.images.columns import is_unknown
from cytosae_pipeline.images.csv_text import PICTURE, ROLES, find_columns, find_kind, find_role, iter_lines
from cytosae_pipeline.images.files import stamp_file, stamp_files
from cytosae_pipeline.images.folders import SUFFIXES
from cytosae_pipeline.images.image_list import DatasetError, ImageList, ImageRow, join_lines, unify_names
from cytosae_pipeline.images.missing import explain_missing

MAX_COLUMNS = 64
"""Further columns that are kept."""

MAX_CELL = 1000
"""Letters that a cell of a further column may have."""

_MAX_NAME, _NAMED, _EXAMPLES = 100, 10, 3


class _Columns(NamedTuple):
    """Which column of a manifest is what."""

    places: dict[str, int]
    """Place of `path`, `label` and `patient`, where there is one."""
    further: dict[str, int]
    """Place of every further column that has a name."""
    notes: list[str]
    """What was read under another name."""


def read_manifest(path: Path) -> ImageList:
    """The images that a CSV lists, one per line, its columns in any order, separated by commas, semicolons or tabs.

    The column of the files may be called path, file_name, image and the like, that of the label also class or cell
    type, that of the patient also patient ID, subject or donor, in upper and lower case. Further columns are kept.

    Raises:
        DatasetError: If the header, a path or the encoding is wrong, a path stands twice or leads out of the CSV's
            folder, or none of the files exists.
    """
    root = path.parent
    _refuse_other_kinds(path)
    lines = iter_lines(path, lambda name: find_role(name, ROLES) == "path")
    _, header = next(lines, (0, []))
    columns = _assign_columns(header, path)
    rows: dict[str, ImageRow] = {}
    for number, cells in lines:
        row = _read_row(cells, columns, len(header), root, f"'{path}' line {number}")
        if row.path in rows:
            raise DatasetError(f"'{path}' line {number}: '{row.path}' is listed twice")
        rows[row.path] = row
    if not rows:
        raise DatasetError(f"'{path}' lists no images")
    stamps = stamp_files(root, list(rows))
    rows = {row.path: replace(row, seen=seen) for row, seen in zip(rows.values(), stamps, strict=True)}
    missing = [row.path for row in rows.values() if row.seen is None]
    if len(missing) == len(rows):
        raise DatasetError(
            f"no image in '{path}' exists ({say_count(len(rows), 'image')} listed); the first would be "
            f"'{root / missing[0]}'. Paths are relative to the folder of the CSV{explain_missing(root, missing)}"
        )
    cleared, doubts = _clean_names(list(rows.values()))
    if missing:
        n = say_count(len(rows), "file")
        doubts.append(
            f"{say_count(len(missing), f'of {n} does', f'of {n} do')} not exist, for example "
            f"{join_few(map(quote, missing), _EXAMPLES)}{explain_missing(root, missing)}"
        )
    names, chosen, notes = _choose_further(columns.further, cleared)
    if len(chosen) < len(columns.further):
        cleared = [replace(row, cells=tuple(row.cells[k] for k in chosen)) for row in cleared]
    settled, respelt = unify_names(cleared)
    return ImageList(root, settled, "manifest", (*columns.notes, *notes, *respelt, *doubts), names)


def _refuse_other_kinds(path: Path) -> None:
    """Refuse files that are no CSV by their first bytes or their ending."""
    kind = find_kind(path)
    if kind == PICTURE or (path.suffix.lower() in SUFFIXES and not kind):
        raise DatasetError(
            f"'{path}' is one picture: expected a folder of images or a CSV. For this picture alone, give a folder "
            "that contains nothing else"
        )
    if kind:
        raise DatasetError(f"'{path}' is {kind}: expected a folder of images or a CSV. Unpack it, or save it as CSV")


def _assign_columns(header: Sequence[str], path: Path) -> _Columns:
    """Find path, label and patient in the header.

    Raises:
        DatasetError: If there is no path, a name stands twice, or two names may mean the same.
    """
    places, notes = find_columns(header, ROLES, path)
    named = [name for name in header if name]
    if "path" not in places or len(set(named)) != len(named):
        twice = next((name for name in named if named.count(name) > 1), "")
        shown = [name[:_MAX_NAME] for name in header[:MAX_COLUMNS]]
        raise DatasetError(
            f"'{path}' has columns {shown}; expected path and, if known, label and patient, each once, "
            "separated by commas in the first line" + (f". {quote(twice)} stands twice: rename one" if twice else "")
        )
    further = {name: place for place, name in enumerate(header) if name and place not in places.values()}
    alike: dict[str, str] = {}
    for name in further:
        other = alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), name)
        if other != name:
            raise DatasetError(f"columns {quote(other)} and {quote(name)} of '{path}' have the same name: rename one")
    if "label" not in places and further:
        notes.append(f"no column of '{path}' is called label: the images have none")
    return _Columns(places, further, notes)


def _read_row(cells: Sequence[str], columns: _Columns, n_columns: int, root: Path, where: str) -> ImageRow:
    """One line of a manifest, its path made canonical."""
    if any(surplus := cells[n_columns:]):
        raise DatasetError(
            f"{where}: found {len(surplus)} more cells than columns; put a cell that contains a comma in double quotes"
        )
    padded = [*cells, *itertools.repeat("", n_columns - len(cells))]
    names = {role: padded[place] for role, place in columns.places.items()}
    path = names["path"]
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if "\\" in path:
        raise DatasetError(
            f"{where}: found path {path!r}; expected a relative path with / that stays in the CSV's folder. "
            "Replace \\ by /"
        )
    if not parts or path.startswith("/") or ".." in parts or (path[1:2] == ":" and PureWindowsPath(path).drive):
        raise DatasetError(
            f"{where}: found path {path!r}; expected a relative path with / that stays in the CSV's folder"
        )
    if len(path.splitlines()) > 1:
        raise DatasetError(f"{where}: the path {quote(path)} goes over several lines; close its double quote")
    spelt = "/".join(parts) if path.isascii() else _find_spelling(root, parts)
    further = tuple(padded[place] for place in columns.further.values())
    label, patient = (sys.intern(names.get(role, "")) for role in ("label", "patient"))  # each name once in memory
    return ImageRow(spelt, label, patient, cells=further)


def _clean_names(rows: Sequence[ImageRow]) -> tuple[list[ImageRow], list[str]]:
    """Labels and patients as one line each, '' where a cell says that they are unknown; notes about both."""
    notes = []
    for what in ("label", "patient"):
        unknown = Counter(name for row in rows if (name := getattr(row, what)) and is_unknown(name))
        if unknown:
            shown = join_few(map(quote, sorted(unknown)), _NAMED)
            notes.append(f"{unknown.total():,} {what}s called {shown} are read as unknown")
        broken = {joined for row in rows if (joined := join_lines(getattr(row, what))) != getattr(row, what)}
        if broken:
            shown = join_few(map(quote, sorted(broken)), _EXAMPLES)
            notes.append(f"{what}s over several lines were joined: {shown}")
    return [
        row
        if (names := (_clean(row.label), _clean(row.patient))) == (row.label, row.patient)
        else replace(row, label=names[0], patient=names[1])
        for row in rows
    ], notes


def _clean(name: str) -> str:
    """A label or patient as one line; '' if it is unknown."""
    return "" if is_unknown(name) else join_lines(name)


def _find_spelling(root: Path, parts: Sequence[str]) -> str:
    """A path as its folders spell it: macOS writes `ä` as two characters, most other programs as one."""
    if stamp_file(root.joinpath(*parts)) is not None:
        return "/".join(parts)
    place = PurePosixPath()
    for part in parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        place /= next((form for form in forms if (root / place / form).exists()), part)
    return str(place)


def _choose_further(further: dict[str, int], rows: Sequence[ImageRow]) -> tuple[tuple[str, ...], list[int], list[str]]:
    """Names and numbers of the further columns that are kept, and notes about them."""
    kept: list[tuple[str, int]] = []
    left_out = []
    for number, name in enumerate(further):
        longest = max(len(row.cells[number]) for row in rows)
        if (
            longest
            and longest <= MAX_CELL
            and len(name) <= _MAX_NAME
            and name.isprintable()
            and len(kept) < MAX_COLUMNS
        ):
            kept.append((name, number))
        elif longest:
            left_out.append(name)
    notes = []
    if kept:
        notes.append(f"further columns kept with the images: {join_few((quote(name) for name, _ in kept), _NAMED)}")
    if left_out:
        notes.append(
            f"columns not kept: {join_few(map(quote, left_out), _NAMED)} (at most {MAX_COLUMNS} columns are kept, with "
            f"names of up to {_MAX_NAME} and cells of up to {MAX_CELL:,} letters)"
        )
    return tuple(name for name, _ in kept), [number for _, number in kept], notes
