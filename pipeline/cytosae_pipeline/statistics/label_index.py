"""Names as numbers: labels and patients by their position among the sorted names."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt


class LabelIndex(NamedTuple):
    """The different names of a column, and the number of each row's name."""

    names: tuple[str, ...]
    """Different names, sorted; '' is not one of them."""
    numbers: npt.NDArray[np.int64]
    """Position of each row's name in `names`, shape `(n,)`; -1 for ''."""

    @classmethod
    def of(cls, column: Sequence[str]) -> Self:
        """Index a column of names, one entry per row; '' stands for none."""
        names = sorted_names(column)
        return cls(names, number_names(column, names))


def sorted_names(values: Iterable[str]) -> tuple[str, ...]:
    """The different names among the values, sorted, without ''."""
    return tuple(sorted({value for value in values if value}))


def number_names(column: Iterable[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Position of each value in a list of names, int64, shape `(n,)`; -1 where it is not among them."""
    number = {name: at for at, name in enumerate(names)}
    return np.fromiter((number.get(value, -1) for value in column), dtype=np.int64)
