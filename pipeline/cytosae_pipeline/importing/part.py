"""One file of embeddings: what it contains, and its numbers in order."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config.imports import ROWS
from cytosae_pipeline.errors import UserError, install, join_few, quote

KEYS = ("features", "embeddings", "feats", "embedding")
"""Names under which programs store embeddings."""

COORDS = ("coords", "coordinates")
"""Names under which programs store where on the slide a row comes from."""

_SHOWN = 10  # arrays that are named

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
    is_vector: bool = False
    """Whether the file contains a single vector, such as the embedding of a whole slide."""
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


class Array(NamedTuple):
    """An array in a file."""

    shape: tuple[int, ...]
    """Shape."""
    dtype: Any
    """Type of its numbers: a dtype of numpy or torch, or a name."""

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


def choose_key(path: Path, arrays: Mapping[str, Array], others: Mapping[str, Array], key: str | None) -> str:
    """The array of a file that contains the embeddings.

    Args:
        path: The file.
        arrays: Its arrays of floating-point numbers, by name.
        others: Its other arrays, for messages.
        key: The name that the user gave.

    Raises:
        UserError: If it is not there, or several could be meant.
    """
    known = _list(arrays)
    if key is not None:
        if key not in arrays:
            raise UserError(f"'{path}' has no array {quote(key)} of floating-point numbers, found: {known}. Give --key")
        return key
    found = [name for name in KEYS if name in arrays] or [name for name, item in arrays.items() if len(item.shape) > 1]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"'{path}' must contain one array of embeddings, found: {known}. Name it with --key")
    if vectors := [name for name, item in arrays.items() if len(item.shape) == 1]:
        raise UserError(
            f"'{path}' must contain one array of embeddings, found {len(vectors):,} vectors: {known}. Stack them into "
            "one array, a row each, or name the one that is meant with --key"
        )
    raise UserError(
        f"'{path}' must contain one array of embeddings, that is of floating-point numbers, found: "
        f"{_list(arrays or others)}"
    )


def _list(arrays: Mapping[str, Array]) -> str:
    """Arrays by name, a few of many."""
    return join_few((f"{quote(name)[1:-1]} {item}" for name, item in arrays.items()), _SHOWN) or "none"


def as_rows(path: Path, shape: tuple[int, ...], grid: str | None, n_coords: int | None = None) -> tuple[int, int, int]:
    """The shape `(rows, tokens, channels)` of an array of embeddings.

    Args:
        path: The file.
        shape: `(n, D)`; `(n, T, D)`; `(1, n, D)` where there are n coordinates, or as `grid` says; or `(D,)`, a single
            row.
        grid: The option of that name.
        n_coords: Number of coordinates in the file.

    Raises:
        UserError: If it is no such shape, it can be read in two ways, or there are as many coordinates as neither says.
    """
    if len(shape) == 1:  # the embedding of a whole slide, whose coordinates are those of its parts
        shape, n_coords = (1, *shape), None
    if len(shape) == 3 and shape[0] == 1 and shape[1] > 1:
        n = shape[1]
        if grid not in (None, ROWS) and n_coords == n:
            raise UserError(
                f"'{path}' has {n:,} coordinates, so that its array of shape {shape} is {n:,} rows, but --grid {grid} "
                f"makes it one row of {n:,} tokens. Leave out --grid, or the coordinates"
            )
        if grid is None and n_coords is None:
            raise UserError(
                f"the array in '{path}' of shape {shape} may be one row of {n:,} tokens or {n:,} rows: give --grid "
                f"with the rows and columns of patches, or --grid {ROWS} if these are {n:,} rows"
            )
        if grid == ROWS or n_coords == n:
            shape = shape[1:]
    n, tokens, width = (shape[0], 1, shape[1]) if len(shape) == 2 else shape if len(shape) == 3 else (0, 0, 0)
    if min(tokens, width) < 1 or n < 0:
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
        raise UserError(f"reading '{path}' needs {module}: {install(extra)}") from error


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turn errors of a format's library into one message that names the file.

    Args:
        path: The file.
        what: What it is read as.

    Raises:
        UserError: If anything inside the context fails.
    """
    try:
        yield
    except UserError:
        raise
    # Every kind: what a library raises on a damaged or foreign file is documented nowhere. The cause stays attached.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"'{path}' cannot be read as {what}: {quote(reason)[1:-1] or type(error).__name__}. Is it complete?"
        ) from error


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether numbers of this type can be embeddings."""
    return dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
