"""A plot of explained variance against L0, as a self-contained SVG."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from cytosae_pipeline.runtime.palette import kind_color

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 20, 50


class Point(NamedTuple):
    """One autoencoder in the plot."""

    l0: float
    """Mean number of active latents per token."""
    explained_variance: float
    """At most 1."""
    group: str
    """Group, shown by the colour."""
    text: str
    """Text of the tooltip."""


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other point dominates, by rising L0."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.l0, -point.explained_variance)):
        if not front or point.explained_variance > front[-1].explained_variance:
            front.append(point)
    return front


def draw_pareto(points: Sequence[Point]) -> str:
    """Draw the plot: L0 on a logarithmic axis, one colour per group, a line through the Pareto front."""
    shown = [point for point in points if point.l0 > 0 and math.isfinite(point.l0 + point.explained_variance)]
    groups = list(dict.fromkeys(point.group for point in shown))
    xs = [math.log10(point.l0) for point in shown] or [0.0, 1.0]
    ys = [point.explained_variance for point in shown] or [0.0, 1.0]
    x_axis = _Axis(*_widen(min(xs), max(xs)), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(*_widen(min(ys), max(ys)), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><title>Explained variance against L0</title><rect width="100%" height="100%" fill="#fff"/>'
    ]
    for tick in _ticks(10**x_axis.low, 10**x_axis.high):
        x = x_axis.place(math.log10(tick))
        parts.append(f'<path d="M{x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for number in range(6):
        value = y_axis.low + (y_axis.high - y_axis.low) * number / 5
        y = y_axis.place(value)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3f}</text>')
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 12}" text-anchor="middle">'
        "L0: active latents per token</text>"
        f'<text transform="translate(16 {_HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">explained variance</text>'
    )
    places = [(x_axis.place(math.log10(p.l0)), y_axis.place(p.explained_variance)) for p in pareto_front(shown)]
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    parts.append(f'<path d="M{line}" fill="none" stroke="#888" stroke-dasharray="4 3"/>' if places else "")
    for point in shown:
        colour = kind_color(groups.index(point.group))
        x, y = x_axis.place(math.log10(point.l0)), y_axis.place(point.explained_variance)
        title = f"{point.text or point.group}: explained variance {point.explained_variance:.4f}, L0 {point.l0:.1f}"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(title)}</title></circle>')
    for number, group in enumerate(groups):
        y = _TOP + 14 + 20 * number
        parts.append(
            f'<circle cx="{_WIDTH - _RIGHT + 24}" cy="{y - 4}" r="5" fill="{kind_color(number)}"/>'
            f'<text x="{_WIDTH - _RIGHT + 36}" y="{y}">{escape(group)}</text>'
        )
    return "\n".join(part for part in parts if part) + "\n</svg>\n"


class _Axis(NamedTuple):
    """A range of values and of pixels."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Position of a value, in pixels."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


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
