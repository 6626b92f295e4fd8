"""A plot of explained variance against L0, and a panel for each further measure, as a self-contained SVG."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from types import MappingProxyType
from typing import NamedTuple

from cytosae_pipeline.runtime.palette import kind_color

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 20, 50

_PANEL_WIDTH, _PANEL_HEIGHT, _PANEL_RIGHT = 360, 250, 20
"""Size of a measure's panel, two of which lie side by side, and its margin on the right; the others are the plot's."""

_PANEL_LABELS = 36
"""Pixels between two labels of a panel's L0 axis, at least."""

_EQUAL_WITHIN = 0.01
"""A measure whose values differ by less is drawn as if they were equal: otherwise its axis would show rounding."""

_NOTHING: Mapping[str, float | None] = MappingProxyType({})
_NO_UNITS: Mapping[str, str] = MappingProxyType({})


class Point(NamedTuple):
    """One autoencoder in the plot."""

    l0: float
    """Mean number of active latents per token."""
    explained_variance: float
    """At most 1; NaN if it is not known."""
    group: str
    """Group, shown by the colour."""
    text: str
    """Text of the tooltip."""
    measures: Mapping[str, float | None] = _NOTHING
    """What was measured beside the reconstruction, by name; None where it does not apply."""

    @property
    def measured(self) -> dict[str, float]:
        """Those of the measures that have a value."""
        return {name: value for name, value in self.measures.items() if value is not None and math.isfinite(value)}

    @property
    def has_variance(self) -> bool:
        """Whether it has an explained variance."""
        return math.isfinite(self.explained_variance)


