"""All files of embeddings that one store is imported from."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.arrays import open_npy, open_npz, open_pt
from cytosae_pipeline.importing.hdf5 import open_h5, open_h5ad
from cytosae_pipeline.importing.parquet import open_parquet
from cytosae_pipeline.importing.part import Part

_OPENERS = {
    ".h5": lambda path, config: open_h5(path, config.key),
    ".hdf5": lambda path, config: open_h5(path, config.key),
    ".npy": lambda path, config: open_npy(path, config.key),
    ".npz": lambda path, config: open_npz(path, config.key),
    ".pt": lambda path, config: open_pt(path, config.key),
    ".pth": lambda path, config: open_pt(path, config.key),
    ".parquet": open_parquet,
    ".h5ad": open_h5ad,
}
"""How a file is opened, by its ending."""


def open_parts(config: ImportConfig) -> list[Part]:
    """The files of a source, in the order of their rows in the store.

    Raises:
        UserError: If there are none, they are of several kinds or widths, or one cannot be read.
    """
    parts = [_OPENERS[path.suffix.lower()](path, config) for path in _list_files(config.source)]
    first = parts[0]
    for part in parts:
        if part.shape[1:] != first.shape[1:]:
            raise UserError(
                f"'{part.path}' has {part.shape[1]} tokens x {part.shape[2]} per row, '{first.path}' has "
                f"{first.shape[1]} x {first.shape[2]}: one store has one shape"
            )
    return parts


def hash_source(parts: list[Part]) -> str:
    """SHA-256 over the names and contents of all files, 64 hex digits; every file is read once."""
    digest = hashlib.sha256()
    for part in parts:
        with part.path.open("rb") as file:
            digest.update(f"{part.path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def read_rows(parts: list[Part], n_at_once: int) -> Iterator[npt.NDArray[np.float32]]:
    """The embeddings of all files in order, exactly `n_at_once` rows at a time but for the last.

    Args:
        parts: The files.
        n_at_once: Rows at a time.

    Yields:
        Rows, float32, shape `(n, T, D)`; numbers beyond its range are infinite.

    Raises:
        UserError: If a file is damaged.
    """
    waiting: list[npt.NDArray[np.float32]] = []
    for part in parts:
        for block in part.read(n_at_once):
            with np.errstate(over="ignore"):  # larger numbers become infinite, and their row is set aside
                waiting.append(block.astype("<f4"))
            if sum(map(len, waiting)) >= n_at_once:
                joined = np.concatenate(waiting)
                yield joined[:n_at_once]
                waiting = [joined[n_at_once:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)


def _list_files(source: Path | None) -> list[Path]:
    """The files, ordered as the names of their rows are.

    Raises:
        UserError: If there are none, or files of several kinds.
    """
    known = ", ".join(_OPENERS)
    if source is None:
        raise UserError("name the embeddings: a file or a folder of files (see: cytosae-cache import --help)")
    if source.is_file():
        if source.suffix.lower() not in _OPENERS:
            raise UserError(f"'{source}' is of an unknown kind: expected a file ending in {known}")
        return [source]
    if not source.is_dir():
        raise UserError(f"'{source}' does not exist: expected a file ending in {known}, or a folder of such files")
    files = [
        path for path in source.iterdir() if path.suffix.lower() in _OPENERS and path.name[0] != "." and path.is_file()
    ]
    kinds = sorted({path.suffix.lower() for path in files})
    if len(kinds) != 1:
        found = (
            f"files of several kinds ({', '.join(kinds)}): move one kind to a folder of its own" if kinds else "none"
        )
        raise UserError(f"'{source}' must contain files of one kind, ending in {known}; found {found}")
    return sorted(files, key=lambda path: f"{path.stem}/".encode())
