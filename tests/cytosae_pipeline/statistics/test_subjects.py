"""The table of patients and the persons behind them: what is read, and every message about what cannot be."""

import re

import numpy as np
import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.covariates import read_covariates
from cytosae_pipeline.statistics.groups import PatientGroups
from cytosae_pipeline.statistics.subjects import find_subjects, require_one_group

PATIENTS = ("p0", "p1", "p2", "p3")


class _Store:
    """A store's names, as `find_subjects` looks at them; a real one is in test_report_subjects.py."""

    path = "s.zarr"

    def __init__(self, **columns):
        class Images:
            patient = ("p0", "p0", "p1", "p2", "p3", "", "p3")

        self.images, self.image_columns = Images, columns


def _texts(*cells):
    return np.array(cells, dtype=np.dtypes.StringDType())


@pytest.fixture
def table(tmp_path):
    def read(text, patients=PATIENTS):
        path = tmp_path / "patients.csv"
        path.write_text(text)
        return read_covariates(path, patients)

    return read


def test_columns_are_typed_and_in_the_order_of_the_patients(table):
    found = table("Patient ID;age;site;dose;\np3;40; south ;0.5\np1;NA;north;1.5\np0;7;007;2\np2;50;north;1e-3\n")
    typed = found.typed()
    assert list(typed) == ["age", "site", "dose"]
    np.testing.assert_array_equal(typed["age"], [7, np.nan, 50, 40])
    assert typed["site"].tolist() == ["007", "north", "north", "south"]
    np.testing.assert_array_equal(typed["dose"], [2, 1.5, 1e-3, 0.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,age\np0,1\n", "must have the column patient, once, found: 'id', 'age'"),
        ("", "must have the column patient, once, found: nothing"),
        ("patient,patient\np0,p0\n", "must have the column patient, once, found: 'patient', 'patient'"),
        ("patient,age,age\np0,1,2\n", "has the column 'age' twice, expected once: rename or delete one of them"),
        ("patient,age\np0,1\n,2\n", "line 3 names no patient: write one, or delete the line"),
        (
            "patient,age\np0,1\np1,2\n\np0,3\n",
            "has patient 'p0' in lines 2 and 5, expected one row for each patient: delete one of them",
        ),
        (
            "patient,age\np0,1\np1,2\np2,3\np3,4\nq9,5\nq8,5\n",
            "must have one row for each of the 4 patients of the store, but names 2 that the store does not have, such "
            "as 'q9', 'q8': delete their rows, or write them as the store does",
        ),
        (
            "patient,age\np0,1\nP1,2\n",
            "names 1 that the store does not have, such as 'P1', and lacks 3 that it has, such as 'p1', 'p2', 'p3': "
            "delete their rows, or write them as the store does; add a row for each",
        ),
        ("patient,age\np0,1\n", "but lacks 3 that it has, such as 'p1', 'p2', 'p3': add a row for each"),
        ("PK\x03\x04\0", "is an Excel workbook or a ZIP archive: --covariates takes a CSV. Save the table as CSV"),
        ("patient,\x1b[1m,\x1b[1m\np0,1,2\n", "has the column '\\x1b[1m' twice"),
    ],
)
def test_tables_that_are_none_or_do_not_fit_are_refused(table, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        table(text)


def test_a_table_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist: --covariates takes a CSV with the columns patient and any"):
        read_covariates(tmp_path / "none.csv", PATIENTS)
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\): --covariates takes a CSV"):
        read_covariates(tmp_path, PATIENTS)


def test_persons_come_from_the_table_else_from_the_images(table):
    covariates = table("patient,subject,donor\np0,a,x\np1,a,y\np2,b,x\np3,b,x\n")
    images = _Store(subject=_texts("c", "c", "d", "d", "c", "z", "c"))
    found = find_subjects(PATIENTS, images, covariates, None)
    assert (found.names, found.of.tolist()) == (("a", "b"), [0, 0, 1, 1])
    assert found.column == f"column 'subject' of '{covariates.path}'"
    assert find_subjects(PATIENTS, images, covariates, "donor").of.tolist() == [0, 1, 0, 0]
    found = find_subjects(PATIENTS, images, table("patient,age\np0,1\np1,2\np2,3\np3,4\n"), None)
    assert (found.names, found.of.tolist()) == (("c", "d"), [0, 1, 1, 0])
    assert found.column == "column 'subject' of the store's images"
    assert find_subjects(PATIENTS, images, None, "SUBJECT").of.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    "column",
    [
        np.array([1, 1, 2, 2, 1, 9, 1]), np.array([1, np.nan, 2, 2, 1, np.nan, 1]),
        _texts("01", "NA", "2", "2", "01", "", ""),
    ],
)  # fmt: skip
def test_persons_may_be_numbers_and_unknown_for_some_images(column):
    found = find_subjects(PATIENTS, _Store(subject=column), None, None)
    assert found.of.tolist() == [0, 1, 1, 0]
    assert found.names == (("01" if column.dtype.kind == "T" else "1"), "2")


def test_without_a_column_every_patient_is_a_person(table):
    assert find_subjects(PATIENTS, _Store(), None, None) is None
    one_each = table("patient,subject\np0,a\np1,b\np2,c\np3,d\n")
    assert find_subjects(PATIENTS, _Store(), one_each, None) is None
    pairs = _Store(subject=_texts("c", "c", "d", "d", "c", "z", "c"))
    assert find_subjects(PATIENTS, pairs, None, "patient") is None


def test_columns_that_do_not_say_who_a_patient_is_are_refused(table):
    covariates = table("patient,subject,age\np0,a,1\np1,NA,1\np2,,1\np3,a,2\n")
    with pytest.raises(UserError, match=r"column 'subject' of '.*patients.csv' is empty for 2 of 4 patients, such as"):
        find_subjects(PATIENTS, _Store(), covariates, None)
    with pytest.raises(
        UserError,
        match=r"--subject_column 'who' names no column: beside path, label and patient, '.*patients.csv' has "
        r"'subject', 'age', the images of store 's.zarr' have 'site'. Give one of these, or a table with it",
    ):
        find_subjects(PATIENTS, _Store(site=_texts(*"abcdefg")), covariates, "who")
    with pytest.raises(UserError, match="the images of store 's.zarr' have none"):
        find_subjects(PATIENTS, _Store(), None, "who")
    two = _Store(subject=_texts("c", "d", "d", "d", "c", "z", "c"))
    with pytest.raises(
        UserError, match="column 'subject' of the store's images gives patient 'p0' two subjects, 'c' and 'd', expected"
    ):
        find_subjects(PATIENTS, two, None, None)


def test_a_subject_in_two_groups_is_named_with_its_column(table):
    subjects = find_subjects(PATIENTS, _Store(), table("patient,subject\np0,a\np1,b\np2,b\np3,b\n"), None)
    require_one_group(subjects, PatientGroups(("ill", "well"), np.array([1, 0, -1, 0]), ""), PATIENTS)
    split = PatientGroups(("ill", "well"), np.array([1, 0, -1, 1]), "")
    with pytest.raises(UserError) as caught:
        require_one_group(subjects, split, PATIENTS)
    assert "gives subject 'b' patients of two groups, such as 'p1' in 'ill' and 'p3' in 'well'" in str(caught.value)
    assert str(caught.value).startswith("column 'subject' of '")
    assert "--subject_column patient" in str(caught.value)
    assert "--pseudonymize" not in str(caught.value)
    with pytest.raises(UserError, match="leave out --pseudonymize"):
        require_one_group(subjects, split, PATIENTS, pseudonymous=True)
