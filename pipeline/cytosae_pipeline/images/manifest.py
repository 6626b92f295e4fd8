"""A CSV that lists images, with label, patient and whatever else is known about each."""

import csv
import io
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

from cytosae_pipeline.errors import join_few, quote
from cytosae_pipeline.images.files import stamp_file
from cytosae_pipeline.images.folders import SUFFIXES
from cytosae_pipeline.images.image_list import DatasetError, ImageList, ImageRow, join_lines, unify_names

MAX_COLUMNS = 64
"""Further columns that are kept."""

MAX_CELL = 1000
"""Letters that a cell of a further column may have."""

_MAX_NAME, _NAMED = 100, 10
_NAMES = {
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
_SEPARATORS = (",", ";", "\t")
_PICTURE = "one picture"
_OTHER_KINDS = {
    b"\xff\xd8\xff": _PICTURE, b"\x89PNG": _PICTURE, b"BM": _PICTURE, b"II*\0": _PICTURE, b"MM\0*": _PICTURE,
    b"II+\0": _PICTURE, b"MM\0+": _PICTURE, b"GIF8": _PICTURE, b"\0\0\0\x0cjP": _PICTURE,
    b"\xff\x4f\xff\x51": _PICTURE, b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook", b"\x1f\x8b": "a compressed archive", b"PAR1": "a Parquet table",
    b"%PDF": "a PDF", b"\x89HDF": "an HDF5 file",
}  # fmt: skip
"""First bytes of files that are often given as a manifest."""


class _Columns(NamedTuple):
    """Which column of a manifest is what."""

    places: dict[str, int]
    """Place of `path`, `label` and `patient`, where there is one."""
    further: dict[str, int]
    """Place of every further column that has a name."""
    notes: list[str]
    """What was read under another name."""


def read_manifest(path: Path) -> ImageList:
    """The images that a CSV lists, one per line, its columns in any order, separated by commas, semicolons or tabs.

    The column of the files may be called path, file_name, image and the like, that of the label also class or cell
    type, that of the patient also patient ID, subject or donor, in upper and lower case. Further columns are kept.

    Raises:
        DatasetError: If the header, a path or the encoding is wrong, a path stands twice or leads out of the CSV's
            folder, or none of the files exists.
    """
    root = path.parent
    lines = _iter_lines(path, _read_text(path))
    _, header = next(lines, (0, []))
    columns = _assign_columns(header, path)
    rows: dict[str, ImageRow] = {}
    for number, cells in lines:
        row = _read_row(cells, columns, len(header), root, f"'{path}' line {number}")
        if row.path in rows:
            raise DatasetError(f"'{path}' line {number}: '{row.path}' is listed twice")
        rows[row.path] = row
    if not rows:
        raise DatasetError(f"'{path}' lists no images")
    if not any(row.seen for row in rows.values()):
        raise DatasetError(
            f"none of the {len(rows):,} images in '{path}' exist; the first would be '{root / next(iter(rows))}'. "
            "Paths are relative to the folder of the CSV"
        )
    names, chosen, notes = _choose_further(columns.further, list(rows.values()))
    settled, respelt = unify_names([replace(row, cells=tuple(row.cells[k] for k in chosen)) for row in rows.values()])
    return ImageList(root, settled, "manifest", (*columns.notes, *notes, *respelt), names)


def _read_text(path: Path) -> str:
    """The text of a manifest in UTF-8, or in UTF-16 with a byte-order mark."""
    with path.open("rb") as file:
        head = file.read(16)
        # A header may begin with BM or PAR1, too, but not go on with control characters.
        is_text = min(head, default=0) >= ord("\t") and head.isascii() and not head.startswith(b"%PDF")
        kind = next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic) and not is_text), "")
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            kind = _PICTURE
        if kind == _PICTURE or (path.suffix.lower() in SUFFIXES and not kind):
            raise DatasetError(
                f"'{path}' is one picture: expected a folder of images or a CSV. For this picture alone, give a folder "
                "that contains nothing else"
            )
        if kind:
            raise DatasetError(
                f"'{path}' is {kind}: expected a folder of images or a CSV. Unpack it, or save it as CSV"
            )
        data = head + file.read()
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        text = data.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        name = "UTF-16" if is_utf16 else "UTF-8"
        raise DatasetError(f"'{path}' is not {name}: {error.reason} at byte {error.start}. Save it as UTF-8") from error
    if "\0" in text:
        raise DatasetError(f"'{path}' contains NUL bytes: it is not a CSV in UTF-8. Save it as UTF-8")
    return text


