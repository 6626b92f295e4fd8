"""CSVs as other programs write them: encodings, separators, and what columns are called."""

import csv
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path

from cytosae_pipeline.errors import quote
from cytosae_pipeline.images.image_list import DatasetError

Roles = Mapping[str, Set[str]]
"""What columns contain, and for each what they may be called: lower case, letters and digits alone."""

ROLES: Roles = {
    "path": {
        "path", "file", "filename", "filepath", "relativepath", "image", "imagepath", "imagefile", "imagefilename",
        "imagename", "img", "imgpath", "imgname",
    },
    "label": {"label", "labels", "class", "classname", "classlabel", "celltype", "cellclass", "category"},
    "patient": {
        "patient", "patients", "patientid", "patientno", "patientnumber", "patientname", "subject", "subjectid",
        "donor", "donorid", "participant", "participantid",
    },
}  # fmt: skip
"""Columns of a list of images."""

PICTURE = "one picture"
"""What `find_kind` calls an image file."""

_SEPARATORS = (",", ";", "\t")
_HEAD_BYTES = 16
_OTHER_KINDS = {
    b"\xff\xd8\xff": PICTURE, b"\x89PNG": PICTURE, b"BM": PICTURE, b"II*\0": PICTURE, b"MM\0*": PICTURE,
    b"II+\0": PICTURE, b"MM\0+": PICTURE, b"GIF8": PICTURE, b"\0\0\0\x0cjP": PICTURE,
    b"\xff\x4f\xff\x51": PICTURE, b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook", b"\x1f\x8b": "a compressed archive", b"PAR1": "a Parquet table",
    b"%PDF": "a PDF", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
"""First bytes of files that are often given as a CSV."""


def find_kind(path: Path) -> str:
    """What a file is instead of text, by its first bytes; '' if it may be text."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return PICTURE
    # A header may begin with BM or PAR1, too, but not go on with control characters.
    if min(head, default=0) >= ord("\t") and head.isascii() and not head.startswith(b"%PDF"):
        return ""
    return next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), "")


def read_text(path: Path) -> str:
    """The text of a CSV in UTF-8, or in UTF-16 with a byte-order mark.

    Raises:
        DatasetError: If it is in another encoding.
    """
    data = path.read_bytes()
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        name = "UTF-16" if is_utf16 else "UTF-8"
        raise DatasetError(f"'{path}' is not {name}: {error.reason} at byte {error.start}. Save it as UTF-8") from error
    if "\0" in text:
        raise DatasetError(f"'{path}' contains NUL bytes: it is not a CSV in UTF-8. Save it as UTF-8")
    return text


def iter_lines(
    path: Path, is_known: Callable[[str], bool], *, keep_empty: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """Number and stripped cells of every line that is not blank, the header first.

    Args:
        path: The CSV.
        is_known: Whether the file probably has a column of that name, which tells its separator.
        keep_empty: Yield lines without text, too: with no cells if they are blank.

    Raises:
        DatasetError: If it is no CSV, or a double quote that is not closed swallows further lines.
    """
    separator, text = _find_separator(read_text(path), is_known)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    first, n_columns = 1, 0
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            n_columns = n_columns or len(cells)
            if reader.line_num > first and _swallows(cells, separator, n_columns):
                raise DatasetError(
                    f"'{path}' line {first}: a double quote opened there is closed only in line {reader.line_num}, so "
                    'that whole lines became one cell. Close it, or write a quote that is meant as ""'
                )
            if keep_empty or any(stripped):
                yield reader.line_num, stripped
            first = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"'{path}' line {first} is not valid CSV: {error}. A double quote around a cell is closed before the "
            "separator; one inside it is written twice"
        ) from error


def _swallows(cells: Sequence[str], separator: str, n_columns: int) -> bool:
    """Whether a line inside a cell has as many separators as the lines of the file."""
    inner = (line for cell in cells for line in cell.splitlines()[1:])
    return any(line.count(separator) >= max(1, n_columns - 1) for line in inner)


def find_role(name: str, roles: Roles) -> str:
    """What a column with this name contains, '' for nothing among the roles."""
    word = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return next((role for role, names in roles.items() if word in names), "")


def find_columns(header: Sequence[str], roles: Roles, path: Path) -> tuple[dict[str, int], list[str]]:
    """The column of each role.

    Its own name comes first, then its own name in other letters, then what else it may be called.

    Args:
        header: Names of the columns.
        roles: The roles.
        path: The CSV, for messages.

    Returns:
        The place of the column, for each role that has one, and notes about columns of other names.

    Raises:
        DatasetError: If two different names may mean the same.
    """
    places: dict[str, int] = {}
    notes: list[str] = []
    for role in roles:
        fitting = [name for name in header if name and find_role(name, roles) == role]
        exact = [name for name in fitting if name == role] or [name for name in fitting if name.casefold() == role]
        fitting = list(dict.fromkeys(exact or fitting))
        if len(fitting) > 1:
            raise DatasetError(
                f"columns {' and '.join(map(quote, fitting))} of '{path}' may both be the {role}: rename the right one "
                f"to {role}"
            )
        if fitting:
            places[role] = header.index(fitting[0])
            notes += [f"column {quote(fitting[0])} is read as the {role}"] if fitting[0].casefold() != role else []
    return places, notes


def _find_separator(text: str, is_known: Callable[[str], bool]) -> tuple[str, str]:
    """What separates the cells: what Excel's line `sep=;` says, else what splits the header best.

    Returns:
        The separator, and the text with an empty line in place of Excel's.
    """
    stated = re.match(r"sep=([,;\t])(?=[\r\n])", text)
    if stated:
        return stated[1], text[stated.end() :]
    header = next((line for line in re.split(r"[\r\n]", text) if line.strip(" ,;\t")), "")
    scores = {}
    for separator in _SEPARATORS:
        try:
            names = next(csv.reader([header], delimiter=separator), [])
        except csv.Error:  # reported where the lines are read
            names = []
        scores[separator] = (any(map(is_known, names)), len(names))
    return max(_SEPARATORS, key=scores.__getitem__), text