class _Axis(NamedTuple):
    """A range of values and of pixels."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Position of a value, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other point dominates, by rising L0."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.l0, -point.explained_variance)):
        if not front or point.explained_variance > front[-1].explained_variance:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point], units: Mapping[str, str] = _NO_UNITS) -> str:
    """Draw the plot: L0 on a logarithmic axis, one colour per group, a line through the Pareto front.

    Below it, each measure that has a value for any point gets a panel with the same L0 axis and the same colours;
    points without a value are left out of it.

    Args:
        points: The autoencoders; those without a place (L0 not above 0 or not finite, or no value) are left out.
        units: Unit of each measure, for its axis.

    Returns:
        The SVG; without measures, the plot alone.
    """
    placed = [one for one in points if 0 < one.l0 < math.inf and (one.has_variance or one.measured)]
    names = [name for name in _names(placed) if any(name in point.measured for point in placed)]
    groups = list(dict.fromkeys(point.group for point in placed))
    colours = {group: kind_color(number) for number, group in enumerate(groups)}
    shown = [point for point in placed if point.has_variance]
    xs = [math.log10(point.l0) for point in placed] or [0.0, 1.0]
    ys = [point.explained_variance for point in shown] or [0.0, 1.0]
    x_axis = _Axis(*_widen(min(xs), max(xs)), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(*_widen(min(ys), max(ys)), _HEIGHT - _BOTTOM, _TOP)
    height = _HEIGHT + _PANEL_HEIGHT * math.ceil(len(names) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12"><title>{escape(", ".join(["Explained variance", *names]))} against L0'
        '</title><rect width="100%" height="100%" fill="#fff"/>',
        *_draw_axes(x_axis, y_axis, "explained variance"),
    ]
    places = [(x_axis.place(math.log10(p.l0)), y_axis.place(p.explained_variance)) for p in pareto_front(shown)]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts.append(f'<path d="M{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>' if places else "")
    for point in shown:
        measures = "".join(f", {name} {value:.3f}" for name, value in point.measured.items())
        title = f"explained variance {point.explained_variance:.4f}, L0 {point.l0:.1f}{measures}"
        parts.append(_draw_point(x_axis, y_axis, point, point.explained_variance, colours[point.group], title))
    for number, group in enumerate(groups):
        y = _TOP + 14 + 20 * number
        parts.append(
            f'<circle cx="{_WIDTH - _RIGHT + 24}" cy="{y - 4}" r="5" fill="{colours[group]}"/>'
            f'<text x="{_WIDTH - _RIGHT + 36}" y="{y}">{escape(group)}</text>'
        )
    for number, name in enumerate(names):
        parts += _draw_panel(number, name, units.get(name), placed, x_axis, colours)
    return "\n".join(part for part in parts if part) + "\n</svg>\n"


def _names(points: Sequence[Point]) -> list[str]:
    """Names of the measures of any point, in their order."""
    return list(dict.fromkeys(name for point in points for name in point.measures))


def _draw_panel(
    number: int, name: str, unit: str | None, points: Sequence[Point], l0: _Axis, colours: Mapping[str, str]
) -> list[str]:
    """A measure against L0, as a group with a name for those who do not see it."""
    found = [(point, point.measured[name]) for point in points if name in point.measured]
    values = [value for _, value in found]
    low, high = min(values), max(values)
    if high - low < _EQUAL_WITHIN:
        low = high = (low + high) / 2
    left, top = _PANEL_WIDTH * (number % 2), _HEIGHT + _PANEL_HEIGHT * (number // 2)
    x_axis = l0._replace(start=left + _LEFT, end=left + _PANEL_WIDTH - _PANEL_RIGHT)
    y_axis = _Axis(*_widen(low, high), top + _PANEL_HEIGHT - _BOTTOM, top + _TOP)
    runs = "1 run" if len(found) == 1 else f"{len(found)} runs"
    title = f"{name}: {unit}" if unit else name
    label = f"{title}, against L0; {runs}, {min(values):.4f} to {max(values):.4f}"
    return [
        f'<g role="group" aria-label="{escape(label)}">',
        *_draw_axes(x_axis, y_axis, title, between_labels=_PANEL_LABELS),
        *(
            _draw_point(x_axis, y_axis, point, value, colours[point.group], f"{name} {value:.4f}, L0 {point.l0:.1f}")
            for point, value in found
        ),
        "</g>",
    ]


def _draw_axes(x_axis: _Axis, y_axis: _Axis, title: str, *, between_labels: float = 0) -> list[str]:
    """The grid, its labels and the titles of both axes: L0 and what is drawn against it.

    Args:
        x_axis: Decimal logarithm of L0, from left to right.
        y_axis: The values, from the bottom to the top.
        title: Title of the y axis.
        between_labels: Labels of the x axis that would follow the last one sooner are left out, in pixels.
    """
    left, right, bottom, top = x_axis.start, x_axis.end, y_axis.start, y_axis.end
    parts, last = [], -math.inf
    for tick in _ticks(10**x_axis.low, 10**x_axis.high):
        x = x_axis.place(math.log10(tick))
        parts.append(f'<path d="M{x:.1f} {top}V{bottom}" stroke="#ddd"/>')
        if x - last >= between_labels:
            parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
            last = x
    for number in range(6):
        value = y_axis.low + (y_axis.high - y_axis.low) * number / 5
        y = y_axis.place(value)
        parts.append(f'<path d="M{left} {y:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    middle = (top - _TOP + bottom + _BOTTOM) / 2
    parts.append(
        f'<text x="{(left + right) / 2:.0f}" y="{bottom + 38}" text-anchor="middle">L0: active latents per token</text>'
        f'<text transform="translate({left - 54} {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(title)}</text>'
    )
    return parts


def _draw_point(x_axis: _Axis, y_axis: _Axis, point: Point, value: float, colour: str, title: str) -> str:
    """A point at its L0 and a value, with a tooltip."""
    x, y = x_axis.place(math.log10(point.l0)), y_axis.place(value)
    text = escape(f"{point.text or point.group}: {title}")
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{text}</title></circle>'


def _widen(low: float, high: float) -> tuple[float, float]:
    """Add a margin at both ends."""
    room = 0.06 * (high - low) or 0.05
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers inside a range, for a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), range(1, 10)):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) >= 4:
            return found
    return found
