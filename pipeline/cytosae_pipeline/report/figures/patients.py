"""Figures of patients: barcodes, volcano plots of two groups, and correlation between patients."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cytosae.analysis.differential import GroupComparison, largest_differences
from cytosae.analysis.latents import correlate, group_means
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.data.limits import SIGNIFICANT_Q
from cytosae_pipeline.report.figures.style import (
    ONE_COLUMN_MM,
    QUIET,
    SMALL,
    TWO_COLUMNS_MM,
    UNDEFINED,
    color_map,
    fit_text,
    make_figure,
    make_sheet,
    place_axes,
    widest_mm,
)
from cytosae_pipeline.report.records.comparisons import LEAST_P, GroupPair
from cytosae_pipeline.runtime.palette import kind_color

ANNOTATED = 5
"""Latents labelled on each side of a comparison."""

MAX_COLUMNS = 500
"""Most latents in a barcode figure; more would be thinner than a printed line."""

_NUMBER_APART = 0.055
"""Distance between two stacked numbers, as a share of the axes' height."""

_NAME_MM, _BAR_MM, _EDGE_MM, _HEAD_MM, _APART_MM = 22.0, 2.0, 2.0, 3.4, 0.6
_READABLE_MM = 1.9
"""Least height of a row with a name."""

_MATRIX_MM = 84.0

_ALL = -2


class _Block(NamedTuple):
    """Adjacent patients of one group."""

    group: int
    """The group; -1 for patients without one, `_ALL` if there are no groups."""
    first: int
    """First patient."""
    end: int
    """One past the last patient."""


def draw_barcodes(cohort: Cohort, latents: npt.NDArray[np.int64]) -> Figure:
    """Counts by latent, per group and per patient, as shares of the latent's largest count.

    Args:
        cohort: The patients.
        latents: Latents, shape `(M,)`; the first `MAX_COLUMNS` are shown.
    """
    shown = latents[:MAX_COLUMNS]
    counts = cohort.counts[:, shown]
    scale = np.maximum(counts.max(axis=0, initial=0), np.finfo(np.float64).tiny)
    shares = counts / scale
    blocks = _blocks(cohort)
    names = cohort.groups.names
    row_mm = float(np.clip(150 / len(shares), 0.02, 3))
    mean_mm = float(np.clip(60 / max(len(names), 1), 0.2, 3.5)) if len(names) > 1 else 0.0
    gap_mm = float(np.clip(60 / len(blocks), 0.3, _HEAD_MM))
    numbered = len(shown) <= 70
    height = 7 + mean_mm * len(names) + gap_mm * len(blocks) + row_mm * len(shares) + (9 if numbered else 6)
    figure = make_figure(TWO_COLUMNS_MM, height, arranged=False)
    sheet = make_sheet(figure)
    left = _left_of_matrix(
        [*(names if mean_mm >= _READABLE_MM else ()), *(cohort.names if row_mm >= _READABLE_MM else ())]
    )
    width = TWO_COLUMNS_MM - left - _EDGE_MM
    _scale(figure, left + width, "count as a share of the latent's largest", 0, 1)
    top = 7.0
    if mean_mm:
        of = cohort.pooled.groups.of
        means = group_means(cohort.pooled.counts[of >= 0][:, shown] / scale, of[of >= 0], len(names))
        _picture(place_axes(figure, left, top, width, mean_mm * len(names)), means, 0, 1)
        sheet.text(left, top - 0.8, "group means", va="bottom")
        for group, name in enumerate(names):
            _group_bar(sheet, left - _BAR_MM - _APART_MM, top + group * mean_mm, mean_mm, group)
            if mean_mm >= _READABLE_MM:
                _name(sheet, left, top + (group + 0.5) * mean_mm, name)
        top += mean_mm * len(names)
    for block in blocks:
        top += gap_mm
        n_rows = block.end - block.first
        axes = place_axes(figure, left, top, width, n_rows * row_mm)
        _picture(axes, shares[block.first : block.end], 0, 1)
        _group_bar(sheet, left - _BAR_MM - _APART_MM, top, n_rows * row_mm, block.group)
        if gap_mm >= _HEAD_MM:
            text = names[block.group] if block.group >= 0 else {-1: "no group", _ALL: "patients"}[block.group]
            sheet.text(left, top - 0.5, fit_text(f"{text} ({n_rows:,})", width, 7), va="bottom")
        if row_mm >= _READABLE_MM:
            for row in range(n_rows):
                _name(sheet, left, top + (row + 0.5) * row_mm, cohort.names[block.first + row])
        top += n_rows * row_mm
    of_all = "" if len(shown) == len(latents) else f" of {len(latents):,}"
    axes.set_xlabel(f"{len(shown):,}{of_all} chosen latents, in the order of the page", labelpad=2)
    if numbered:
        axes.set_xticks(range(len(shown)), [str(latent) for latent in shown.tolist()], rotation=90, size=SMALL)
        axes.tick_params(axis="x", pad=0.5)
    return figure


