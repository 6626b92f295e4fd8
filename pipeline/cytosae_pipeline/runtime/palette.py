"""Colours that every picture shares: the report's page, figures for papers, and the sweep's Pareto plot."""

KINDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f8a00", "#7f7f7f")
"""Okabe and Ito's colours for kinds, safe for colour-blind readers; yellow is darkened and black left out."""

SCALE = (
    "#002117", "#023622", "#034c2a", "#006529", "#197d1c", "#429402", "#6ba807", "#91bc03", "#b7d10c", "#dde503",
    "#fff877",
)  # fmt: skip
"""Colour scale of every value, from low to high at equal distances: dark green to yellow, evenly rising lightness.

Romanowsky and H&E stains are blue, violet and pink, so nothing of this scale can be mistaken for stain. In OKLCH the
hue falls from 168 to 106 degrees and the lightness rises from 0.22 to 0.96.
"""

POINT_END = 0.75
"""Position on the scale of the largest value of a point on light ground: beyond it, points would vanish."""

HEAT_SHADE = 0.15, 0.85
"""Position on the scale of a heat map's share: the value at 0, and what is added up to 1."""

HEAT_ALPHA = 0.15, 0.85
"""Opacity of a heat map's share above 0, as a part of the map's: the value near 0, and what is added up to 1."""

HEAT_OPACITY = 0.6
"""Opacity of a heat map where the image's activation is largest; the page has a slider for it."""

OUTLINE_SHARE = 0.5
"""An outline surrounds patches with at least this share of the image's largest activation."""


def kind_color(index: int) -> str:
    """Colour of a kind by its index; colours repeat after the last one."""
    return KINDS[index % len(KINDS)]


def palette_record() -> dict[str, object]:
    """The colours as the page takes them."""
    return {
        "kinds": list(KINDS),
        "scale": [[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in SCALE],
        "point_end": POINT_END,
        "heat_shade": list(HEAT_SHADE),
        "heat_alpha": list(HEAT_ALPHA),
        "heat_opacity": HEAT_OPACITY,
        "outline_share": OUTLINE_SHARE,
    }