def _iter_lines(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Number and stripped cells of every line that is not blank, the header first."""
    separator, text = _find_separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                yield reader.line_num, stripped
    except csv.Error as error:
        raise DatasetError(f"'{path}' line {reader.line_num} is not valid CSV: {error}") from error


def _find_separator(text: str) -> tuple[str, str]:
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
        scores[separator] = (any(_role(name) == "path" for name in names), len(names))
    return max(_SEPARATORS, key=scores.__getitem__), text


def _role(name: str) -> str:
    """What a column with this name contains: path, label, patient, or '' for anything else."""
    word = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return next((role for role, names in _NAMES.items() if word in names), "")


def _assign_columns(header: Sequence[str], path: Path) -> _Columns:
    """Find path, label and patient in the header.

    Raises:
        DatasetError: If there is no path, a name stands twice, or two names may mean the same.
    """
    named = [name for name in header if name]
    places: dict[str, int] = {}
    notes = []
    for role in _NAMES:
        fitting = [name for name in named if _role(name) == role]
        # Its own name comes first, then its own name in other letters, then what else it may be called.
        exact = [name for name in fitting if name == role] or [name for name in fitting if name.casefold() == role]
        fitting = exact or fitting
        if len(fitting) > 1 and len(set(named)) == len(named):
            raise DatasetError(
                f"columns {' and '.join(map(quote, fitting))} of '{path}' may both be the {role}: rename the right one "
                f"to {role}"
            )
        if fitting:
            places[role] = header.index(fitting[0])
            notes += [f"column {quote(fitting[0])} is read as the {role}"] if fitting[0].casefold() != role else []
    if "path" not in places or len(set(named)) != len(named):
        shown = [name[:_MAX_NAME] for name in header[:MAX_COLUMNS]]
        raise DatasetError(
            f"'{path}' has columns {shown}; expected path and, if known, label and patient, each once, "
            "separated by commas in the first line"
        )
    further = {name: place for place, name in enumerate(header) if name and place not in places.values()}
    if "label" not in places and further:
        notes.append(f"no column of '{path}' is called label: the images have none")
    return _Columns(places, further, notes)


def _read_row(cells: Sequence[str], columns: _Columns, n_columns: int, root: Path, where: str) -> ImageRow:
    """One line of a manifest, its path made canonical."""
    if any(surplus := cells[n_columns:]):
        raise DatasetError(
            f"{where}: found {len(surplus)} more cells than columns; put a cell that contains a comma in double quotes"
        )
    padded = [*cells, *itertools.repeat("", n_columns - len(cells))]
    names = {role: padded[place] for role, place in columns.places.items()}
    path = names["path"]
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or PureWindowsPath(path).drive:
        raise DatasetError(
            f"{where}: found path {path!r}; expected a relative path with / that stays in the CSV's folder"
        )
    spelt = _find_spelling(root, pure)
    further = tuple(padded[place] for place in columns.further.values())
    label, patient = (join_lines(names.get(role, "")) for role in ("label", "patient"))
    return ImageRow(spelt, label, patient, stamp_file(root / spelt), further)


def _find_spelling(root: Path, path: PurePosixPath) -> str:
    """A path as its folders spell it: macOS writes `ä` as two characters, most other programs as one."""
    if str(path).isascii() or stamp_file(root / path) is not None:
        return str(path)
    place = PurePosixPath()
    for part in path.parts:
        forms = (part, unicodedata.normalize("NFC", part), unicodedata.normalize("NFD", part))
        place /= next((form for form in forms if (root / place / form).exists()), part)
    return str(place)


def _choose_further(further: dict[str, int], rows: Sequence[ImageRow]) -> tuple[tuple[str, ...], list[int], list[str]]:
    """Names and numbers of the further columns that are kept, and notes about them."""
    kept: list[tuple[str, int]] = []
    left_out = []
    for number, name in enumerate(further):
        longest = max(len(row.cells[number]) for row in rows)
        if (
            longest
            and longest <= MAX_CELL
            and len(name) <= _MAX_NAME
            and name.isprintable()
            and len(kept) < MAX_COLUMNS
        ):
            kept.append((name, number))
        elif longest:
            left_out.append(name)
    notes = []
    if kept:
        notes.append(f"further columns kept with the images: {join_few((quote(name) for name, _ in kept), _NAMED)}")
    if left_out:
        notes.append(
            f"columns not kept: {join_few(map(quote, left_out), _NAMED)} (at most {MAX_COLUMNS} columns are kept, with "
            f"names of up to {_MAX_NAME} and cells of up to {MAX_CELL:,} letters)"
        )
    return tuple(name for name, _ in kept), [number for _, number in kept], notes
