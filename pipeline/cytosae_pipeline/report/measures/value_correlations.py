"""Rank correlations of latents with image values: q on one half of the images, rho on the other, too."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import false_discovery_control

from cytosae.analysis.rank_correlation import RankCorrelations, RankedColumns
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.measures.halves import Halves
from cytosae_pipeline.report.measures.image_values import ImageValues
from cytosae_pipeline.workspace.csv_files import write_csv

FILE_NAME = "image_values.csv"

_RANKED_AT_ONCE = 1 << 24
"""Most ranks in memory at once, of one half: 128 MB."""

_SHOWN = 20
"""Columns on a latent's page: those with the largest rho on the half that chooses."""

Floats = npt.NDArray[np.float64]


class ValueCorrelations(NamedTuple):
    """Correlations of M latents with C columns; every array but `names` has shape `(M, C)`."""

    names: tuple[str, ...]
    """The columns."""
    unit: str
    """What the halves have none of in common."""
    n: npt.NDArray[np.int64]
    """Images of the choosing half with a value."""
    rho: Floats
    """Spearman's rho on them."""
    p: Floats
    """Its p."""
    q: Floats
    """Benjamini and Hochberg's, over all latents and columns with a rho; NaN without one."""
    n_held_out: npt.NDArray[np.int64]
    """Images of the other half with a value."""
    rho_held_out: Floats
    """Spearman's rho on them."""
    p_held_out: Floats
    """Its p."""


def correlate_values(
    values: ImageValues,
    rows: npt.NDArray[np.int64],
    halves: Halves,
    n_latents: int,
    column: Callable[[int], npt.NDArray[np.float32]],
    advance: Callable[[], None] = lambda: None,
) -> ValueCorrelations:
    """Correlate the scores of latents with columns; a few columns and one latent are in memory at once.

    Args:
        values: The columns.
        rows: Rows of the images, shape `(n,)`.
        halves: Halves of these images.
        n_latents: Latents M.
        column: Scores of a latent on the images, by its place among the M, shape `(n,)`.
        advance: Called after each latent and block of columns.
    """
    n_columns = len(values.names)
    sides = [np.flatnonzero(halves.choosing), np.flatnonzero(halves.held_out)]
    size = columns_at_once(len(rows))
    found: list[list[RankCorrelations]] = [[], []]
    for start in range(0, n_columns, size):
        ranked = [RankedColumns(values.values[rows[side], start : start + size]) for side in sides]
        parts: list[list[RankCorrelations]] = [[], []]
        for latent in range(n_latents):
            scores = column(latent)
            for number, side in enumerate(sides):
                parts[number].append(ranked[number].correlate(scores[side]))
            advance()
        for number, part in enumerate(parts):
            found[number].append(RankCorrelations(*(np.stack(one) for one in zip(*part, strict=True))))
    first, second = (
        RankCorrelations(*(np.concatenate(one, axis=1) for one in zip(*side, strict=True))) for side in found
    )
    q = np.full(first.p.shape, np.nan)
    tested = ~np.isnan(first.p)
    q[tested] = false_discovery_control(first.p[tested]) if tested.any() else []
    return ValueCorrelations(values.names, halves.unit, *first, q, *second)


def columns_at_once(n_images: int) -> int:
    """Columns whose ranks are in memory at once."""
    return max(1, _RANKED_AT_ONCE // max(n_images, 1))


def values_record(found: ValueCorrelations, latent: int) -> dict[str, Any]:
    """What the page of a latent shows, by its place among the M: the columns with the largest rho where chosen."""
    size = np.nan_to_num(np.abs(found.rho[latent]), nan=-1)
    order = np.argsort(-size, kind="stable")[:_SHOWN]
    return {
        "unit": found.unit,
        "n_columns": len(found.names),
        "n_tested": int((~np.isnan(found.q)).sum()),
        "columns": [
            {
                "name": found.names[at],
                "n": [int(found.n[latent, at]), int(found.n_held_out[latent, at])],
                "rho": [_finite(found.rho[latent, at]), _finite(found.rho_held_out[latent, at])],
                "q": _finite(found.q[latent, at]),
                "selected": bool(found.q[latent, at] < SIGNIFICANT_Q),
            }
            for at in order.tolist()
        ],
    }


def write_values(path: Path, found: ValueCorrelations, latents: npt.NDArray[np.int64]) -> None:
    """Write all correlations as a CSV, one line per latent and column; cells are empty where there is no number."""
    header = (
        "latent", "column", "n", "rho", "p", "q", "selected", "n_held_out", "rho_held_out", "p_held_out",
    )  # fmt: skip
    write_csv(path, header, _lines(found, latents))


def _lines(found: ValueCorrelations, latents: npt.NDArray[np.int64]) -> Iterator[tuple[object, ...]]:
    for place, latent in enumerate(latents.tolist()):
        for at, name in enumerate(found.names):
            q = found.q[place, at]
            yield (
                latent, name, int(found.n[place, at]), _cell(found.rho[place, at]), _cell(found.p[place, at]), _cell(q),
                int(q < SIGNIFICANT_Q), int(found.n_held_out[place, at]), _cell(found.rho_held_out[place, at]),
                _cell(found.p_held_out[place, at]),
            )  # fmt: skip


def _finite(value: float) -> float | None:
    """A number, or None."""
    return None if value != value else float(value)


def _cell(value: float) -> str:
    """A cell of a CSV."""
    return "" if value != value else f"{value:.6g}"
