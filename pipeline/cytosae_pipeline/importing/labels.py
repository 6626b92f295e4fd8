"""Labels, patients and names of rows from a CSV beside the embeddings."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cytosae_pipeline.errors import UserError, join_few, quote
from cytosae_pipeline.images.csv_text import ROLES, find_columns, find_kind, find_role, iter_lines
from cytosae_pipeline.importing.part import Part

logger = logging.getLogger(__name__)

_ROLES = {**ROLES, "slide": {"slide", "slideid", "slidename"}}
_NAMED = 10


class RowTexts(NamedTuple):
    """What is known about the rows of a file, one entry per row."""

    names: Sequence[str] | None
    """Name of each row; None if rows are to be numbered."""
    are_numbers: bool
    """Whether the names are numbers within the file, so that its own name belongs before them."""
    labels: Sequence[str]
    """Labels, '' where unknown."""
    patients: Sequence[str]
    """Patients, '' where unknown."""


def describe_rows(parts: Sequence[Part], path: Path | None) -> list[RowTexts]:
    """What is known about the rows of every file; a CSV takes precedence over columns in the files.

    Args:
        parts: The files.
        path: The CSV, if there is one.

    Raises:
        UserError: If the CSV does not fit the files.
    """
    lines = [] if path is None else _read(path)
    if path is None or not lines:
        return [_texts(part, {}) for part in parts]
    if "slide" in lines[0]:
        return _by_slide(parts, lines, path)
    if len(parts) > 1:
        raise UserError(
            f"'{path}' must have a column slide (the file's name without its ending), as there are {len(parts):,} "
            f"files, such as '{parts[0].path.name}'"
        )
    (part,) = parts
    if len(lines) != part.shape[0]:
        raise UserError(
            f"'{path}' has {len(lines):,} lines, but '{part.path}' has {part.shape[0]:,} rows: expected one line per "
            "row, in the same order, or a column slide"
        )
    # Row numbers are the default index of a table; they do not name its rows.
    is_named = part.names is not None and list(part.names) != [str(row) for row in range(part.shape[0])]
    if "path" in lines[0] and is_named and part.names is not None and not part.are_numbers:
        lines = _in_order(lines, part.names, path, part.path)
    return [_texts(part, {name: [line[name] for line in lines] for name in lines[0]})]


def _in_order(lines: Sequence[dict[str, str]], names: Sequence[str], path: Path, source: Path) -> list[dict[str, str]]:
    """Lines in the order of the rows that they name.

    Raises:
        UserError: If the CSV names a row twice, or other rows than the file does.
    """
    by_name = {line["path"]: line for line in lines}
    missing = [name for name in names if name not in by_name]
    if missing or len(by_name) < len(lines):
        what = f"no line for row {quote(missing[0])}" if missing else "two lines for the same row"
        raise UserError(
            f"'{path}' and '{source}' both name the rows, but the CSV has {what}. "
            "Leave out one's names, or make them agree"
        )
    return [by_name[name] for name in names]


def _by_slide(parts: Sequence[Part], lines: Sequence[dict[str, str]], path: Path) -> list[RowTexts]:
    """One line for all rows of a file."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        if found.setdefault(line["slide"], line) != line:
            raise UserError(f"'{path}' has two different lines for slide {line['slide']!r}")
    missing = [part.slide for part in parts if part.slide not in found]
    if missing:
        raise UserError(
            f"'{path}' has no line for {len(missing):,} of {len(parts):,} files, such as slide {missing[0]!r}. Slides "
            f"are named like the files without their ending; found {', '.join(map(repr, list(found)[:3]))}"
        )
    columns = [name for name in ("label", "patient") if name in lines[0]]
    return [_texts(part, {name: [found[part.slide][name]] * part.shape[0] for name in columns}) for part in parts]


def _texts(part: Part, columns: dict[str, list[str]]) -> RowTexts:
    """The columns, or what the file itself says."""
    unknown = [""] * part.shape[0]
    return RowTexts(
        columns.get("path") or part.names,
        "path" not in columns and (part.names is None or part.are_numbers),
        columns.get("label") or part.labels or unknown,
        columns.get("patient") or part.patients or unknown,
    )


def _read(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV, cells without surrounding blanks.

    Raises:
        UserError: If it cannot be read, has none of the columns, or its lines have several lengths.
    """
    try:
        if kind := find_kind(path):
            raise UserError(f"'{path}' is {kind}: --labels takes a CSV. Save the table as CSV")
        found = list(iter_lines(path, lambda name: bool(find_role(name, _ROLES))))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist: --labels takes a CSV with the columns label and patient") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. --labels takes a CSV") from error
    header, lines = (found[0][1], found[1:]) if found else ([], [])
    places, notes = find_columns(header, _ROLES, path)
    named = [name for name in header if name]
    if not {"label", "patient", "path"} & set(places) or len(set(named)) != len(named):
        raise UserError(
            f"'{path}' must have the columns label or patient, each once, and slide or path if known; found: "
            f"{', '.join(map(quote, named))}"
        )
    for note in notes:
        logger.info(f"'{path}': {note}")
    if ignored := [name for place, name in enumerate(header) if name and place not in places.values()]:
        logger.info(f"'{path}': columns that are not read: {join_few(map(quote, ignored), _NAMED)}")
    n = len(header)
    wrong = next(((number, cells) for number, cells in lines if len(cells) < n or any(cells[n:])), None)
    if wrong is not None:
        raise UserError(f"'{path}' line {wrong[0]}: expected {n} cells, found {len(wrong[1])}")
    return [{role: cells[place] for role, place in places.items()} for _, cells in lines]
