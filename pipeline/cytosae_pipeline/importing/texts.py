"""Names, labels and patients of rows as texts: which columns contain them, and which of their values mean unknown."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cytosae_pipeline.config import ImportConfig
from cytosae_pipeline.errors import UserError, join_few, quote
from cytosae_pipeline.images.columns import is_unknown
from cytosae_pipeline.images.csv_text import ROLES, find_role
from cytosae_pipeline.images.image_list import ImageRow, join_lines, unify_names

logger = logging.getLogger(__name__)

_OPTIONS = {"path": "name_column", "label": "label_column", "patient": "patient_column"}
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


def read_row_texts(
    path: Path, config: ImportConfig, found: Sequence[str], read: Callable[[str], Sequence[object]]
) -> dict[str, list[str]]:
    """The path (name), label and patient of a table's rows as texts, for each that it has a column of.

    Args:
        path: The file, for messages.
        config: Names the columns.
        found: Names of the table's columns.
        read: Returns the values of a column.

    Raises:
        UserError: As for `find_row_columns` and `to_texts`.
    """
    columns = find_row_columns(path, config, found)
    texts = {role: to_texts(read(column), path, column) for role, column in columns.items()}
    names = texts.get("path", [])
    if not any(names):
        texts.pop("path", None)
        return texts
    # A column `image` or `file` may say what a row was cut from; one called `path` names the rows.
    if columns["path"].casefold() not in ("path", config.name_column) and len(set(names)) < len(names):
        logger.info(f"'{path}': column {quote(columns['path'])} repeats its values, so that it does not name the rows")
        del texts["path"]
    return texts


def find_row_columns(path: Path, config: ImportConfig, found: Sequence[str]) -> dict[str, str]:
    """The columns of a table that contain the path (name), label and patient of its rows, for each that there is.

    A column that the user named must be there. The others are recognised as in a CSV: by their own name, then by their
    own name in other letters, then by what else they may be called.

    Args:
        path: The file, for messages.
        config: Names the columns.
        found: Names of the table's columns.

    Raises:
        UserError: If a named column is missing, or two columns may contain the same.
    """
    columns = {}
    for role, field in _OPTIONS.items():
        wanted = getattr(config, field)
        if wanted in found:
            columns[role] = wanted
        elif wanted != ImportConfig.__dataclass_fields__[field].default:
            raise UserError(
                f"'{path}' has no column {quote(wanted)} ({field}); found {join_few(map(quote, found), _NAMED)}"
            )
        else:
            fitting = [name for name in found if find_role(name, ROLES) == role]
            fitting = [name for name in fitting if name.casefold() == role] or fitting
            if len(fitting) > 1:
                raise UserError(
                    f"columns {' and '.join(map(quote, fitting))} of '{path}' may both be the {role}: choose one with "
                    f"--{field}"
                )
            if fitting:
                columns[role] = fitting[0]
                logger.info(f"'{path}': column {quote(fitting[0])} is read as the {role}")
    return columns


def to_texts(values: Sequence[object], path: Path, column: str) -> list[str]:
    """Values of a column as texts, '' for None and NaN.

    Whole numbers that are stored as floating-point numbers, as in a column with gaps, are written without a fraction.

    Args:
        values: The values.
        path: The file, for messages.
        column: The column's name, for messages.

    Raises:
        UserError: If a value is no text, number or date.
    """
    known = [value for value in values if value is not None and value == value]
    odd = next((value for value in known if isinstance(value, dict | list | tuple | set | bytearray)), None)
    if odd is not None:
        raise UserError(
            f"column {quote(column)} of '{path}' contains values of type {type(odd).__name__}, expected texts or "
            "numbers. Name another column with --name_column, --label_column or --patient_column"
        )
    is_whole = all(isinstance(value, float) and value.is_integer() for value in known)
    return [_to_text(value, is_whole=is_whole) for value in values]


def _to_text(value: object, *, is_whole: bool) -> str:
    """One value as text."""
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode()
    return str(int(value)) if is_whole and isinstance(value, float) else str(value)


def settle_names(texts: Sequence[RowTexts]) -> list[RowTexts]:
    """Labels and patients on one line, in one spelling, and '' where unknown; messages say what was changed.

    Args:
        texts: What is known about the rows of every file.
    """
    labels = {name: _settle(name) for name in sorted({name for known in texts for name in known.labels})}
    patients = {name: _settle(name) for name in sorted({name for known in texts for name in known.patients})}
    for what, settled, columns in (
        ("label", labels, [known.labels for known in texts]),
        ("patient", patients, [known.patients for known in texts]),
    ):
        words = {name for name, text in settled.items() if name and not text}
        counts = Counter(name for column in columns for name in column if name in words)
        if counts:
            shown = join_few((f"{n:,} {quote(word)}" for word, n in counts.most_common()), _NAMED)
            logger.warning(f"{what}s read as unknown: {shown}. Rename them if they are meant")
    rows = [ImageRow("", text, "") for text in labels.values()] + [ImageRow("", "", text) for text in patients.values()]
    spelt, notes = unify_names(rows)
    for note in notes:
        logger.info(note)
    label_of = dict(zip(labels, (row.label for row in spelt), strict=False))
    patient_of = dict(zip(patients, (row.patient for row in spelt[len(labels) :]), strict=True))
    return [
        known._replace(
            labels=[label_of[name] for name in known.labels], patients=[patient_of[name] for name in known.patients]
        )
        for known in texts
    ]


def _settle(name: str) -> str:
    """A label or patient on one line, '' for words that mean unknown."""
    text = join_lines(name).strip()
    return "" if is_unknown(text) else text
