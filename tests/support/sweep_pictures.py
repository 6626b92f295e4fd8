"""Reads a sweep's picture back: what its panels say, by their own axes."""

import re
from typing import NamedTuple
from xml.etree import ElementTree as ET

import numpy as np

_SVG = "{http://www.w3.org/2000/svg}"
_NUMBER = re.compile(r"[\d.e+-]+")


class Mark(NamedTuple):
    """A point of a panel."""

    l0: float
    """Read off the labelled lines of the L0 axis, which is logarithmic; NaN where it has no two labels."""
    value: float
    """Read off the labelled lines of the other axis."""
    colour: str
    title: str
    place: tuple[float, float]
    """In pixels."""


class Panel(NamedTuple):
    """A measure's panel."""

    label: str
    """What a screen reader says."""
    titles: list[str]
    """Titles of the axes: L0, then the measure."""
    marks: list[Mark]
    labels: list[float]
    """Where the L0 axis has labels, in pixels."""
    frame: tuple[float, float, float, float]
    """Left, top, right, bottom of its grid, in pixels."""


def read_panels(svg: str) -> list[Panel]:
    """The panels of a picture, in their order."""
    return [_read_panel(group) for group in ET.fromstring(svg).iter(f"{_SVG}g")]


def read_circles(svg: str) -> list[dict[str, str | None]]:
    """Attributes and title of the circles of the plot above the panels, its legend included."""
    return [
        {**circle.attrib, "title": circle.findtext(f"{_SVG}title")}
        for circle in ET.fromstring(svg).findall(f"{_SVG}circle")
    ]


def _read_panel(group: ET.Element) -> Panel:
    lines = " ".join(path.get("d", "") for path in group.iter(f"{_SVG}path"))
    across = [tuple(map(float, line)) for line in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)", lines)]
    ys = [y for _, y, _ in across]
    middle = [one for one in group.iter(f"{_SVG}text") if one.get("text-anchor") == "middle"]
    x_labels = {float(one.get("x")): float(one.text) for one in middle if _NUMBER.fullmatch(one.text)}
    y_labels = [float(one.text) for one in group.iter(f"{_SVG}text") if one.get("text-anchor") == "end"]
    assert len(y_labels) == len(ys)
    assert all(f"M{x:.1f} " in lines for x in x_labels), "each label has its line"
    marks = []
    for circle in group.iter(f"{_SVG}circle"):
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        l0 = 10 ** _read(x, list(x_labels), np.log10(list(x_labels.values()))) if len(x_labels) > 1 else np.nan
        marks.append(Mark(l0, _read(y, ys, y_labels), circle.get("fill"), circle.findtext(f"{_SVG}title"), (x, y)))
    titles = [one.text for one in middle if not _NUMBER.fullmatch(one.text)]
    return Panel(group.get("aria-label"), titles, marks, list(x_labels), (across[0][0], min(ys), across[0][2], max(ys)))


def _read(place: float, places: list[float], values) -> float:
    """Value at a place of an axis, from its first and its last labelled line."""
    return values[0] + (place - places[0]) / (places[-1] - places[0]) * (values[-1] - values[0])
