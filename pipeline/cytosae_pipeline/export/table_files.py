"""Tables as CSV and Parquet, scores of images written as they come."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.export.tables import Column, ImageTexts, Table, Tables, latent_name
from cytosae_pipeline.workspace.csv_files import CsvWriter

if TYPE_CHECKING:
    import pyarrow as pa

LINES_AT_ONCE = 1 << 17
"""Lines of the table of images in memory at once, and in a row group of Parquet."""

_CELLS_AT_ONCE = 1 << 18
"""Cells of a CSV in memory at once as Python objects."""

_FORMULA = ("=", "+", "-", "@", "'", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Beginnings that a spreadsheet reads as a formula (the last four are full-width), and the escape itself."""


class ScoreWriter(Protocol):
    """Takes the scores of images in order of the row."""

    def append(self, scores: npt.NDArray[np.float32]) -> None:
        """Write the scores of the next images, shape `(n, S)`."""
        ...


class TableWriter(Protocol):
    """Takes the lines of a table."""

    def write(self, table: Table) -> None:
        """Write further lines."""
        ...


def escape_formula(text: str) -> str:
    """Escape a text so that no spreadsheet treats it as a formula: if it begins like one, or with ', prefix a '.

    Removing one leading ' from the cells that have one restores every text.
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


def make_wide_table(tables: Tables) -> Table:
    """The patients with their normalised counts, one column per latent.

    Raises:
        ValueError: If there are no patients.
    """
    if tables.patients is None or tables.counts is None:
        raise ValueError("there are no patients")
    columns = {latent_name(latent): column for latent, column in enumerate(tables.counts.normalised.T)}
    return {**tables.patients, **columns}


def make_numbered(latents: Table) -> Table:
    """The latents with their numbers in front."""
    return {"latent": np.arange(len(latents["sparsity"]), dtype=np.int32), **latents}


class LongScores:
    """Turns scores of images into lines of a long table, a limited number at a time.

    Args:
        images: Names of the images.
        writer: Takes the lines.
        lines_at_once: Lines handed over at once, at most.
    """

    def __init__(self, images: ImageTexts, writer: TableWriter, lines_at_once: int = LINES_AT_ONCE) -> None:
        self._images, self._writer, self._lines_at_once = images, writer, lines_at_once
        self._n_done = 0

    def append(self, scores: npt.NDArray[np.float32]) -> None:
        """Write one line for every score above 0 of the next images, shape `(n, S)`."""
        at, latents = scores.nonzero()
        for start in range(0, len(at), self._lines_at_once):
            some = slice(start, start + self._lines_at_once)
            images = (at[some] + self._n_done).tolist()
            numbers = {"latent": latents[some].astype(np.int32), "score": scores[at[some], latents[some]]}
            self._writer.write({**_take(self._images, images), **numbers})
        self._n_done += len(scores)


class CsvTable:
    """A CSV as in RFC 4180: commas, CRLF, quotes where needed; UTF-8, with formulas escaped.

    Args:
        file: An open text file without translation of line ends.
        names: Columns.
    """

    def __init__(self, file: Any, names: Sequence[str]) -> None:  # noqa: ANN401 - anything with `write`
        self._writer = CsvWriter(file, list(map(escape_formula, names)), line_end="\r\n")

    def write(self, table: Table) -> None:
        """Write further lines."""
        n_lines = len(next(iter(table.values()), ()))
        step = max(1, _CELLS_AT_ONCE // max(1, len(table)))
        for start in range(0, n_lines, step):
            parts = (_cells(column[start : start + step]) for column in table.values())
            self._writer.write(zip(*parts, strict=True))


@contextmanager
def open_csv(path: Path, names: Sequence[str]) -> Iterator[CsvTable]:
    """A new CSV with these columns."""
    with path.open("w", newline="", encoding="utf-8") as file:
        yield CsvTable(file, names)


class ParquetTable:
    """Lines of a Parquet file, gathered into row groups.

    Args:
        path: The file.
        schema: Names and types of the columns.
    """

    def __init__(self, path: Path, schema: "pa.Schema") -> None:
        from pyarrow import parquet

        self._writer = parquet.ParquetWriter(path, schema)
        self._schema = schema
        self._waiting: list[pa.Table] = []

    def write(self, table: Table) -> None:
        """Write further lines."""
        import pyarrow as pa

        arrays = [pa.array(column, type=self._schema.field(name).type) for name, column in table.items()]
        self._waiting.append(pa.Table.from_arrays(arrays, schema=self._schema))
        if sum(len(part) for part in self._waiting) >= LINES_AT_ONCE:
            self._flush()

    def close(self) -> None:
        """Write pending lines and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        """Write pending lines as one row group."""
        import pyarrow as pa

        if self._waiting:
            whole = pa.concat_tables(self._waiting)
            self._writer.write_table(whole, row_group_size=max(len(whole), 1))
            self._waiting = []


@contextmanager
def open_parquet(path: Path, example: Table) -> Iterator[ParquetTable]:
    """A new Parquet file with columns and types like an example's."""
    import pyarrow as pa

    types = [
        pa.string() if isinstance(column, list) else pa.from_numpy_dtype(column.dtype) for column in example.values()
    ]
    table = ParquetTable(path, pa.schema(zip(example, types, strict=True)))
    try:
        yield table
    finally:
        table.close()


def image_example(images: ImageTexts) -> Table:
    """The table of images without lines."""
    return {**_take(images, []), "latent": np.zeros(0, np.int32), "score": np.zeros(0, np.float32)}


def _take(images: ImageTexts, places: list[int]) -> dict[str, Column]:
    """Names and further columns of the images at these places."""
    columns = {name: getattr(images, name) for name in ("row", "path", "label", "patient")} | dict(images.further)
    return {
        name: [column[place] for place in places] if isinstance(column, list) else column[places]
        for name, column in columns.items()
    }


def _cells(column: Column) -> Sequence[object]:
    """A column's cells: float32 with the fewest digits that restore it, texts escaped."""
    if isinstance(column, list):
        return [escape_formula(text or "") for text in column]
    cells: list[object] = (column.astype(str) if column.dtype == np.float32 else column).tolist()
    return cells
