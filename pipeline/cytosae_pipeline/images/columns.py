"""Cells of a manifest: which are unknown, and whether a further column contains whole numbers, numbers, or text."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.images.image_list import ImageList

# Leading zeros mark a name: 007 is not 7.
_WHOLE = re.compile(r"[+-]?(0|[1-9]\d{0,17})", re.ASCII)
_NUMBER = re.compile(r"[+-]?(0|[1-9]\d{0,300})?(\.\d{1,300})?([eE][+-]?\d{1,3})?", re.ASCII)
_LIKE_AN_ID = re.compile(r"\d+[eE]\d+", re.ASCII)  # programs write numbers as 1.0e5, 1e+05 or 1e-05
_UNKNOWN = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "nat", "null", "none", "-"})
_KINDS = {"i": "whole numbers", "f": "numbers", "T": "text"}


def is_unknown(cell: str) -> bool:
    """Whether a cell says that nothing is known: empty, or `NA`, `NaN`, `N/A`, `None`, `null`, `-` and the like."""
    return cell.lower() in _UNKNOWN


def describe_type(column: npt.NDArray[Any]) -> str:
    """The type of a column from `type_columns`, in words."""
    return _KINDS[column.dtype.kind]


def column_texts(column: npt.NDArray[Any]) -> list[str]:
    """Names from a column, whatever its type; '' where unknown."""
    if column.dtype.kind == "f":
        # Whole numbers among which some are unknown.
        return ["" if value != value else f"{value:.17g}" for value in column.tolist()]
    return ["" if is_unknown(text) else text for text in map(str, column.tolist())]


def type_columns(images: ImageList) -> dict[str, npt.NDArray[Any]]:
    """The further columns of a list by name, each one entry per row in the type of all its cells."""
    return {name: type_cells([row.cells[place] for row in images.rows]) for place, name in enumerate(images.columns)}


def type_cells(cells: Sequence[str]) -> npt.NDArray[Any]:
    """A column in the narrowest of int64, float64 (NaN where unknown) and text that holds every cell as it is written.

    Empty cells, `nan`, `NA` and the like are unknown where everything else is a number. Numbers with leading zeros are
    text, and so are whole numbers too large for their type, and names such as `1E5` that only look like numbers.

    Args:
        cells: The cells; '' where empty.
    """
    known = [cell for cell in cells if not is_unknown(cell)]
    if known and all(map(_WHOLE.fullmatch, known)):
        if len(known) == len(cells):
            return np.array([int(cell) for cell in cells], dtype=np.int64)
        if all(abs(int(cell)) <= 1 << 53 for cell in known):
            return _floats(cells)
    elif known and all(_is_number(cell) for cell in known):
        return _floats(cells)
    return np.array(list(cells), dtype=np.dtypes.StringDType())


def _is_number(cell: str) -> bool:
    """Whether a cell is a finite decimal number without leading zeros, of which float64 keeps what matters."""
    match = _NUMBER.fullmatch(cell)
    if not match or not (match[1] or match[2]) or _LIKE_AN_ID.fullmatch(cell):
        return False
    is_whole = not match[2] and not match[3]
    return bool(np.isfinite(float(cell))) and not (is_whole and abs(int(cell)) > 1 << 53)


def _floats(cells: Sequence[str]) -> npt.NDArray[np.float64]:
    """Cells as float64, NaN where unknown."""
    return np.array([float("nan") if is_unknown(cell) else float(cell) for cell in cells], dtype=np.float64)