def draw_comparison(cohort: Cohort, pair: GroupPair, found: GroupComparison) -> Figure:
    """Volcano plot of every tested latent: significant ones coloured, the largest differences numbered.

    Args:
        cohort: The patients.
        pair: The groups compared.
        found: The comparison.
    """
    figure = make_figure(ONE_COLUMN_MM, 80)
    axes = figure.subplots()
    names = cohort.groups.names
    first = names[pair.first], kind_color(pair.first)
    second = ("all others", "black") if pair.second is None else (names[pair.second], kind_color(pair.second))
    x, y = found.log2_fold_change, -np.log10(np.maximum(found.p_value, LEAST_P))
    significant = found.tested & (found.q_value < SIGNIFICANT_Q)
    quiet = np.flatnonzero(found.tested & ~significant)
    axes.scatter(x[quiet], y[quiet], s=2, c=UNDEFINED, linewidths=0, rasterized=True)
    largest = float(np.abs(x[found.tested]).max(initial=0)) or 1.0
    # Leaves space for the numbers on both sides.
    axes.set_xlim(-1.5 * largest, 1.5 * largest)
    axes.set_ylim(0, 1.08 * (float(y[found.tested].max(initial=0)) or 1.0))
    axes.axvline(0, color=UNDEFINED, linewidth=0.5, zorder=0)
    sides = zip((first, second), (1, -1), largest_differences(found, ANNOTATED), strict=True)
    for (name, color), sign, most in sides:
        here = np.flatnonzero(significant & (found.direction == sign))
        axes.scatter(x[here], y[here], s=5, c=color, linewidths=0, rasterized=True)
        tail = f" ({len(here):,})"
        text = fit_text(f"more in {name}", 0.4 * ONE_COLUMN_MM - len(tail), 7) + tail
        axes.text(
            0.5 + 0.5 * sign, 1.02, f"{text} →" if sign > 0 else f"← {text}", color=color, transform=axes.transAxes,
            ha="right" if sign > 0 else "left",
        )  # fmt: skip
        axes.scatter(x[most], y[most], s=9, facecolors="none", edgecolors="black", linewidths=0.4)
        _number(axes, x[most], y[most], most, sign)
    axes.set_xlabel(f"log2 fold change (coloured: q < {SIGNIFICANT_Q:g}, Benjamini-Hochberg)")
    axes.set_ylabel("\N{MINUS SIGN}log10 p")
    if not found.tested.any():
        axes.text(0.5, 0.5, "no latent varies among these patients", transform=axes.transAxes, ha="center")
    return figure


