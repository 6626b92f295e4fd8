"""Embeddings in Parquet: one column of lists; label, patient and name of the rows are further columns."""

from pathlib import Path
from typing import Any

import numpy as np

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.part import Blocks, Part, choose_key, require, require_columns


def open_parquet(path: Path, config: ImportConfig) -> Part:
    """A table with a column of lists of floating-point numbers.

    Args:
        path: The file.
        config: Names the columns.

    Raises:
        UserError: If it is no Parquet, does not contain one column that is meant, or pyarrow is missing.
    """
    wanted_columns = (config.name_column, config.label_column, config.patient_column)
    pyarrow, parquet = require("pyarrow", path, "parquet"), require("pyarrow.parquet", path, "parquet")
    try:
        with parquet.ParquetFile(path) as file:
            schema, n = file.schema_arrow, file.metadata.num_rows
            require_columns(path, config, schema.names)
            lists = [field.name for field in schema if _is_lists(pyarrow, field.type)]
            name = choose_key(path, dict.fromkeys(lists, (n, 0)), config.key)
            first = next(file.iter_batches(batch_size=1, columns=[name]), None)
            width = len(first.column(0)[0]) if first is not None and first.column(0)[0].is_valid else 0
            texts = {}
            for wanted in wanted_columns:
                if wanted in schema.names:
                    values = file.read(columns=[wanted]).column(0).to_pylist()
                    texts[wanted] = ["" if value is None else str(value) for value in values]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"'{path}' cannot be read as Parquet: {error}") from error
    if not width:
        raise UserError(
            f"the first row of column {name!r} in '{path}' is empty: expected a list of numbers in every row"
        )

    def read(n_at_once: int) -> Blocks:
        start = 0
        try:
            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=n_at_once, columns=[name]):
                    yield _to_array(batch.column(0), width, f"column {name!r} in '{path}', from row {start:,} on,")
                    start += len(batch)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"'{path}' cannot be read from row {start:,} on: {error}") from error

    names, labels, patients = (texts.get(wanted) for wanted in wanted_columns)
    return Part(path, (n, 1, width), read, names, labels=labels, patients=patients)


def _is_lists(pyarrow: Any, kind: Any) -> bool:  # noqa: ANN401 - pyarrow is imported where it is needed
    """Whether a column's type is lists of floating-point numbers."""
    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and types.is_floating(kind.value_type))


def _to_array(column: Any, width: int, where: str) -> np.ndarray[Any, Any]:  # noqa: ANN401
    """A column of lists as an array `(n, 1, D)`.

    Raises:
        UserError: If a row is missing or has another length.
    """
    # Lists of a fixed size have no lengths of their own.
    lengths = column.value_lengths().to_numpy(zero_copy_only=False) if hasattr(column, "value_lengths") else width
    if column.null_count or np.any(lengths != width):
        raise UserError(f"{where} has rows of other lengths than {width}")
    return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), 1, width)  # type: ignore[no-any-return]
