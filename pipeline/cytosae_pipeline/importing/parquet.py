"""Embeddings in Parquet: one column of lists; label, patient and name of the rows are further columns."""

from pathlib import Path
from typing import Any

import numpy as np

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.importing.part import Array, Blocks, Part, choose_key, reading, require
from cytosae_pipeline.importing.texts import read_row_texts


def open_parquet(path: Path, config: ImportConfig) -> Part:
    """A table with a column of lists of floating-point numbers.

    Args:
        path: The file.
        config: Names the columns.

    Raises:
        UserError: If it is no Parquet, does not contain one column that is meant, or pyarrow is missing.
    """
    pyarrow, parquet = require("pyarrow", path, "parquet"), require("pyarrow.parquet", path, "parquet")
    with reading(path, "Parquet"), parquet.ParquetFile(path) as file:
        schema, n = file.schema_arrow, file.metadata.num_rows
        widths = _first_lengths(pyarrow, file)
        name = _choose(pyarrow, path, schema, n, widths, config.key)
        width = widths[name]
        texts = read_row_texts(
            path, config, schema.names, lambda column: file.read(columns=[column]).column(0).to_pylist()
        )
    if n and not width:
        raise UserError(
            f"the first row of column {quote(name)} in '{path}' is empty: expected a list of numbers in every row"
        )

    def read(n_at_once: int) -> Blocks:
        start = 0
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=n_at_once, columns=[name]):
                yield _to_array(batch.column(0), width, start, f"column {quote(name)} in '{path}'")
                start += len(batch)

    names, labels, patients = (texts.get(role) for role in ("path", "label", "patient"))
    return Part(path, (n, 1, max(width, 1)), read, names=names, labels=labels, patients=patients)


def _first_lengths(pyarrow: Any, file: Any) -> dict[str, int]:  # noqa: ANN401 - pyarrow is imported where it is needed
    """Length of the first list of every column of lists; 0 if it is missing or empty."""
    names = [field.name for field in file.schema_arrow if _is_list(pyarrow, field.type)]
    first = next(file.iter_batches(batch_size=1, columns=names), None) if names else None
    if first is None:
        return dict.fromkeys(names, 0)
    return {name: len(first.column(name)[0]) if first.column(name)[0].is_valid else 0 for name in names}


def _choose(pyarrow: Any, path: Path, schema: Any, n: int, widths: dict[str, int], key: str | None) -> str:  # noqa: ANN401
    """The name of the column with the embeddings.

    Raises:
        UserError: If there is not one that is meant.
    """
    known = {
        field.name: Array((n, widths[field.name]) if field.name in widths else (n,), field.type) for field in schema
    }
    lists = {field.name: known[field.name] for field in schema if _is_lists(pyarrow, field.type)}
    numbers = [field.name for field in schema if pyarrow.types.is_floating(field.type)]
    if not lists and len(numbers) > 1:
        raise UserError(
            f"'{path}' has {len(numbers):,} columns of numbers, {quote(numbers[0])} to {quote(numbers[-1])}, but no "
            "column of lists. Make them one in pandas: frame['features'] = list(frame[names].to_numpy())"
        )
    return choose_key(path, lists, known, key)


def _is_list(pyarrow: Any, kind: Any) -> bool:  # noqa: ANN401
    """Whether a column's type is lists."""
    types = pyarrow.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_lists(pyarrow: Any, kind: Any) -> bool:  # noqa: ANN401
    """Whether a column's type is lists of floating-point numbers."""
    return _is_list(pyarrow, kind) and bool(pyarrow.types.is_floating(kind.value_type))


def _to_array(column: Any, width: int, start: int, where: str) -> np.ndarray[Any, Any]:  # noqa: ANN401
    """A column of lists as an array `(n, 1, D)`.

    Args:
        column: The lists.
        width: Length that they must have.
        start: Number of the first of them.
        where: What they are, for messages.

    Raises:
        UserError: If a list is missing or has another length.
    """
    lengths = np.full(len(column), width)
    if hasattr(column, "value_lengths"):  # lists of a fixed size have no lengths of their own
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    is_missing = column.is_null().to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(is_missing | (lengths != width))
    if len(wrong):
        row = int(wrong[0])
        found = "is missing" if is_missing[row] else f"has {lengths[row]:,} numbers"
        raise UserError(f"row {start + row:,} of {where} {found}, expected {width:,} as in the first row")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), 1, width)  # type: ignore[no-any-return]
