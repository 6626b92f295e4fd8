"""A CSV with a row for each patient, as `--groups` and `--covariates` take it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cytosae_pipeline.errors import UserError, join_few, quote
from cytosae_pipeline.images.columns import is_unknown
from cytosae_pipeline.images.csv_text import Roles, find_columns, find_kind, find_role, iter_lines
from cytosae_pipeline.images.image_list import join_lines

logger = logging.getLogger(__name__)

NAMED = 10
"""Most columns that a message names."""


class PatientTable(NamedTuple):
    """The rows of a CSV."""

    header: Sequence[str]
    """Names of the columns."""
    places: dict[str, int]
    """Column of each role, counted from 0."""
    rows: list[tuple[int, list[str]]]
    """Number of the line and cells of each row, as many as the header has, or more."""


def read_patient_table(path: Path, roles: Roles, *, option: str, columns: str) -> PatientTable:
    """Read a CSV in which every role has one column.

    Args:
        path: The CSV.
        roles: What the columns contain that it must have.
        option: The option that names the file, for messages.
        columns: The columns that it takes, for messages.

    Raises:
        UserError: If the file cannot be read, is no CSV, or lacks one of the columns or has it twice.
    """
    takes = f"{option} takes a CSV with the columns {columns}"
    try:
        if kind := find_kind(path):
            raise UserError(f"'{path}' is {kind}: {option} takes a CSV. Save the table as CSV")
        lines = list(iter_lines(path, lambda name: bool(find_role(name, roles))))
    except FileNotFoundError as error:
        raise UserError(f"'{path}' does not exist: {takes}") from error
    except OSError as error:
        raise UserError(f"'{path}' cannot be read ({error.strerror}): {takes}") from error
    header = lines[0][1] if lines else []
    places, notes = find_columns(header, roles, path)
    twice = any(header.count(header[place]) > 1 for place in places.values())
    if set(places) != set(roles) or twice:
        found = join_few(map(quote, header), NAMED) or "nothing"
        needed = f"columns {' and '.join(roles)}, each once" if len(roles) > 1 else f"column {next(iter(roles))}, once"
        raise UserError(f"'{path}' must have the {needed}, found: {found}")
    for note in notes:
        logger.info(f"'{path}': {note}")
    # Lines may end early.
    return PatientTable(header, places, [(number, [*cells, *[""] * len(header)]) for number, cells in lines[1:]])


def clean_cell(cell: str) -> str:
    """A name as one line, as in manifests; '' if it is unknown."""
    return "" if is_unknown(cell) else join_lines(cell)
