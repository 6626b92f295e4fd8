"""Figures of training and of the masking experiment."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, MaxNLocator, NullLocator

from cytosae_pipeline.report.figures.style import QUIET, TWO_COLUMNS_MM, make_figure
from cytosae_pipeline.runtime.palette import kind_color

_PANELS_PER_LINE = 4
_ROOM = 0.02
"""Margin beyond known ends of an axis, as a share of its length, so that lines on the ends are not cut."""


def draw_training(record: dict[str, Any]) -> Figure:
    """A panel for each curve of `overview.training_record`."""
    curves = record["curves"]
    width = TWO_COLUMNS_MM / _PANELS_PER_LINE
    figure = make_figure(width * max(len(curves), 1), 40)
    x = np.array(record["x"], dtype=np.float64)
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        y = np.array([np.nan if value is None else value for value in curve["values"]])
        # A short run has few points: markers show which parts of the line are interpolated.
        axes.plot(x, y, marker="o" if len(x) <= 20 else None, markersize=1.5, color=kind_color(0))
        axes.set_title(curve["name"])
        axes.set_xlabel("images seen")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        bottom, top = axes.get_ylim()
        low, high = curve["low"], curve["high"]
        # An explained variance far below 0, as at the start of training, is clipped as on the page.
        bottom, top = bottom if low is None else low, top if high is None else high
        axes.set_ylim(bottom - _ROOM * (top - bottom), top + _ROOM * (top - bottom))
        axes.set_xlim(left=min(0.0, float(x.min())))
    return figure


def draw_masking(record: dict[str, Any]) -> Figure:
    """Accuracy by the number of latents kept or removed, from `overview.masking_record`."""
    figure = make_figure(TWO_COLUMNS_MM * 2 / 3, 55)
    axes = figure.subplots()
    ks = record["ks"]
    for name, text, dashes in (
        ("original", "original activations", (1, 0)),
        ("reconstruction", "reconstruction from all latents", (4, 2)),
        ("chance", "chance", (1, 1.5)),
    ):
        axes.axhline(record[name], color=QUIET, linewidth=0.7, dashes=dashes, label=text)
    for number, curve in enumerate(record["curves"]):
        axes.plot(
            ks, curve["accuracy"], marker="o", markersize=2.5, color=kind_color(number),
            linestyle="--" if curve["dashed"] else "-", label=curve["name"], clip_on=False,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(k) for k in ks])
    axes.set_xlabel("latents kept or removed, k")
    axes.set_ylabel("balanced accuracy")
    axes.set_ylim(-_ROOM, 1 + _ROOM)
    figure.legend(loc="outside right center")
    return figure
