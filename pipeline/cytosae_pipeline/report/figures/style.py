"""Style and saving of figures for papers. Imported only when figures are drawn: matplotlib is an extra.

Sizes are in millimetres, as journals state them. No pyplot, no display; matplotlib's settings are restored afterwards.
"""

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from cytosae_pipeline.runtime.palette import POINT_END, SCALE

ONE_COLUMN_MM, TWO_COLUMNS_MM = 89.0, 183.0
DPI = 300
SMALL = 5.0
"""Smallest font size, in points."""

UNDEFINED, QUIET = "#b8b8b8", "#666666"

_MM_PER_INCH, _MM_PER_POINT = 25.4, 25.4 / 72
_LONGEST_TEXT = 200
_CREATOR = "cytosae-cache"

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Arial", "Helvetica", "Liberation Sans", "DejaVu Sans"],
    "font.size": 7,
    "axes.labelsize": 7,
    "axes.titlesize": 7,
    "axes.titlelocation": "left",
    "xtick.labelsize": 6,
    "ytick.labelsize": 6,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "lines.linewidth": 1.0,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2.0,
    "ytick.major.size": 2.0,
    "xtick.minor.visible": False,
    # Labels and names are arbitrary text: a `$` in them is a dollar sign.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": _CREATOR,
    # Each cell is a separate picture, which can be moved and replaced.
    "image.composite_image": False,
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Draw in one style, independent of the user's settings, which are restored at the end."""
    with style.context(_STYLE, after_reset=True), warnings.catch_warnings():
        # Letters that the font lacks become boxes in the PNG; the SVG contains the text itself.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        yield


def color_map() -> LinearSegmentedColormap:
    """The shared colour scale of values."""
    return LinearSegmentedColormap.from_list("cytosae", SCALE)


def point_color_map() -> LinearSegmentedColormap:
    """The same for points on white, without the end that would vanish."""
    return LinearSegmentedColormap.from_list("cytosae points", color_map()(np.linspace(0, POINT_END, 256)))


class NotebookFigure(Figure):
    """A figure that notebooks show as it is, without pyplot."""

    def _repr_png_(self) -> bytes:
        """The figure as PNG at a screen's resolution."""
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=DPI / 2)
        return buffer.getvalue()


def make_figure(width_mm: float, height_mm: float, *, arranged: bool = True) -> Figure:
    """An empty figure.

    Args:
        width_mm: Width in mm.
        height_mm: Height in mm.
        arranged: Whether matplotlib arranges axes and their labels; if not, they are placed with `place_axes`.
    """
    size = width_mm / _MM_PER_INCH, height_mm / _MM_PER_INCH
    figure = NotebookFigure(figsize=size, dpi=DPI, layout="constrained" if arranged else None)
    FigureCanvasAgg(figure)
    return figure


def place_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes without a frame, at a position in mm from the figure's upper left corner."""
    inches_x, inches_y = figure.get_size_inches()
    wide, high = inches_x * _MM_PER_INCH, inches_y * _MM_PER_INCH
    axes = figure.add_axes((left / wide, 1 - (top + height) / high, width / wide, height / high))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return axes


def make_sheet(figure: Figure) -> Axes:
    """Axes over the whole figure, with coordinates in mm from the upper left corner, for pictures and text."""
    inches_x, inches_y = figure.get_size_inches()
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_axis_off()
    sheet.set_xlim(0, inches_x * _MM_PER_INCH)
    sheet.set_ylim(inches_y * _MM_PER_INCH, 0)
    return sheet


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG; the same drawing gives the same bytes.

    Returns:
        The two files.
    """
    metadata: dict[str, dict[str, Any]] = {
        "png": {"Software": _CREATOR},
        "svg": {"Creator": _CREATOR, "Date": None},
    }
    files = []
    for kind, facts in metadata.items():
        files.append(folder / f"{name}.{kind}")
        figure.savefig(files[-1], format=kind, dpi=DPI, metadata=facts)
    return files


def clean_text(text: str) -> str:
    """Replace what cannot be drawn or is not valid XML: control characters, line breaks, lone surrogates."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def fit_text(text: str, width_mm: float, size: float) -> str:
    """Clean a text and cut it to a width.

    Args:
        text: Any text.
        width_mm: Width in mm.
        size: Font size in points.
    """
    font = FontProperties(size=size)
    shown = text = clean_text(text[: _LONGEST_TEXT + 1])
    kept = min(len(text), _LONGEST_TEXT)
    while kept and _width_mm(shown, font) > width_mm:
        kept -= 1
        shown = text[:kept].rstrip() + "…"
    return shown


def widest_mm(texts: Iterable[str], size: float, most_mm: float) -> float:
    """Width in mm of the widest text, each cut to `most_mm` by `fit_text`; 0 without any text."""
    font = FontProperties(size=size)
    return max((_width_mm(fit_text(text, most_mm, size), font) for text in texts), default=0.0)


def _width_mm(text: str, font: FontProperties) -> float:
    """Width of a line of text."""
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) * _MM_PER_POINT
