"""Colours that every picture shares: the report's page, figures for papers, and the sweep's Pareto plot."""

KINDS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f8a00", "#7f7f7f")
"""Okabe and Ito's colours for kinds, safe for colour-blind readers; yellow is darkened and black left out."""

HEAT_SHADE = 0.15, 0.85
"""Position on viridis of a heat map's share: the value at 0, and what is added up to 1."""

HEAT_ALPHA = 0.2, 0.6
"""Opacity of a heat map's share above 0: the value near 0, and what is added up to 1."""


def kind_color(index: int) -> str:
    """Colour of a kind by its index; colours repeat after the last one."""
    return KINDS[index % len(KINDS)]
