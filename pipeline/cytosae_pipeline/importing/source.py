"""All files of embeddings that one store is imported from."""

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.images.files import FileStamp, stamp_file
from cytosae_pipeline.images.folders import resolve
from cytosae_pipeline.importing.arrays import open_npy, open_npz, open_pt
from cytosae_pipeline.importing.hdf5 import open_h5, open_h5ad
from cytosae_pipeline.importing.parquet import open_parquet
from cytosae_pipeline.importing.part import Part, reading

logger = logging.getLogger(__name__)

_OPENERS = {
    ".h5": open_h5,
    ".hdf5": open_h5,
    ".npy": open_npy,
    ".npz": open_npz,
    ".pt": open_pt,
    ".pth": open_pt,
    ".parquet": open_parquet,
    ".h5ad": open_h5ad,
}
"""How a file is opened, by its ending."""

_NAMED = 5


@dataclass(frozen=True)
class Source:
    """The files of a source, in the order of their rows in the store."""

    path: Path
    """The file or folder that was named."""
    parts: tuple[Part, ...]
    """The files."""
    stamps: tuple[FileStamp | None, ...]
    """Their stamps from before they were opened."""

    @property
    def n_rows(self) -> int:
        """Rows of all files."""
        return sum(part.shape[0] for part in self.parts)

    def hash(self) -> str:
        """SHA-256 over the names and contents of all files, 64 hex digits; every file is read once.

        Raises:
            UserError: If a file is no longer the one that was opened.
        """
        digest = hashlib.sha256()
        for part, stamp in zip(self.parts, self.stamps, strict=True):
            with part.path.open("rb") as file:
                digest.update(f"{part.path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
            _require_unchanged(part.path, stamp)
        return digest.hexdigest()

    def read_rows(self, n_at_once: int) -> Iterator[npt.NDArray[np.float32]]:
        """The embeddings of all files in order, exactly `n_at_once` rows at a time but for the last.

        Args:
            n_at_once: Rows at a time.

        Yields:
            Rows, float32, shape `(n, T, D)`; numbers beyond its range are infinite.

        Raises:
            UserError: If a file is damaged, or no longer the one that was opened.
        """
        waiting: list[npt.NDArray[np.float32]] = []
        for part, stamp in zip(self.parts, self.stamps, strict=True):
            with reading(part.path, "embeddings"):
                for block in part.read(n_at_once):
                    with np.errstate(over="ignore"):  # larger numbers become infinite, and their row is set aside
                        waiting.append(block.astype("<f4"))
                    if sum(map(len, waiting)) >= n_at_once:
                        # Before the rows are passed on: what was read may be of another file.
                        _require_unchanged(part.path, stamp)
                        joined = np.concatenate(waiting)
                        yield joined[:n_at_once]
                        waiting = [joined[n_at_once:]]
            _require_unchanged(part.path, stamp)
        if sum(map(len, waiting)):
            yield np.concatenate(waiting)


def open_source(config: ImportConfig) -> Source:
    """The files of a source, opened without reading their numbers.

    Raises:
        UserError: If there are none, they are of several kinds or shapes, or one cannot be read.
    """
    paths = _list_files(config.source)
    stamps = tuple(map(stamp_file, paths))
    parts = tuple(_OPENERS[path.suffix.lower()](path, config) for path in paths)
    first = parts[0]
    for part in parts:
        if part.shape[1:] != first.shape[1:]:
            raise UserError(
                f"'{part.path}' has {part.shape[1]} tokens x {part.shape[2]} per row, '{first.path}' has "
                f"{first.shape[1]} x {first.shape[2]}: one store has one shape"
            )
        if part.is_vector != first.is_vector:
            vector, table = (part, first) if part.is_vector else (first, part)
            raise UserError(
                f"'{vector.path}' contains one vector, as of a whole slide, and '{table.path}' {table.shape[0]:,} "
                "rows: move one kind to a folder of its own"
            )
    empty = [part.path.name for part in parts if not part.shape[0]]
    if len(empty) == len(parts):
        raise UserError(f"there are no embeddings in '{config.source}': {say_count(len(parts), 'file')} without rows")
    if empty:
        logger.warning(
            f"{say_count(len(empty), 'file')} without rows, which the store will not mention: "
            f"{join_few(map(quote, empty), _NAMED)}"
        )
    assert config.source is not None
    return Source(config.source, parts, stamps)


def _require_unchanged(path: Path, stamp: FileStamp | None) -> None:
    """Refuse a file that changed since it was opened.

    Raises:
        UserError: If it did.
    """
    if stamp_file(path) != stamp:
        raise UserError(f"'{path}' changed while it was imported. Run the command again once it is written")


def _list_files(source: Path | None) -> list[Path]:
    """The files, ordered as the names of their rows are.

    Raises:
        UserError: If there are none, files of several kinds, or two of one name.
    """
    known = ", ".join(_OPENERS)
    if source is None:
        raise UserError("name the embeddings: a file or a folder of files (see: cytosae-cache import --help)")
    if source.is_file():
        if source.suffix.lower() not in _OPENERS:
            raise UserError(f"'{source}' is of an unknown kind: expected a file ending in {known}")
        _require_utf8(source)
        return [source]
    if not source.is_dir():
        raise UserError(f"'{source}' does not exist: expected a file ending in {known}, or a folder of such files")
    files, passed_over = _look_through(source)
    kinds = {_OPENERS[path.suffix.lower()]: path.suffix.lower() for path in files}
    if len(kinds) != 1:
        found = "files of several kinds ({}): move one kind to a folder of its own".format(
            ", ".join(sorted(kinds.values()))
        )
        raise UserError(
            f"'{source}' must contain files of one kind, ending in {known}; found {found if kinds else 'none'}"
            + "".join(f". {note}" for note in passed_over)
        )
    for note in passed_over:
        logger.info(note)
    files.sort(key=lambda path: f"{path.stem}/".encode())
    slides = {path.stem: path for path in files}
    twin = next((path for path in files if slides[path.stem] != path), None)
    if twin is not None:
        raise UserError(
            f"'{twin}' and '{slides[twin.stem].name}' would be one slide, {quote(twin.stem)}: rename or remove one"
        )
    return files


def _look_through(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of known kinds that lie in a folder, and notes about what was passed over."""
    root, files, folders, links = resolve(folder), [], [], []
    others: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not resolve(path).is_relative_to(root):
            links.append(path.name)
        elif path.is_dir():
            folders.append(path.name)
        elif path.is_file() and path.suffix.lower() in _OPENERS:
            _require_utf8(path)
            files.append(path)
        else:
            others[path.suffix.lower() or path.name] += 1
    notes = []
    if links:
        notes.append(
            f"{say_count(len(links), 'link')} out of the folder not followed: {join_few(map(quote, links), _NAMED)}. "
            "Copy the files instead"
        )
    if folders:
        notes.append(
            f"{say_count(len(folders), 'folder')} passed over: {join_few(map(quote, folders), _NAMED)}. Import each "
            "as a data set of its own, or move its files up"
        )
    if others:
        shown = join_few((f"{n:,} {quote(ending)}" for ending, n in others.most_common()), _NAMED)
        notes.append(f"other files passed over: {shown}")
    return files, notes


def _require_utf8(path: Path) -> None:
    """Refuse a name that no table of the store could contain.

    Raises:
        UserError: If it is one.
    """
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {path.name!r} is not UTF-8; rename it") from error
