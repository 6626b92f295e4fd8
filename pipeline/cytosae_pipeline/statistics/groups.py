"""The group of each patient: from a CSV, or the label if every patient has a single one."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.format.layout import ImageTable
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.images.csv_text import ROLES
from cytosae_pipeline.statistics.counts import patient_labels
from cytosae_pipeline.statistics.label_index import LabelIndex
from cytosae_pipeline.statistics.patient_table import clean_cell, read_patient_table

_ROLES = {"patient": ROLES["patient"], "group": {"group", "groups", "groupname", "cohort", "arm"}}


class PatientGroups(NamedTuple):
    """Groups of patients."""

    names: tuple[str, ...]
    """Groups, sorted; empty if there are none."""
    of: npt.NDArray[np.int64]
    """Group of each patient, shape `(P,)`; -1 for none."""
    why_none: str
    """If there is nothing to compare: why, and what to do about it."""
    gaps: str = ""
    """Mismatches between the file and the store: patients without a group, and unknown patients."""


def find_groups(patients: Sequence[str], images: ImageTable, path: Path | None) -> PatientGroups:
    """The group of every patient.

    Args:
        patients: Patients, in the order of the result.
        images: The readable images; their labels are the groups if there is no file and every patient has one label.
        path: CSV with columns patient and group.

    Raises:
        UserError: If the file is not such a table, gives a patient two groups, or names none of the patients.
    """
    if path is not None:
        of = _read_groups(path)
        if not set(of) & set(patients):
            raise UserError(
                f"'{path}' names none of the {len(patients)} patients of the store, such as "
                f"{', '.join(map(quote, patients[:3]))}"
            )
    else:
        labels = {patient: names for patient, names in patient_labels(images).items() if names}
        several = next((patient for patient, names in labels.items() if len(names) > 1), None)
        if not labels or several is not None:
            why = "the images have no labels" if not labels else "patients have images of several labels"
            text = (
                f"There are no groups of patients: {why}. Pass them with --groups patients.csv (columns patient,group)."
            )
            return PatientGroups((), np.full(len(patients), -1), text)
        of = {patient: names[0] for patient, names in labels.items()}
    gaps = _find_gaps(patients, of, path) if path is not None else ""
    names, index = LabelIndex.of([of.get(patient, "") for patient in patients])
    why = "" if len(names) > 1 else f"All patients belong to one group, {quote(names[0])}: there is nothing to compare."
    return PatientGroups(names, index, why, gaps)


def _find_gaps(patients: Sequence[str], of: dict[str, str], path: Path) -> str:
    """Mismatches between the groups of a file and the patients of the store; empty if there are none."""
    without = [patient for patient in patients if patient not in of]
    unknown = sorted(set(of) - set(patients))
    parts = [
        without and f"has no group for {len(without)} of {len(patients)} patients, such as {quote(without[0])}",
        unknown and f"names patients that are not in the store ({len(unknown):,}), such as {quote(unknown[0])}",
    ]
    found = " and ".join(part for part in parts if part)
    return f"'{path}' {found}" if found else ""


def _read_groups(path: Path) -> dict[str, str]:
    """Group by patient; patients without one are left out.

    Raises:
        UserError: If the file cannot be read or is not such a table.
    """
    table = read_patient_table(path, _ROLES, option="--groups", columns="patient,group")
    places = table.places
    rows = [(clean_cell(cells[places["patient"]]), clean_cell(cells[places["group"]])) for _, cells in table.rows]
    of: dict[str, str] = {}
    for patient, group in rows:
        if of.get(patient, group) != group:
            raise UserError(
                f"'{path}' gives patient {quote(patient)} two groups, {quote(of[patient])} and {quote(group)}"
            )
        if patient and group:
            of[patient] = group
    return of
