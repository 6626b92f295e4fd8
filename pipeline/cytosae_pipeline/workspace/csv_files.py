"""The one way in which CSV files are written: UTF-8, and split at the same places by every reader."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO


class CsvWriter:
    r"""Writes rows of a CSV; cells are quoted where needed.

    Before Python 3.13 `csv` leaves a lone carriage return unquoted where lines end with `\n`, and readers take it for
    the end of a line. Here such rows are quoted throughout.

    Args:
        file: An open text file without translation of line ends.
        header: Names of the columns.
        line_end: `\n`, or `\r\n` as in RFC 4180.
    """

    def __init__(self, file: TextIO, header: Sequence[str], *, line_end: str = "\n") -> None:
        self._plain = csv.writer(file, lineterminator=line_end)
        self._quoted = csv.writer(file, lineterminator=line_end, quoting=csv.QUOTE_ALL)
        self._check = "\r" not in line_end
        self.write([header])

    def write(self, rows: Iterable[Sequence[object]]) -> None:
        """Append rows."""
        if not self._check:
            self._plain.writerows(rows)
            return
        for row in rows:
            has_return = any("\r" in str(cell) for cell in row if not isinstance(cell, int | float))
            (self._quoted if has_return else self._plain).writerow(row)


def to_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A whole CSV as bytes.

    Args:
        header: Names of the columns.
        rows: Cells of each row.
    """
    text = io.StringIO()
    CsvWriter(text, header).write(rows)
    return text.getvalue().encode()


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV row by row; memory does not grow with the rows.

    Args:
        path: The file.
        header: Names of the columns.
        rows: Cells of each row.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        CsvWriter(file, header).write(rows)
