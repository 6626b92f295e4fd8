"""Image folders and CSV manifests as a fixed, sorted list of images with label and patient."""

import csv
import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.config import StoreSource
from cytosae_pipeline.config.fields import suggest
from cytosae_pipeline.config.store import Layout
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.images.files import FileStamp, stamp_file
from cytosae_pipeline.workspace.paths import Workspace

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
"""Endings of image files, in any case."""

MANIFEST = "manifest.csv"
"""Name of a manifest inside a folder of images; such a folder is read as the manifest says."""

_IGNORED = frozenset({"__MACOSX", "@eaDir"})  # copies and thumbnails left behind by macOS and Synology servers
_NOTES = 10  # links that are named one by one
_MAX_SIBLINGS = 1000  # names that are looked through for a suggestion
_COLUMNS = ("path", "label", "patient")
_DEPTHS: dict[int, Layout] = {0: "class", 1: "class", 2: "class/patient"}


class DatasetError(UserError):
    """A data set cannot be used; the message says what was found and what was expected."""


class DatasetNotFoundError(DatasetError, FileNotFoundError):
    """The folder or manifest does not exist."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class ImageRow:
    """One image."""

    path: str
    """POSIX path relative to the data set's root."""
    label: str
    """Class, '' where unknown."""
    patient: str
    """Patient, '' where unknown."""
    seen: FileStamp | None = field(default=None, compare=False)
    """The file's stamp when it was listed; None if there was no file, or it was not checked."""


