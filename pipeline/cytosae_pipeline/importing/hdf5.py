"""Embeddings in HDF5: slides as TRIDENT and CLAM write them, and .h5ad. Links that leave the file are not followed."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError, quote
from cytosae_pipeline.importing.part import (
    COORDS,
    Array,
    Blocks,
    Part,
    as_rows,
    choose_key,
    is_float,
    reading,
    require,
)
from cytosae_pipeline.importing.texts import read_row_texts

_MOST_CHUNK_BYTES = 1 << 30


def open_h5(path: Path, config: ImportConfig) -> Part:
    """A slide: `features` of shape `(n, D)` and, if there are any, `coords` of shape `(n, 2)`, which name the rows.

    Args:
        path: The file.
        config: Names the array.

    Raises:
        UserError: If it is no HDF5, does not contain one array that is meant, was not written to its end, or h5py is
            missing.
    """
    h5py = require("h5py", path, "h5")
    with reading(path, "HDF5"), h5py.File(path, "r") as file:
        arrays = _arrays(h5py, file)
        name = _choose(path, arrays, config.key)
        folder = name.rpartition("/")[0]
        places = [f"{folder}/{other}" if folder else other for other in COORDS]
        coords = next((arrays[place] for place in places if place in arrays and arrays[place].ndim), None)
        n_coords = None if coords is None else coords.shape[-2] if coords.ndim > 1 else coords.shape[0]
        shape = as_rows(path, arrays[name].shape, config.grid, n_coords)
        _require_written(path, name, arrays[name])
        names = None
        is_vector = arrays[name].ndim == 1
        # A leading axis of one slide is dropped as it is from the embeddings.
        if coords is not None and coords.dtype.kind in "iu" and coords.shape in ((shape[0], 2), (1, shape[0], 2)):
            width = len(str(max(shape[0] - 1, 0)))
            pairs = coords[...].reshape(-1, 2).tolist()
            names = None if is_vector else [f"{row:0{width}d}_x{x}_y{y}" for row, (x, y) in enumerate(pairs)]
    return Part(
        path,
        shape,
        lambda n_at_once: _read(h5py, path, name, shape, n_at_once),
        is_vector=is_vector,
        names=names,
        are_numbers=True,
    )


def open_h5ad(path: Path, config: ImportConfig) -> Part:
    """A matrix of an AnnData: X, or one of obsm; label, patient and name of the rows are columns of obs.

    Args:
        path: The file.
        config: Names the matrix and the columns.

    Raises:
        UserError: If it is no AnnData, does not contain one dense matrix that is meant, or anndata is missing.
    """
    h5py, anndata = require("h5py", path, "anndata"), require("anndata", path, "anndata")
    with reading(path, ".h5ad"), h5py.File(path, "r") as file:
        arrays = _arrays(h5py, file)
        matrices = {"X": arrays["X"]} if "X" in arrays else {}
        matrices |= {name.removeprefix("obsm/"): item for name, item in arrays.items() if name.startswith("obsm/")}
        dense = {name: item for name, item in matrices.items() if item.ndim == 2}
        name = _choose(path, dense, config.key, _other_matrices(h5py, file))
        shape = as_rows(path, matrices[name].shape, config.grid)
        _require_written(path, name, matrices[name])
        if "obs" not in file:
            raise UserError(f"'{path}' has no obs: it is not an AnnData. Give it the ending .h5")
        _refuse_links(h5py, file, "obs", path)
        obs = anndata.io.read_elem(file["obs"])
        if len(obs) != shape[0]:
            raise UserError(f"'{path}' has {shape[0]:,} embeddings but {len(obs):,} rows of obs")
        texts = read_row_texts(path, config, list(map(str, obs.columns)), lambda column: _values(obs[column]))
    names = texts.get("path")
    place = "X" if name == "X" else f"obsm/{name}"
    return Part(
        path,
        shape,
        lambda n_at_once: _read(h5py, path, place, shape, n_at_once),
        names=names or [str(value) for value in obs.index],
        labels=texts.get("label"),
        patients=texts.get("patient"),
    )


def _values(column: Any) -> list[object]:  # noqa: ANN401 - a series of pandas
    """The values of a column of obs, None where pandas calls them missing."""
    values = zip(column.tolist(), column.isna().tolist(), strict=True)
    return [None if is_missing else value for value, is_missing in values]


def _choose(path: Path, arrays: dict[str, Any], key: str | None, others: dict[str, Array] | None = None) -> str:
    """The name of the data set with the embeddings; others are named in messages."""
    known = {name: Array(item.shape or (), item.dtype) for name, item in arrays.items()}
    floats = {name: item for name, item in known.items() if is_float(item.dtype)}
    return choose_key(path, floats, known | (others or {}), key)


def _other_matrices(h5py: Any, file: Any) -> dict[str, Array]:  # noqa: ANN401
    """Matrices of an AnnData that are stored as several arrays: sparse ones and data frames."""
    places = {name: file[name] for name in ("X", "obsm") if isinstance(file.get(name, getlink=True), h5py.HardLink)}
    obsm = places.pop("obsm", None)
    inner: Any = obsm if isinstance(obsm, h5py.Group) else {}
    places |= {name: inner[name] for name in inner if isinstance(inner.get(name, getlink=True), h5py.HardLink)}
    return {
        name: Array(tuple(map(int, item.attrs.get("shape", ()))), str(item.attrs.get("encoding-type", "group")))
        for name, item in places.items()
        if isinstance(item, h5py.Group)
    }


def _arrays(h5py: Any, group: Any, prefix: str = "", depth: int = 3) -> dict[str, Any]:  # noqa: ANN401
    """Data sets that lie in the file itself, by their place; those behind links are left out."""
    found: dict[str, Any] = {}
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group) and depth > 1:
            found |= _arrays(h5py, item, f"{prefix}{name}/", depth - 1)
        elif isinstance(item, h5py.Dataset) and not item.is_virtual and not item.external:
            found[f"{prefix}{name}"] = item
    return found


def _refuse_links(h5py: Any, group: Any, name: str, path: Path) -> None:  # noqa: ANN401
    """Refuse an entry that is or contains a link out of the file.

    Raises:
        UserError: If it does; the message names the entry.
    """
    is_link = not isinstance(group.get(name, getlink=True), h5py.HardLink)
    item = None if is_link else group[name]
    if is_link or (isinstance(item, h5py.Dataset) and (item.is_virtual or item.external)):
        raise UserError(f"{quote(name)} in '{path}' lies in another file: links are not followed. Save it as a copy")
    if isinstance(item, h5py.Group):
        for inner in item:
            _refuse_links(h5py, item, inner, path)


def _require_written(path: Path, name: str, item: Any) -> None:  # noqa: ANN401
    """Refuse a data set of which only a part was ever written: HDF5 reads zeros for the rest.

    Raises:
        UserError: If it is one, or its chunks do not fit into memory.
    """
    if not item.size:
        return
    if item.chunks is None:
        found, expected = item.id.get_storage_size(), item.size * item.dtype.itemsize
        unit = "bytes"
    else:
        found = item.id.get_num_chunks()
        expected = math.prod(-(-n // chunk) for n, chunk in zip(item.shape, item.chunks, strict=True))
        unit = "chunks"
        n_bytes = math.prod(item.chunks) * item.dtype.itemsize
        if n_bytes > _MOST_CHUNK_BYTES:
            raise UserError(
                f"{quote(name)} in '{path}' has chunks of {n_bytes:,} bytes, expected at most {_MOST_CHUNK_BYTES:,}. "
                "Save it with smaller chunks"
            )
    if found < expected:
        raise UserError(
            f"{quote(name)} in '{path}' of shape {item.shape} has {found:,} of {expected:,} {unit}: it was not written "
            "to its end. Compute it again"
        )


def _read(h5py: Any, path: Path, name: str, shape: tuple[int, int, int], n_at_once: int) -> Blocks:  # noqa: ANN401
    """The numbers of a data set in order."""
    with h5py.File(path, "r") as file:
        item = file[name]
        if item.ndim == 1:
            yield item[...].reshape(shape)
            return
        # Of shape (1, n, D): `as_rows` has dropped the first axis.
        before = (0,) if item.shape[:2] == (1, shape[0]) and item.ndim == 3 and shape[1] == 1 else ()
        for start in range(0, shape[0], n_at_once):
            part = item[(*before, slice(start, start + n_at_once))]
            yield np.asarray(part).reshape(-1, *shape[1:])
