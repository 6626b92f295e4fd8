"""Figures of latents: a scatter plot of all, and the top images of the featured ones."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from cytosae.analysis.latents import is_defined
from cytosae_pipeline.images.decoding import open_decoder
from cytosae_pipeline.images.image_list import ImageList
from cytosae_pipeline.report.data.report_data import ReportData
from cytosae_pipeline.report.figures.style import (
    ONE_COLUMN_MM,
    QUIET,
    SMALL,
    UNDEFINED,
    color_map,
    fit_text,
    make_figure,
    make_sheet,
    point_color_map,
    widest_mm,
)
from cytosae_pipeline.report.records.latents import maps_of_latent
from cytosae_pipeline.report.records.thumbnails import is_same
from cytosae_pipeline.runtime.palette import HEAT_ALPHA, HEAT_OPACITY, HEAT_SHADE

Pixels = npt.NDArray[np.uint8]

COLUMNS = 8
"""Most images per latent."""

_RINGS_AS_LINES = 500
"""Most rings that are drawn as vector graphics in the SVG."""

_CELL_MM, _GAP_MM, _TEXT_MM, _EDGE_MM = 18.6, 1.2, 3.6, 1.5
_NUMBER_MM, _NOTE_MM = 9.0, 18.0
"""Width for a latent's number, and for its name."""

_NO_PICTURE = 205
"""Grey level of a cell whose picture is not available."""


def draw_latents(data: ReportData, latents: npt.NDArray[np.int64]) -> Figure:
    """Scatter plot of sparsity and mean activation of each latent, coloured by label entropy.

    Args:
        data: Store, autoencoder and statistics.
        latents: Latents that are ringed, shape `(M,)`.
    """
    figure = make_figure(ONE_COLUMN_MM, 75)
    axes = figure.subplots()
    active = data.features.sparsity > 0
    with np.errstate(divide="ignore"):
        x, y = np.log10(data.features.sparsity), np.log10(data.features.mean_acts)
    n_active = int(active.sum())
    size = 4.0 if n_active < 5000 else 1.5
    grey = active & ~is_defined(data.entropy)
    if grey.any():
        label = f"entropy undefined ({int(grey.sum()):,})"
        axes.scatter(x[grey], y[grey], s=size, c=UNDEFINED, linewidths=0, rasterized=True, label=label)
    defined = np.flatnonzero(active & is_defined(data.entropy))
    if len(defined):
        # The most specific latents on top.
        defined = defined[np.argsort(-data.entropy[defined], kind="stable")]
        points = axes.scatter(
            x[defined], y[defined], s=size, c=np.maximum(data.entropy[defined], 0), cmap=point_color_map(), vmin=0,
            vmax=math.log(max(len(data.features.labels), 2)), linewidths=0, rasterized=True,
        )  # fmt: skip
        bar = figure.colorbar(points, ax=axes, aspect=30, pad=0.02)
        bar.set_label("label entropy (nats)")
        bar.outline.set_visible(False)
    rings = latents[active[latents]]
    if len(rings):
        axes.scatter(
            x[rings], y[rings], s=10, facecolors="none", edgecolors="black", linewidths=0.4,
            rasterized=len(rings) > _RINGS_AS_LINES, label=f"chosen ({len(rings):,})",
        )  # fmt: skip
    axes.set_xlabel("log10 sparsity (share of images where active)")
    axes.set_ylabel("log10 mean activation")
    if grey.any() or len(rings):
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.2, columnspacing=1.0, markerscale=1.2)
    return figure


