"""One file of embeddings: what it contains, and its numbers in order."""

import importlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config import ImportConfig
from cytosae_pipeline.errors import UserError, join_few, quote

KEYS = ("features", "embeddings", "feats", "embedding")
"""Names under which programs store embeddings, most frequent first."""

Blocks = Iterator[npt.NDArray[Any]]


@dataclass(frozen=True)
class Part:
    """A file of embeddings, described without reading them."""

    path: Path
    """The file."""
    shape: tuple[int, int, int]
    """Rows, tokens per row, and channels."""
    read: Callable[[int], Blocks]
    """Yields the embeddings in order, at most so many rows at once, floating point, shape `(n, T, D)`."""
    names: Sequence[str] | None = None
    """Name of each row, if the file has names."""
    are_numbers: bool = False
    """Whether the names are numbers within the file, so that its own name belongs before them."""
    labels: Sequence[str] | None = None
    """Label of each row, if the file has labels."""
    patients: Sequence[str] | None = None
    """Patient of each row, if the file has patients."""

    @property
    def slide(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def require_columns(path: Path, config: ImportConfig, found: Collection[str]) -> None:
    """Check that columns which the user named are there; those that are only looked for may be missing.

    Raises:
        UserError: If one is not; the message names the columns that there are.
    """
    for field in ("name_column", "label_column", "patient_column"):
        wanted = getattr(config, field)
        if wanted != ImportConfig.__dataclass_fields__[field].default and wanted not in found:
            raise UserError(
                f"'{path}' has no column {quote(wanted)} ({field}); found {join_few(map(quote, found), 10)}"
            )


def choose_key(path: Path, arrays: Mapping[str, tuple[int, ...]], key: str | None) -> str:
    """The array of a file that contains the embeddings.

    Args:
        path: The file.
        arrays: Shapes of its arrays of floating-point numbers, by name.
        key: The name that the user gave.

    Raises:
        UserError: If it is not there, or several could be meant.
    """
    known = ", ".join(f"{name} {shape}" for name, shape in list(arrays.items())[:10]) or "none"
    if key is not None:
        if key not in arrays:
            raise UserError(f"'{path}' has no array {key!r} of floating-point numbers, found: {known}. Give --key")
        return key
    found = [name for name in KEYS if name in arrays] or [name for name, shape in arrays.items() if len(shape) >= 2]
    if len(found) != 1 and not set(found[:1]) & set(KEYS):
        raise UserError(f"'{path}' must contain one array of embeddings, found: {known}. Name it with --key")
    return found[0]


def as_rows(path: Path, shape: tuple[int, ...], n_coords: int | None = None) -> tuple[int, int, int]:
    """The shape `(rows, tokens, channels)` of an array of embeddings.

    Args:
        path: The file.
        shape: `(n, D)`; `(n, T, D)`; `(1, n, D)` where there are n coordinates; or `(D,)`, a single row.
        n_coords: Number of coordinates in the file.

    Raises:
        UserError: If it is no such shape, or there are as many coordinates as neither says.
    """
    if len(shape) == 1:  # the embedding of a whole slide, whose coordinates are those of its parts
        shape, n_coords = (1, *shape), None
    if len(shape) == 3 and shape[0] == 1 and n_coords == shape[1]:
        shape = shape[1:]
    n, tokens, width = (shape[0], 1, shape[1]) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
    if min(tokens, width) < 1:
        raise UserError(
            f"the embeddings in '{path}' must have shape (rows, D), (rows, tokens, D) or (D,), found {shape}"
        )
    if n_coords not in (None, n):
        raise UserError(f"'{path}' has {n:,} embeddings but {n_coords:,} coordinates")
    return n, tokens, width


def require(module: str, path: Path, extra: str) -> Any:  # noqa: ANN401 - a module
    """Import a package that a format needs.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"reading '{path}' needs {module}: pip install \"cytosae-cache[{extra}]\"") from error


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type can be embeddings."""
    return dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
