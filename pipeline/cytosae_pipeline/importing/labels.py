"""Labels, patients and names of rows from a CSV beside the embeddings."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.images.csv_text import ROLES, find_columns, find_kind, find_role, iter_lines
from cytosae_pipeline.importing.part import Part
from cytosae_pipeline.importing.texts import RowTexts, settle_names

logger = logging.getLogger(__name__)

_ROLES = {**ROLES, "slide": {"slide", "slideid", "slidename"}}
_NAMED = 10


class _Table(NamedTuple):
    """A CSV of labels."""

    path: Path
    """The file."""
    roles: tuple[str, ...]
    """What its columns contain."""
    lines: list[dict[str, str]]
    """Cells of each line by role; of blank lines too, as they may stand for a row."""
    numbers: list[int]
    """Number of each line in the file."""
    empty: set[int]
    """Numbers of lines without any text, in columns that are not read either."""
    blank: set[int]
    """Numbers of those that have no cells at all."""


def describe_rows(parts: Sequence[Part], path: Path | None) -> list[RowTexts]:
    """What is known about the rows of every file; a CSV takes precedence over columns in the files.

    Args:
        parts: The files.
        path: The CSV, if there is one.

    Raises:
        UserError: If the CSV does not fit the files.
    """
    if path is None:
        return settle_names([_texts(part, {}) for part in parts])
    table = _read(path)
    if "slide" in table.roles:
        return settle_names(_by_slide(parts, table))
    if len(parts) > 1:
        raise UserError(
            f"'{path}' must have a column slide (the file's name without its ending), as there are {len(parts):,} "
            f"files, such as '{parts[0].path.name}'"
        )
    return settle_names([_by_row(parts[0], table)])


def _by_row(part: Part, table: _Table) -> RowTexts:
    """One line for each row of a single file.

    Raises:
        UserError: If there are not as many, or names do not agree.
    """
    # Row numbers are the default index of a table; they do not name its rows.
    is_named = part.names is not None and list(part.names) != [str(row) for row in range(part.shape[0])]
    if "path" in table.roles:
        lines = [line for line in table.lines if any(line.values())]
        if is_named and part.names is not None and not part.are_numbers:
            lines = _in_order(lines, part.names, table.path, part.path)
    else:
        lines = _without_end(table, part.shape[0])
    if len(lines) != part.shape[0]:
        raise UserError(
            f"'{table.path}' has {len(lines):,} lines, but '{part.path}' has {part.shape[0]:,} rows: expected one line "
            "per row, in the same order, or a column slide"
        )
    return _texts(part, {role: [line[role] for line in lines] for role in table.roles})


def _without_end(table: _Table, n: int) -> list[dict[str, str]]:
    """The lines, without empty ones at the end that no row needs.

    Raises:
        UserError: If a blank line stands between others, so that it may or may not stand for a row.
    """
    last = max((number for number in table.numbers if number not in table.empty), default=0)
    between = min((number for number in table.blank if number < last), default=None)
    if between is not None:
        raise UserError(
            f"'{table.path}' line {between} is blank, and lines are counted against rows. Delete it, or write NA "
            "there if a row has no label"
        )
    kept = [place for place, number in enumerate(table.numbers) if number not in table.blank]
    while len(kept) > n and table.numbers[kept[-1]] > last:
        kept.pop()
    return [table.lines[place] for place in kept]


def _in_order(lines: Sequence[dict[str, str]], names: Sequence[str], path: Path, source: Path) -> list[dict[str, str]]:
    """Lines in the order of the rows that they name.

    Raises:
        UserError: If the CSV names a row twice, or other rows than the file does.
    """
    by_name, wanted = {line["path"]: line for line in lines}, set(names)
    missing = [name for name in names if name not in by_name]
    further = [name for name in by_name if name not in wanted]
    if missing or further or len(by_name) < len(lines):
        twice = next((name for name, n in Counter(line["path"] for line in lines).items() if n > 1), "")
        what = (
            f"no line for row {quote(missing[0])} and {len(missing) - 1:,} more" if missing[1:]
            else f"no line for row {quote(missing[0])}" if missing
            else f"two lines for row {quote(twice)}" if twice
            else f"{say_count(len(further), 'line')} for other rows, such as {quote(further[0])}"
        )  # fmt: skip
        raise UserError(
            f"'{path}' and '{source}' both name the rows, but the CSV has {what}. "
            "Leave out one's names, or make them agree"
        )
    return [by_name[name] for name in names]


def _by_slide(parts: Sequence[Part], table: _Table) -> list[RowTexts]:
    """One line for all rows of a file.

    Raises:
        UserError: If a file has no line, or two different ones.
    """
    path = table.path
    found: dict[str, dict[str, str]] = {}
    for line in table.lines:
        if any(line.values()) and found.setdefault(line["slide"], line) != line:
            raise UserError(f"'{path}' has two different lines for slide {quote(line['slide'])}")
    missing = [part.slide for part in parts if part.slide not in found]
    if missing:
        raise UserError(
            f"'{path}' has no line for {len(missing):,} of {len(parts):,} files: slides "
            f"{join_few(map(quote, missing), _NAMED)}. Slides are named like the files without their ending; found "
            f"{join_few(map(quote, found), 3) or 'none'}"
        )
    slides = {part.slide for part in parts}
    if surplus := [slide for slide in found if slide not in slides]:
        n = f"of {say_count(len(found), 'slide')}"
        without = say_count(len(surplus), f"{n} has", f"{n} have")
        logger.warning(f"'{path}': {without} no file: {join_few(map(quote, surplus), _NAMED)}")
    columns = [name for name in ("label", "patient") if name in table.roles]
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


def _read(path: Path) -> _Table:
    """The lines of a CSV, cells without surrounding blanks.

    Raises:
        UserError: If it cannot be read, has none of the columns, or its lines have several lengths.
    """
    try:
        if kind := find_kind(path):
            raise UserError(f"'{path}' is {kind}: --labels takes a CSV. Save the table as CSV")
        found = list(iter_lines(path, lambda name: bool(find_role(name, _ROLES)), keep_empty=True))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist: --labels takes a CSV with the columns label and patient") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}. --labels takes a CSV") from error
    start = next((place for place, (_, cells) in enumerate(found) if any(cells)), len(found))
    header, lines = (found[start][1], found[start + 1 :]) if found[start:] else ([], [])
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
    wrong = next(((number, cells) for number, cells in lines if cells and (len(cells) < n or any(cells[n:]))), None)
    if wrong is not None:
        raise UserError(f"'{path}' line {wrong[0]}: expected {n} cells, found {len(wrong[1])}")
    return _Table(
        path,
        tuple(places),
        [{role: cells[place] if cells else "" for role, place in places.items()} for _, cells in lines],
        [number for number, _ in lines],
        {number for number, cells in lines if not any(cells)},
        {number for number, cells in lines if not cells},
    )
