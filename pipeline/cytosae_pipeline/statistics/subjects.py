"""Which person each patient of a store is: several samples of one person are not several persons."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.subjects import SplitSubjectError, subject_groups
from cytosae_cache.joined_store import JoinedStore
from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.images.columns import column_texts
from cytosae_pipeline.statistics.covariates import Covariates, describe_columns, read_covariates
from cytosae_pipeline.statistics.groups import PatientGroups
from cytosae_pipeline.statistics.inputs import Inputs
from cytosae_pipeline.statistics.label_index import LabelIndex, number_names
from cytosae_pipeline.statistics.patient_table import clean_cell

DEFAULT_COLUMN = "subject"
"""Column that is taken if there is one."""

PATIENT_COLUMN = "patient"
"""Name that stands for the patients themselves: every patient is a person of its own."""


class Subjects(NamedTuple):
    """The persons behind some patients."""

    names: tuple[str, ...]
    """Persons, sorted by the name shown."""
    of: npt.NDArray[np.int64]
    """Person of each patient, shape `(P,)`."""
    column: str
    """The column that says so, for messages: its name, and where it is."""


def find_subjects(
    patients: Sequence[str], store: ActivationStore, covariates: Covariates | None, column: str | None
) -> Subjects | None:
    """The person behind each patient; None if every patient is a person of its own, as far as is known.

    The column is looked for in the table of covariates first, then among the further columns of the store's images.

    Args:
        patients: The patients, in the order of the result.
        store: The store.
        covariates: The table of these patients; None without one.
        column: Name of the column; None takes `subject` if there is one, `patient` makes every patient a person.

    Raises:
        UserError: If there is no such column, it is empty for a patient, or gives one two persons.
    """
    if column == PATIENT_COLUMN:
        return None
    name = column or DEFAULT_COLUMN
    if covariates is not None and (found := same_name(name, covariates.cells)) is not None:
        where = f"column {quote(found)} of '{covariates.path}'"
        persons = [clean_cell(cell) for cell in covariates.cells[found]]
    elif (found := same_name(name, store.image_columns)) is not None:
        where = f"column {quote(found)} of the store's images"
        persons = _persons_of_images(patients, store, found, where)
    elif column is None:
        return None
    else:
        images = f"the images of store '{store.path}' have {describe_columns(list(store.image_columns))}"
        table = f"'{covariates.path}' has {describe_columns(list(covariates.cells))}, " if covariates else ""
        raise UserError(
            f"--subject_column {quote(column)} names no column: beside path, label and patient, {table}{images}. Give "
            "one of these, or a table with it: --covariates patients.csv (columns patient,subject)"
        )
    without = [patient for patient, person in zip(patients, persons, strict=True) if not person]
    if without:
        raise UserError(
            f"{where} is empty for {len(without):,} of {len(patients):,} patients, such as {quote(without[0])}, "
            "expected the person of each: fill it in, where nothing is known with the patient's own name. To compare "
            "patients as if each were a person, give --subject_column patient"
        )
    names, of = LabelIndex.of(persons)
    return Subjects(names, of, where) if len(names) < len(patients) else None


def find_persons(inputs: Inputs, covariates: Path | None, column: str | None) -> npt.NDArray[np.int64] | None:
    """The person of each image, shape `(n_images,)`, -1 where no patient is known; None if patients are persons.

    Args:
        inputs: The store.
        covariates: Table of patients; None without one.
        column: As for `find_subjects`.

    Raises:
        UserError: As for `find_subjects` and `read_covariates`.
    """
    patients = inputs.patients
    table = None if covariates is None else read_covariates(covariates, patients.names)
    found = find_subjects(patients.names, inputs.store, table, column)
    return None if found is None else np.where(patients.numbers >= 0, found.of[patients.numbers], -1)


def require_one_group(
    subjects: Subjects, groups: PatientGroups, patients: Sequence[str], *, pseudonymous: bool = False
) -> None:
    """Refuse subjects whose patients are in two groups.

    Args:
        subjects: The subjects; their names are written into the message.
        groups: Groups of the patients.
        patients: The patients, as they are shown.
        pseudonymous: Whether these names are pseudonyms.

    Raises:
        UserError: If there is one.
    """
    try:
        subject_groups(groups.of, subjects.of, len(subjects.names))
    except SplitSubjectError as error:
        first, second = (
            next(
                f"{quote(patients[at])} in {quote(groups.names[group])}"
                for at in np.flatnonzero((subjects.of == error.subject) & (groups.of == group)).tolist()
            )
            for group in error.groups
        )
        names = " To see names instead of pseudonyms, leave out --pseudonymize." if pseudonymous else ""
        raise UserError(
            f"{subjects.column} gives subject {quote(subjects.names[error.subject])} patients of two groups, such as "
            f"{first} and {second}, but a subject is compared as one person, in one group. Correct the column or "
            "--groups, leave the patients of one group out of --groups, or compare patients as if each were a person "
            f"with --subject_column patient.{names}"
        ) from error


def same_name(wanted: str, names: Iterable[str]) -> str | None:
    """The column of a name: the same in every letter, else the only one that differs in upper and lower case alone."""
    known = list(names)
    near = [name for name in known if name.casefold() == wanted.casefold()]
    return wanted if wanted in known else near[0] if len(near) == 1 else None


def _persons_of_images(patients: Sequence[str], store: ActivationStore, column: str, where: str) -> list[str]:
    """The person of each patient by a column of the images; '' if it is not known.

    Raises:
        UserError: If the images of a patient name two.
    """
    texts = column_texts(store.image_columns[column])
    if isinstance(store, JoinedStore):
        texts = _tell_apart(store, texts, where)
    persons: dict[int, str] = {}
    for at, text in zip(number_names(store.images.patient, patients).tolist(), texts, strict=True):
        if at < 0 or not text:
            continue
        if persons.setdefault(at, text) != text:
            raise UserError(
                f"{where} gives patient {quote(patients[at])} two subjects, {quote(persons[at])} and {quote(text)}, "
                "expected one. Say who it is with --covariates patients.csv (columns patient,subject), or build the "
                "store again from a corrected manifest, with --overwrite"
            )
    return [persons.get(at, "") for at in range(len(patients))]


def _tell_apart(store: JoinedStore, persons: list[str], where: str) -> list[str]:
    """The person of each image, with the name of the data set where every data set has persons of its own.

    Raises:
        UserError: If a name stands in several data sets, and it was not said what that means.
    """
    datasets = column_texts(store.image_columns[store.dataset_column])
    if store.joined_patients == "separate":
        return [f"{dataset}/{person}" if person else "" for dataset, person in zip(datasets, persons, strict=True)]
    if store.joined_patients is None:
        first: dict[str, str] = {}
        for dataset, person in zip(datasets, persons, strict=True):
            if person and first.setdefault(person, dataset) != dataset:
                raise UserError(
                    f"{where} has {quote(person)} in the data sets {quote(first[person])} and {quote(dataset)}. Say "
                    "what that means: --joined_patients same if it is the same person, --joined_patients separate if "
                    "it is another one in each data set"
                )
    return persons
