"""The shared colour scale: even, and of no colour that a stain has."""

import colorsys

import numpy as np

from cytosae_pipeline.runtime.palette import SCALE


def _rgb(color):
    return [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]


def test_the_scale_cannot_be_mistaken_for_stain():
    # Eosin, azure and their mixtures lie between 190 and 360 degrees of hue; red cells and paper between 0 and 40.
    hues = [360 * colorsys.rgb_to_hsv(*_rgb(color))[0] for color in SCALE]
    assert min(hues) > 50
    assert max(hues) < 170
    assert (np.diff(hues) < 0).all(), "from green to yellow without a turn"


def test_the_lightness_of_the_scale_rises_evenly():
    linear = np.array([[v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _rgb(c)] for c in SCALE])
    lightness = 116 * np.cbrt(np.maximum(linear @ [0.2126, 0.7152, 0.0722], 0.008856)) - 16
    steps = np.diff(lightness)
    assert steps.min() > 0.6 * steps.mean()
    assert steps.max() < 1.6 * steps.mean()
