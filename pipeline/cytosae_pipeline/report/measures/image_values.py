"""Numbers known of each image, such as the area of its nucleus: the CSV of `--image_values`, and the manifest's."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae_cache.store import ActivationStore
from cytosae_pipeline.errors import UserError, join_few, quote, say_count
from cytosae_pipeline.images.columns import type_cells
from cytosae_pipeline.images.csv_text import ROLES
from cytosae_pipeline.statistics.patient_table import read_patient_table

logger = logging.getLogger(__name__)

MAX_COLUMNS = 256
"""Most columns of numbers."""

_ROLES = {"path": ROLES["path"]}
_EXAMPLES, _NAMED = 3, 10


class ImageValues(NamedTuple):
    """Columns of numbers."""

    names: tuple[str, ...]
    """Their names."""
    values: npt.NDArray[np.float64]
    """Shape `(n_images, C)`; NaN where not known."""
    n_without: int
    """Readable images for which no column has a value."""


def find_values(store: ActivationStore, path: Path | None) -> ImageValues | None:
    """The columns of numbers of a CSV and of the store's images; None if there are none.

    Args:
        store: The store.
        path: The CSV: a column with the paths of images, and any columns of numbers.

    Raises:
        UserError: If the file is not such a table, names an image twice or none that the store has, or there are too
            many columns.
    """
    found: dict[str, npt.NDArray[np.float64]] = {
        name: column.astype(np.float64) for name, column in store.image_columns.items() if column.dtype.kind in "if"
    }
    if path is not None:
        table = _read_table(store, path)
        if both := [name for name in table if name in found]:
            logger.info(
                f"{say_count(len(both), 'column')} of '{path}' replace those of the same name in the store's images: "
                f"{join_few(map(quote, both), _NAMED)}"
            )
        found.update(table)
    if not found:
        return None
    if len(found) > MAX_COLUMNS:
        raise UserError(
            f"found {len(found):,} columns of numbers, expected at most {MAX_COLUMNS}: give --image_values a CSV with "
            "fewer columns"
        )
    values = np.stack(list(found.values()), axis=1)
    without = store.valid & np.isnan(values).all(axis=1)
    return ImageValues(tuple(found), values, int(without.sum()))


def _read_table(store: ActivationStore, path: Path) -> Mapping[str, npt.NDArray[np.float64]]:
    """The columns of numbers of a CSV, one entry for each image of the store."""
    table = read_patient_table(path, _ROLES, option="--image_values", columns="path and any columns of numbers")
    place = table.places["path"]
    rows: dict[str, list[str]] = {}
    for number, cells in table.rows:
        name = _clean_path(cells[place])
        if name in rows:
            raise UserError(
                f"'{path}' line {number} has image {quote(name)} for the second time, expected one line for each: "
                "delete one of them"
            )
        rows[name] = cells
    at = {name: row for row, name in enumerate(store.images.path)}
    _check_paths(path, list(rows), at, store)
    places = np.array([at.get(name, -1) for name in rows], dtype=np.int64)
    columns, texts = {}, []
    for number, name in enumerate(table.header):
        if number == place or not name:
            continue
        if name in columns or name in texts:
            raise UserError(f"'{path}' has the column {quote(name)} twice, expected once: rename or delete one of them")
        typed = type_cells([cells[number] for cells in rows.values()])
        if typed.dtype.kind not in "if":
            texts.append(name)
            continue
        columns[name] = np.full(store.n_images, np.nan)
        columns[name][places[places >= 0]] = typed[places >= 0]
    if texts:
        logger.info(f"columns of '{path}' that are not numbers are left out: {join_few(map(quote, texts), _NAMED)}")
    if not columns:
        raise UserError(
            f"'{path}' has no column of numbers beside the path: expected at least one, such as nucleus_area, with "
            "cells such as 12.5, empty where not known"
        )
    return columns


def _check_paths(path: Path, named: Sequence[str], at: Mapping[str, int], store: ActivationStore) -> None:
    """Stop if no path is one of the store's, and say how many are not, and how many images have no line."""
    unknown = [name for name in named if name not in at]
    if len(unknown) == len(named):
        example = quote(store.images.path[0]) if store.n_images else "none"
        raise UserError(
            f"none of the {say_count(len(named), 'path')} in '{path}' is an image of store '{store.path}': found "
            f"{join_few(map(quote, unknown), _EXAMPLES) or 'nothing'}, expected paths such as {example}. Write them as "
            "images.csv beside the feature data has them"
        )
    if unknown:
        n = say_count(len(named), "path")
        logger.warning(
            f"{say_count(len(unknown), f'of {n} in {path} is', f'of {n} in {path} are')} no image of the store and "
            f"left out, such as {join_few(map(quote, unknown), _EXAMPLES)}. images.csv beside the feature data has the "
            "store's paths"
        )
    known = set(named)
    without = [name for name in at if name not in known]
    if without:
        n = say_count(len(at), "image")
        logger.info(
            f"{say_count(len(without), f'of {n} has', f'of {n} have')} no line in '{path}', such as "
            f"{join_few(map(quote, without), _EXAMPLES)}: their values are not known"
        )


def _clean_path(text: str) -> str:
    """A path as the store writes it: parts separated by `/`, without `.`."""
    return "/".join(part for part in text.replace("\\", "/").split("/") if part not in ("", "."))