def draw_correlation(cohort: Cohort) -> Figure:
    """Correlation matrix of the patients' counts, ordered by group."""
    values = correlate(cohort.counts)
    n_patients, names = len(values), cohort.groups.names
    cell = _MATRIX_MM / n_patients
    left, top = _left_of_matrix(cohort.names if cell >= _READABLE_MM else ()), 8.0 + _BAR_MM
    beside, room = left + _MATRIX_MM + _BAR_MM, int(_MATRIX_MM // _HEAD_MM)
    legend = widest_mm(names[:room], 6, _NAME_MM) + _BAR_MM + 1 if names else 0
    figure = make_figure(beside + legend + _EDGE_MM, top + _MATRIX_MM + _EDGE_MM, arranged=False)
    sheet = make_sheet(figure)
    # Rounded down to a tenth, so that figures of several cohorts can be compared.
    low = float(np.floor(10 * values.min()) / 10)
    _picture(place_axes(figure, left, top, _MATRIX_MM, _MATRIX_MM), values, low, 1)
    _scale(figure, left + _MATRIX_MM, "Pearson correlation of log(1 + count)", low, 1)
    for block in _blocks(cohort):
        start, length = cell * block.first, cell * (block.end - block.first)
        _group_bar(sheet, left - _BAR_MM - _APART_MM, top + start, length, block.group)
        _group_bar(sheet, left + start, top - _BAR_MM - _APART_MM, _BAR_MM, block.group, width=length)
    if cell >= _READABLE_MM:
        for row, name in enumerate(cohort.names):
            _name(sheet, left, top + (row + 0.5) * cell, name)
    for group, name in enumerate(names[:room]):
        _group_bar(sheet, beside, top + group * _HEAD_MM, _BAR_MM, group)
        y = top + group * _HEAD_MM + _BAR_MM / 2
        sheet.text(beside + _BAR_MM + 1, y, fit_text(name, _NAME_MM, 6), va="center", size=6)
    return figure


def spread_out(wanted: npt.NDArray[np.float64], apart: float) -> npt.NDArray[np.float64]:
    """Move heights apart so that neighbours are at least `apart` from each other, within 0..1 if they fit.

    Args:
        wanted: Preferred heights, descending, shape `(n,)`.
        apart: Least distance.

    Returns:
        Heights, descending, float64, shape `(n,)`.
    """
    heights = np.array(wanted, dtype=np.float64)
    for at in range(1, len(heights)):
        heights[at] = min(heights[at], heights[at - 1] - apart)
    floor = 0.0
    for at in range(len(heights) - 1, -1, -1):
        heights[at] = max(heights[at], floor)
        floor = heights[at] + apart
    return heights


def _number(
    axes: Axes, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64], latents: npt.NDArray[np.int64], sign: int
) -> None:
    """Stack the latents' numbers at the edge, each with a thin line to its point."""
    # Of points at one height, the nearest to the centre first, so that lines do not cross.
    order = np.lexsort((latents, sign * x, -y))
    heights = spread_out(y[order] / axes.get_ylim()[1], _NUMBER_APART)
    for at, height in zip(order.tolist(), heights.tolist(), strict=True):
        axes.annotate(
            str(latents[at]), (x[at], y[at]), (0.5 + 0.48 * sign, height), textcoords="axes fraction", va="center",
            ha="right" if sign > 0 else "left", size=6,
            arrowprops={
                "arrowstyle": "-", "linewidth": 0.3, "color": QUIET, "shrinkA": 1, "shrinkB": 1,
                "relpos": (0 if sign > 0 else 1, 0.5),
            },
        )  # fmt: skip


def _blocks(cohort: Cohort) -> list[_Block]:
    """Runs of patients of one group; the cohort is ordered by group."""
    of = cohort.groups.of
    if not cohort.groups.names:
        return [_Block(_ALL, 0, len(of))]
    starts = [0, *(np.flatnonzero(np.diff(of)) + 1).tolist(), len(of)]
    return [_Block(int(of[first]), first, end) for first, end in itertools.pairwise(starts) if end > first]


def _picture(axes: Axes, values: npt.NDArray[np.float64], low: float, high: float) -> None:
    """A matrix as colours, without ticks."""
    axes.imshow(values, cmap=color_map(), vmin=low, vmax=high, aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])


def _scale(figure: Figure, right: float, text: str, low: float, high: float) -> None:
    """The colour scale, above its matrix and aligned with its right edge."""
    axes = place_axes(figure, right - 43, 4.2, 40, 1.6)
    bar = figure.colorbar(ScalarMappable(Normalize(low, high), color_map()), cax=axes, orientation="horizontal")
    bar.outline.set_visible(False)
    axes.set_title(text, size=6, pad=2)
    bar.set_ticks([])
    for at, value, side in ((-0.02, low, "right"), (1.02, high, "left")):
        axes.text(at, 0.5, f"{value:g}", transform=axes.transAxes, ha=side, va="center", size=6)


def _group_bar(sheet: Axes, left: float, top: float, height: float, group: int, *, width: float = _BAR_MM) -> None:
    """A bar in a group's colour; nothing if there are no groups."""
    if group == _ALL:
        return
    color = kind_color(group) if group >= 0 else UNDEFINED
    sheet.add_patch(Rectangle((left, top), width, height, color=color, linewidth=0))


def _left_of_matrix(names: Sequence[str]) -> float:
    """Left edge of a matrix with names and group colours beside it, in mm."""
    return _EDGE_MM + widest_mm(names, SMALL, _NAME_MM) + _BAR_MM + 2 * _APART_MM


def _name(sheet: Axes, left: float, middle: float, text: str) -> None:
    """A name beside a row of a matrix whose left edge is at `left`."""
    right = left - _BAR_MM - 2 * _APART_MM
    sheet.text(right, middle, fit_text(text, _NAME_MM, SMALL), ha="right", va="center_baseline", size=SMALL)
