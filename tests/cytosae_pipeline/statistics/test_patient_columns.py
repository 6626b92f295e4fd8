"""Properties of patients: their types, pooling by subject, and which columns of images are of patients."""

from types import SimpleNamespace

import numpy as np
import pytest

from cytosae_pipeline.errors import UserError
from cytosae_pipeline.statistics.covariates import Covariates
from cytosae_pipeline.statistics.patient_columns import Column, collect_columns, require_column

TEXT = np.dtypes.StringDType()


def _store(**columns):
    images = SimpleNamespace(patient=np.array(["p1", "p1", "p2", "", "p3"]))
    return SimpleNamespace(images=images, image_columns=columns)


@pytest.mark.parametrize(
    ("values", "names", "levels"),
    [
        (np.array(["b", "a", "NA", "b"], dtype=TEXT), ("a", "b"), [1, 0, -1, 1]),
        (np.array([3, 1, 3, 2]), ("1", "2", "3"), [2, 0, 2, 1]),
        (np.array([1.0, np.nan, 2.0, 1.0]), ("1", "2"), [0, -1, 1, 0]),
        (np.array([0.5, np.nan, 2.0, 0.5]), None, [0, -1, 1, 0]),
        (np.arange(10, 18), None, list(range(8))),
    ],
)
def test_few_whole_numbers_and_texts_are_names(values, names, levels):
    column = Column.of(values)
    assert column.names == names
    assert column.levels.tolist() == levels
    assert column.take(np.array([2, 0])).levels.tolist()[1] == sorted(set(levels) - {-1}).index(levels[0]) or names


def test_subjects_have_the_mean_number_and_the_one_name_of_their_samples():
    slots = np.array([0, 0, 1, -1, 2])
    numbers = Column.of(np.array([1.5, 2.5, np.nan, 9.0, 4.0])).pool(slots, 3)
    np.testing.assert_array_equal(numbers.numbers, [2.0, np.nan, 4.0])
    names = Column.of(np.array(["x", "NA", "y", "y", "x"], dtype=TEXT))
    assert names.pool(slots, 3).levels.tolist() == [0, 1, 0]
    assert names.pool(np.array([0, 1, 0, -1, 1]), 2) is None


def test_columns_of_images_count_if_a_patient_has_one_value():
    store = _store(
        site=np.array(["a", "a", "b", "c", ""], dtype=TEXT),
        area=np.array([1.5, 2.5, 3.0, 1.0, 2.0]),
        age=np.array([70.5, 70.5, 60, 1, np.nan]),
    )
    table = Covariates("t.csv", {"Age": ["1.5", "2.5", "3.5"], "who": ["u", "v", "w"]})
    columns = collect_columns(["p1", "p2", "p3"], store, table)
    assert list(columns) == ["Age", "who", "site", "age"]
    assert columns["site"].levels.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(columns["age"].numbers, [70.5, 60, np.nan])
    assert list(collect_columns(["p1", "p2", "p3"], store, None)) == ["site", "age"]


def test_a_column_is_named_as_it_is_written_or_refused():
    store = _store(site=np.array(["a", "a", "b", "c", ""], dtype=TEXT), area=np.array([1.5, 2.5, 3.0, 1.0, 2.0]))
    columns = collect_columns(["p1", "p2", "p3"], store, None)
    assert require_column(columns, "SITE", "strata", None, store) == "site"
    with pytest.raises(UserError, match="--strata 'area' differs within a patient, and patients are compared"):
        require_column(columns, "area", "strata", None, store)
    with pytest.raises(UserError, match="--adjust 'age' names no column of the store's images that every patient has"):
        require_column(columns, "age", "adjust", None, store)
    table = Covariates("t.csv", {})
    with pytest.raises(UserError, match="no column of 't.csv' or of the store's images.* found: 'site'. Give one"):
        require_column(columns, "age", "adjust", table, store)
