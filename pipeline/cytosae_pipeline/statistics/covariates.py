"""What is known about each patient beside the group: the table of `--covariates`, one row per patient."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from cytosae_pipeline.errors import UserError, join_few, quote
from cytosae_pipeline.images.columns import type_cells
from cytosae_pipeline.images.csv_text import ROLES
from cytosae_pipeline.images.image_list import join_lines
from cytosae_pipeline.statistics.patient_table import NAMED, clean_cell, read_patient_table

# In a list of images `subject` may be the only name of the patient; here it is the person behind several patients.
_NOT_PATIENTS = frozenset({"subject", "subjectid", "donor", "donorid", "participant", "participantid"})
_ROLES = {"patient": ROLES["patient"] - _NOT_PATIENTS}
_EXAMPLES = 3


class Covariates(NamedTuple):
    """Properties of patients."""

    path: Path
    """The CSV."""
    cells: Mapping[str, Sequence[str]]
    """Cells of each further column as they are written, one per patient, in the order of the patients."""

    def typed(self) -> dict[str, npt.NDArray[Any]]:
        """The columns as int64, float64 (NaN where unknown) or text, as further columns of a manifest are typed."""
        return {name: type_cells(cells) for name, cells in self.cells.items()}


def read_covariates(path: Path, patients: Sequence[str]) -> Covariates:
    """Read the table, and check that it has exactly one row for each patient.

    Args:
        path: CSV with a column `patient` and any others.
        patients: The patients, in the order of the result.

    Raises:
        UserError: If the file is not such a table, names a column or a patient twice, names patients that the store
            does not have, or lacks some that it has.
    """
    table = read_patient_table(path, _ROLES, option="--covariates", columns="patient and any others")
    place = table.places["patient"]
    columns = {at: name for at, name in enumerate(table.header) if at != place and name}
    twice = [name for name, n in Counter(columns.values()).items() if n > 1]
    if twice:
        raise UserError(f"'{path}' has the column {quote(twice[0])} twice, expected once: rename or delete one of them")
    named = [(number, clean_cell(cells[place]), cells) for number, cells in table.rows]
    nameless = next((number for number, name, _ in named if not name), None)
    if nameless is not None:
        raise UserError(f"'{path}' line {nameless} names no patient: write one, or delete the line")
    _check_patients(path, [(number, name) for number, name, _ in named], patients)
    by_name = {name: cells for _, name, cells in named}
    cells = {name: [join_lines(by_name[patient][at]) for patient in patients] for at, name in columns.items()}
    return Covariates(path, cells)


def describe_columns(names: Sequence[str]) -> str:
    """Some columns, for messages."""
    return join_few(map(quote, names), NAMED) or "none"


def _check_patients(path: Path, named: Sequence[tuple[int, str]], patients: Sequence[str]) -> None:
    """Raise unless every patient has exactly one row, and every row a patient."""
    lines: dict[str, int] = {}
    for number, name in named:
        if name in lines:
            raise UserError(
                f"'{path}' has patient {quote(name)} in lines {lines[name]} and {number}, expected one row for each "
                "patient: delete one of them"
            )
        lines[name] = number
    known = set(patients)
    unknown = [name for name in lines if name not in known]
    missing = [name for name in patients if name not in lines]
    found = [
        unknown and f"names {len(unknown):,} that the store does not have, such as {_few(unknown)}",
        missing and f"lacks {len(missing):,} that it has, such as {_few(missing)}",
    ]
    problem = ", and ".join(part for part in found if part)
    if problem:
        do = [unknown and "delete their rows, or write them as the store does", missing and "add a row for each"]
        raise UserError(
            f"'{path}' must have one row for each of the {len(patients):,} patients of the store, but {problem}: "
            f"{'; '.join(part for part in do if part)}"
        )


def _few(names: Sequence[str]) -> str:
    """Some patients."""
    return ", ".join(map(quote, names[:_EXAMPLES]))