@dataclass(frozen=True)
class ImageList:
    """The images of a data set in row order: sorted by the bytes of their paths."""

    root: Path
    """Folder that the paths start from."""
    rows: tuple[ImageRow, ...]
    """The images."""
    layout: str
    """Where labels and patients come from: `manifest`, `flat`, or a layout of folders."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What was left out, as messages."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(sorted(self.rows, key=lambda row: row.path.encode())))

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def paths(self) -> list[str]:
        """Paths in row order."""
        return [row.path for row in self.rows]

    @cached_property
    def labels(self) -> list[str]:
        """Labels in row order."""
        return [row.label for row in self.rows]

    @cached_property
    def patients(self) -> list[str]:
        """Patients in row order."""
        return [row.patient for row in self.rows]

    def digest(self) -> str:
        """SHA-256 of the list, 64 hex digits: changes with any path, label or patient."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.path, row.label, row.patient]).encode() + b"\n")
        return digest.hexdigest()

    def spread(self, n: int) -> "ImageList":
        """A list of `n` images spread evenly over this one, so that all its folders appear."""
        n = min(n, len(self))
        rows = tuple(self.rows[(2 * slot + 1) * len(self) // (2 * n)] for slot in range(n))
        return ImageList(self.root, rows, self.layout, self.notes)


def open_dataset(path: Path, layout: Layout = "auto") -> ImageList:
    """The images of a folder or CSV manifest.

    Args:
        path: A folder, or a CSV with columns `path[,label][,patient]` whose paths start from the CSV's folder.
        layout: What a folder's levels mean; `auto` goes by `manifest.csv` or the depth of the images.

    Raises:
        DatasetNotFoundError: If `path` does not exist.
        DatasetError: If there are no images, or the manifest or the folders are not as the layout says.
    """
    if path.is_file():
        return read_manifest(path)
    if not path.is_dir():
        raise DatasetNotFoundError(
            f"no images at '{path}': expected a folder of images or a CSV with columns path[,label][,patient]. "
            f"Pass their location with --images PATH{suggest(path.name, _siblings(path))}"
        )
    if layout == "auto" and (path / MANIFEST).is_file():
        return read_manifest(path / MANIFEST)
    return scan_folder(path, layout)


def scan_folder(root: Path, layout: Layout = "auto") -> ImageList:
    """The images below a folder, with labels and patients from the folders' names.

    Hidden entries and other files are skipped; links that lead out of the folder are not followed.

    Raises:
        DatasetError: If there are no images, or they do not lie as deep as the layout says.
    """
    links: list[str] = []
    stamps = dict(_iter_images(root, _resolve(root), links))
    paths = list(stamps)
    if not paths:
        raise DatasetError(
            f"no images below '{root}': looked for files ending in {', '.join(sorted(SUFFIXES))}"
            + (f". {len(links):,} links were not followed ({links[0]}): copy the images instead" if links else "")
        )
    depths = {len(PurePosixPath(path).parts) - 1 for path in paths}
    found = layout
    if layout == "auto":
        if len(depths) > 1 or max(depths) not in _DEPTHS:
            raise DatasetError(
                f"images below '{root}' lie {_describe_depths(paths)}, so the meaning of the folders is ambiguous: "
                "choose --layout class, patient or class/patient, or write a CSV manifest"
            )
        found = _DEPTHS[max(depths)]
    needed = 2 if found == "class/patient" else 1
    shallow = [path for path in paths if len(PurePosixPath(path).parts) <= needed]
    if shallow and depths != {0}:
        raise DatasetError(
            f"--layout {found} needs every image at least {needed} folder{'s' * (needed > 1)} deep in '{root}', "
            f"but {len(shallow):,} of {len(paths):,} are not, for example '{sorted(shallow)[0]}'"
        )
    if layout != "auto" and shallow:
        raise DatasetError(
            f"--layout {layout} was given, but images lie directly in '{root}', for example '{sorted(shallow)[0]}', "
            "so there is no folder to take names from"
        )
    rows = tuple(_row_of(path, "flat" if depths == {0} else found, seen) for path, seen in stamps.items())
    notes = (*links[:_NOTES], *([f"and {len(links) - _NOTES:,} more links not followed"] if links[_NOTES:] else []))
    return ImageList(root, rows, "flat" if depths == {0} else found, notes)


def read_manifest(path: Path) -> ImageList:
    """The images that a CSV lists, its columns `path[,label][,patient]` in any order.

    Raises:
        DatasetError: If the header, a path or the encoding is wrong, a path stands twice or leads out of the CSV's
            folder, or none of the files exists.
    """
    root = path.parent
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"'{path}' is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8") from error
    if "\0" in text:
        raise DatasetError(f"'{path}' contains NUL bytes: it is not a CSV")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    rows: dict[str, ImageRow] = {}
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        if "path" not in columns or len(set(columns)) != len(columns):
            raise DatasetError(
                f"'{path}' has columns {columns}; expected path and, if known, label and patient, each once, "
                "separated by commas in the first line"
            )
        reader.fieldnames = columns
        for record in reader:
            row = _manifest_row(record, f"'{path}' line {reader.line_num}")
            if row.path in rows:
                raise DatasetError(f"'{path}' line {reader.line_num}: '{row.path}' is listed twice")
            rows[row.path] = replace(row, seen=stamp_file(root / row.path))
    except csv.Error as error:
        raise DatasetError(f"'{path}' line {reader.line_num} is not valid CSV: {error}") from error
    if not rows:
        raise DatasetError(f"'{path}' lists no images")
    if not any(row.seen for row in rows.values()):
        raise DatasetError(
            f"none of the {len(rows):,} images in '{path}' exist; the first would be '{root / next(iter(rows))}'. "
            "Paths are relative to the folder of the CSV"
        )
    extra = [name for name in columns if name not in _COLUMNS]
    notes = (f"unused columns of '{path}': {', '.join(map(repr, extra))}",) if extra else ()
    return ImageList(root, tuple(rows.values()), "manifest", notes)


def _siblings(path: Path) -> list[str]:
    """Names beside a path, for a suggestion; a few if there are very many, none if they cannot be listed."""
    try:
        return [item.name for item in itertools.islice(path.parent.iterdir(), _MAX_SIBLINGS)]
    except OSError:
        return []


def list_stored_images(store: ActivationStore, source: StoreSource) -> ImageList | None:
    """The images of a store where they lie now; None if that place does not exist.

    Args:
        store: The store.
        source: Names the folder of the images, if it is not the data set's own.
    """
    root = source.images or Workspace(source.root_dir).dataset_dir(store.provenance.dataset)
    if not root.exists():
        return None
    # Straight from the store's own table: its rows are sorted already.
    table = tuple(ImageRow(*names) for names in zip(*store.images, strict=True))
    return ImageList(root.parent if root.is_file() else root, table, "store")


def resolve_inside(root: Path, relative: str) -> Path:
    """The file that a relative path names, if it lies below the root, links followed.

    Raises:
        DatasetError: If it leads out of the root.
    """
    if "\0" in relative:
        raise DatasetError(f"{relative!r} cannot be a file name")
    path = _resolve(root / relative)
    if not path.is_relative_to(_resolve(root)):
        raise DatasetError(f"'{relative}' leads out of the data set's folder")
    return path


def _resolve(path: Path) -> Path:
    """A path with its links resolved; unlike `Path.resolve` without a RuntimeError for circular links."""
    return Path(os.path.realpath(path))


def _describe_depths(paths: list[str]) -> str:
    """How many folders deep the images lie, with one example each."""
    examples = {path.count("/"): path for path in sorted(paths, reverse=True)}
    return " and ".join(f"{n} folder{'s' * (n != 1)} deep ('{examples[n]}')" for n in sorted(examples))


def _row_of(path: str, layout: str, seen: FileStamp) -> ImageRow:
    """Label and patient from the names of the folders above an image."""
    parts = PurePosixPath(path).parts
    match layout:
        case "class":
            return ImageRow(path, parts[-2], "", seen)
        case "patient":
            return ImageRow(path, "", parts[-2], seen)
        case "class/patient":
            return ImageRow(path, parts[-3], parts[-2], seen)
    return ImageRow(path, "", "", seen)


def _manifest_row(record: dict[str | None, str | list[str] | None], where: str) -> ImageRow:
    """One line of a manifest, its path made canonical."""
    if any(surplus := record.pop(None, None) or ()):
        raise DatasetError(
            f"{where}: found {len(surplus)} more cells than columns; put a cell that contains a comma in double quotes"
        )
    cells = {name: str(cell or "").strip() for name, cell in record.items()}
    path = cells["path"]
    pure = PurePosixPath(path)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or PureWindowsPath(path).drive:
        raise DatasetError(
            f"{where}: found path {path!r}; expected a relative path with / that stays in the CSV's folder"
        )
    return ImageRow(str(pure), cells.get("label", ""), cells.get("patient", ""))


def _iter_images(folder: Path, root: Path, links: list[str], prefix: str = "") -> Iterator[tuple[str, FileStamp]]:
    """Relative paths and stamps of the images below a folder; why a link was not followed is added to `links`."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in _IGNORED:
                continue
            relative = prefix + entry.name
            if entry.is_symlink() and not _resolve(Path(entry.path)).is_relative_to(root):
                links.append(f"link {relative!r} leads out of the folder: not followed")
            elif entry.is_symlink() and Path(entry.path).is_dir():
                links.append(f"link {relative!r} leads to a folder that is listed anyway: not followed")
            elif entry.is_dir(follow_symlinks=False):
                yield from _iter_images(Path(entry.path), root, links, relative + "/")
            elif Path(entry.name).suffix.lower() in SUFFIXES and (seen := stamp_file(Path(entry.path))) is not None:
                try:
                    relative.encode()
                except UnicodeEncodeError as error:
                    raise DatasetError(f"the file name {relative!r} is not UTF-8; rename it") from error
                yield relative, seen