def draw_reference_images(data: ReportData, latents: npt.NDArray[np.int64], images: ImageList | None) -> Figure:
    """The top images of a few latents, one row per latent, with heat maps over the cells.

    Args:
        data: Store, autoencoder and statistics.
        latents: The latents, shape `(M,)`.
        images: Location of the images; None if they were not found.
    """
    n_columns = min(COLUMNS, data.top_rows.shape[1])
    shown = data.top_rows[latents, :n_columns]
    pictures = read_pictures(data, images, np.unique(shown[shown >= 0]))
    pitch_x, pitch_y = _CELL_MM + _GAP_MM, _CELL_MM + _TEXT_MM + _GAP_MM
    notes = {latent: data.notes[latent]["name"] for latent in latents.tolist() if latent in data.notes}
    before = _EDGE_MM + max(_NUMBER_MM, widest_mm(notes.values(), SMALL, _NOTE_MM) + _EDGE_MM)
    figure = make_figure(
        before + n_columns * pitch_x - _GAP_MM + _EDGE_MM, _EDGE_MM + len(latents) * pitch_y, arranged=False
    )
    sheet = make_sheet(figure)
    grid = data.store.spec.tokens.grid
    with data.store.open_reader(verify=not data.config.no_verify) as reader:
        for line, latent in enumerate(latents.tolist()):
            top = _EDGE_MM + line * pitch_y
            for shift, text, look in (
                (-3.0, "latent", {"size": SMALL, "color": QUIET}),
                (0.0, str(latent), {"weight": "bold"}),
                (2.6, fit_text(notes.get(latent, ""), _NOTE_MM, SMALL), {"size": SMALL}),
            ):
                sheet.text(_EDGE_MM, top + _CELL_MM / 2 + shift, text, va="center_baseline", **look)
            maps = maps_of_latent(data, reader, latent, data.top_rows[latent][data.top_rows[latent] >= 0])
            for column, row in enumerate(shown[line].tolist()):
                if row < 0:
                    continue
                left = before + column * pitch_x
                cell = overlay(pictures.get(row), maps[latent, row][0].reshape(grid), _side(data))
                sheet.imshow(cell, extent=(left, left + _CELL_MM, top + _CELL_MM, top), aspect="auto")
                value = f"{data.features.top_values[latent, column]:#.3g}".rstrip(".")
                below: dict[str, Any] = {"y": top + _CELL_MM + 0.5, "va": "top", "size": SMALL}
                sheet.text(left, s=value, **below)
                name = fit_text(_label(data, row), _CELL_MM - 1.2 * len(value) - 1, SMALL)
                sheet.text(left + _CELL_MM, s=name, ha="right", color=QUIET, **below)
    return figure


def overlay(picture: Pixels | None, levels: Pixels, side: int) -> Pixels:
    """A cell under a heat map, as on the page: the shared scale, more opaque where the activation is larger.

    Args:
        picture: RGB, shape `(side, side, 3)`; None for plain grey.
        levels: Shares of the map's peak in steps of 1/255, shape `(rows, columns)` of patches; empty for no map.
        side: Height and width in pixels.

    Returns:
        RGB, uint8, shape `(side, side, 3)`.
    """
    ground = np.full((side, side, 3), _NO_PICTURE, np.uint8) if picture is None else picture
    if not levels.size:
        return ground
    share = levels / 255
    heat = color_map()(HEAT_SHADE[0] + HEAT_SHADE[1] * share)
    heat[..., 3] = np.where(levels == 0, 0, HEAT_OPACITY * (HEAT_ALPHA[0] + HEAT_ALPHA[1] * share))
    small = Image.fromarray(np.rint(255 * heat).astype(np.uint8), "RGBA")
    whole = Image.fromarray(ground).convert("RGBA")
    whole.alpha_composite(small.resize((side, side), Image.Resampling.BILINEAR))
    return np.asarray(whole.convert("RGB"))


def read_pictures(data: ReportData, images: ImageList | None, rows: npt.NDArray[np.int64]) -> Mapping[int, Pixels]:
    """The pictures of rows whose files are still the ones that the store was built from."""
    if images is None or not len(rows):
        return {}
    digests = data.store.column("images/sha256")
    found: dict[int, Pixels] = {}
    with open_decoder(data.store, images) as decoder:
        for image in decoder.iter_rows(rows.tolist()):
            if is_same(image, digests[image.row]):
                assert image.pixels is not None
                found[image.row] = image.pixels
    return found


def _side(data: ReportData) -> int:
    """Height and width of the pictures, in pixels."""
    return data.store.spec.preprocessing.image_size


def _label(data: ReportData, row: int) -> str:
    """Name of an image's label; '' if it has none."""
    label = int(data.labels[row])
    return data.features.labels[label] if label >= 0 else ""
