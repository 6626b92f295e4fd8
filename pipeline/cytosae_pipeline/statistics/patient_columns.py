"""What is known about each patient or subject beside the group: the columns of covariates, one value per unit."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.images.columns import is_unknown
from cytosae_pipeline.statistics.covariates import Covariates, describe_columns
from cytosae_pipeline.statistics.label_index import LabelIndex, number_names

logger = logging.getLogger(__name__)

FEW_NUMBERS = 6
"""Whole numbers of at most so many different values are names: the numbers of sites, not ages."""


class Column(NamedTuple):
    """A property of units: numbers, or names by their index."""

    numbers: npt.NDArray[np.float64]
    """Each unit's number, NaN where unknown, shape `(P,)`; of names their index, NaN where unknown."""
    names: tuple[str, ...] | None
    """The names; None for numbers."""

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Self:
        """From int64, float64 (NaN where unknown) or text."""
        if values.dtype.kind in "if":
            numbers = values.astype(np.float64)
            known = np.unique(numbers[np.isfinite(numbers)])
            if len(known) > FEW_NUMBERS or not (known == np.rint(known)).all():
                return cls(numbers, None)
            values = np.array(["" if value != value else f"{value:.0f}" for value in numbers.tolist()], dtype=object)
        index = LabelIndex.of(["" if is_unknown(text) else text for text in map(str, values.tolist())])
        kept = [at for at, name in enumerate(index.names) if name]
        places = np.full(len(index.names) + 1, np.nan)
        places[kept] = np.arange(len(kept))
        return cls(places[index.numbers], tuple(index.names[at] for at in kept))

    @property
    def levels(self) -> npt.NDArray[np.int64]:
        """Index of each unit's name, or of its number among all; -1 where unknown; shape `(P,)`."""
        known = np.isfinite(self.numbers)
        levels = np.full(len(self.numbers), -1, dtype=np.int64)
        levels[known] = np.unique(self.numbers[known], return_inverse=True)[1]
        return levels

    def take(self, units: npt.NDArray[np.int64]) -> Self:
        """That of some units."""
        return self._replace(numbers=self.numbers[units])

    def pool(self, slots: npt.NDArray[np.int64], n: int) -> Self | None:
        """That of each of n subjects, from those of its samples: the mean of numbers, the one name.

        Args:
            slots: Subject of each sample, -1 for none.
            n: Subjects.

        Returns:
            The column; None if the samples of a subject have two names.
        """
        known = np.flatnonzero((slots >= 0) & np.isfinite(self.numbers))
        at, values = slots[known], self.numbers[known]
        if self.names is not None and not _agree(at, values, n):
            return None
        sums, counts = np.bincount(at, values, minlength=n), np.bincount(at, minlength=n)
        return self._replace(numbers=np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0))


def collect_columns(
    patients: Sequence[str], store: ActivationStore, covariates: Covariates | None
) -> dict[str, Column]:
    """Every property of patients that is known: columns of the table, and of the images, where a patient has one value.

    Columns of the images that differ within a patient are measured on images, and left out.

    Args:
        patients: The patients, in the order of the result.
        store: The store.
        covariates: The table of these patients; None without one.
    """
    columns = {} if covariates is None else {name: Column.of(values) for name, values in covariates.typed().items()}
    of = number_names(store.images.patient, patients)
    kept = np.flatnonzero(of >= 0)
    for name, values in store.image_columns.items():
        if name in columns:
            continue
        column = Column.of(values[kept])
        known = np.isfinite(column.numbers)
        if _agree(of[kept][known], column.numbers[known], len(patients)):
            numbers = np.full(len(patients), np.nan)
            numbers[of[kept][known]] = column.numbers[known]
            columns[name] = column._replace(numbers=numbers)
    return columns


def require_column(
    columns: Mapping[str, Column], name: str, option: str, covariates: Covariates | None, store: ActivationStore
) -> str:
    """The name of a column as it is written.

    Raises:
        UserError: If there is none, or it differs within a patient; the message names the option.
    """
    near = [known for known in columns if known.casefold() == name.casefold()]
    if name in columns or len(near) == 1:
        return name if name in columns else near[0]
    if name in store.image_columns:
        raise UserError(
            f"--{option} {quote(name)} differs within a patient, and patients are compared: give a column that every "
            "patient has once, or a table with it: --covariates patients.csv (columns patient,site)"
        )
    table = "" if covariates is None else f" of '{covariates.path}' or"
    raise UserError(
        f"--{option} {quote(name)} names no column{table} of the store's images that every patient has once, found: "
        f"{describe_columns(list(columns))}. Give one of these, or a table with it: --covariates patients.csv (columns "
        "patient,site)"
    )


def _agree(at: npt.NDArray[np.int64], values: npt.NDArray[np.float64], n: int) -> bool:
    """Whether every unit has one value only."""
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, at, values)
    np.maximum.at(high, at, values)
    return bool((low >= high).all())
