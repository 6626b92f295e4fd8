"""Embeddings in HDF5: slides as TRIDENT and CLAM write them, and .h5ad. Links that leave the file are not followed."""

from pathlib import Path
from typing import Any

import numpy as np

from cytosae_pipeline.config.imports import ImportConfig
from cytosae_pipeline.errors import UserError
from cytosae_pipeline.importing.part import Blocks, Part, as_rows, choose_key, is_float, require, require_columns

_COORDS = ("coords", "coordinates")


def open_h5(path: Path, key: str | None) -> Part:
    """A slide: `features` of shape `(n, D)` and, if there are any, `coords` of shape `(n, 2)`, which name the rows.

    Args:
        path: The file.
        key: Name of the array, if the user gave one.

    Raises:
        UserError: If it is no HDF5, does not contain one array that is meant, or h5py is missing.
    """
    h5py = require("h5py", path, "h5")
    with _open(h5py, path) as file:
        arrays = _arrays(h5py, file)
        name = choose_key(path, {name: item.shape for name, item in arrays.items() if is_float(item.dtype)}, key)
        coords = next((arrays[other] for other in _COORDS if other in arrays), None)
        shape = as_rows(path, arrays[name].shape, None if coords is None else len(coords))
        names = None
        if (
            arrays[name].ndim > 1
            and coords is not None
            and coords.ndim == 2
            and coords.shape[1] == 2
            and coords.dtype.kind in "iu"
        ):
            width = len(str(max(shape[0] - 1, 0)))
            names = [f"{row:0{width}d}_x{x}_y{y}" for row, (x, y) in enumerate(coords[...].tolist())]
    return Part(path, shape, lambda n_at_once: _read(h5py, path, name, shape, n_at_once), names, are_numbers=True)


def open_h5ad(path: Path, config: ImportConfig) -> Part:
    """A matrix of an AnnData: X, or one of obsm; label, patient and name of the rows are columns of obs.

    Args:
        path: The file.
        config: Names the matrix and the columns.

    Raises:
        UserError: If it is no AnnData, does not contain one dense matrix that is meant, or anndata is missing.
    """
    h5py, anndata = require("h5py", path, "anndata"), require("anndata", path, "anndata")
    with _open(h5py, path) as file:
        arrays = _arrays(h5py, file)
        matrices = {"X": arrays["X"]} if "X" in arrays else {}
        matrices |= {name.removeprefix("obsm/"): item for name, item in arrays.items() if name.startswith("obsm/")}
        shapes = {name: item.shape for name, item in matrices.items() if is_float(item.dtype) and item.ndim == 2}
        name = choose_key(path, shapes, config.key)
        obs = anndata.io.read_elem(file["obs"])
    shape = as_rows(path, shapes[name])
    if len(obs) != shape[0]:
        raise UserError(f"'{path}' has {shape[0]:,} embeddings but {len(obs):,} rows of obs")

    require_columns(path, config, list(obs.columns))

    def column(wanted: str) -> list[str] | None:
        if wanted not in obs.columns:
            return None
        return ["" if value is None or value != value else str(value) for value in obs[wanted].tolist()]

    names = column(config.name_column) or [str(value) for value in obs.index]
    place = "X" if name == "X" else f"obsm/{name}"
    return Part(
        path,
        shape,
        lambda n_at_once: _read(h5py, path, place, shape, n_at_once),
        names,
        labels=column(config.label_column),
        patients=column(config.patient_column),
    )


def _open(h5py: Any, path: Path) -> Any:  # noqa: ANN401 - h5py is imported where it is needed
    """An open file.

    Raises:
        UserError: If it is not HDF5.
    """
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"'{path}' cannot be read as HDF5: {error}") from error


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


def _read(h5py: Any, path: Path, name: str, shape: tuple[int, int, int], n_at_once: int) -> Blocks:  # noqa: ANN401
    """The numbers of a data set in order."""
    with _open(h5py, path) as file:
        item = file[name]
        if item.ndim == 1:
            yield item[...].reshape(shape)
            return
        # Of shape (1, n, D): `as_rows` has dropped the first axis.
        before = (0,) if item.shape[:2] == (1, shape[0]) and item.ndim == 3 and shape[1] == 1 else ()
        for start in range(0, shape[0], n_at_once):
            try:
                part = item[(*before, slice(start, start + n_at_once))]
            except OSError as error:
                raise UserError(f"'{path}' cannot be read at row {start:,}: {error}") from error
            yield np.asarray(part).reshape(-1, *shape[1:])
