// Colour scales that people with any colour vision can read: viridis in order, Okabe and Ito's for kinds.
"use strict";

const colors = (() => {
  const VIRIDIS = [
    [68, 1, 84], [72, 36, 117], [65, 68, 135], [53, 95, 141], [42, 120, 142], [33, 145, 140],
    [34, 168, 132], [68, 191, 112], [122, 209, 81], [189, 223, 38], [253, 231, 37],
  ];
  const KINDS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f8a00", "#7f7f7f"];

  /** Red, green and blue of a share between 0 and 1. */
  function viridis(share) {
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    return VIRIDIS[low].map((value, i) => Math.round(value + (at - low) * (VIRIDIS[low + 1][i] - value)));
  }

  const css = (rgb) => `rgb(${rgb.join(",")})`;

  /** `n` colours in order; the ends are left out, where they would vanish on dark or light ground. */
  const ramp = (n) => Array.from({ length: n }, (_, i) => css(viridis(0.08 + (0.84 * i) / Math.max(n - 1, 1))));

  const kind = (index) => KINDS[index % KINDS.length];

  /** A palette with the names of CSS variables replaced by their values in the theme of now. */
  function inTheme(palette) {
    const style = getComputedStyle(document.documentElement);
    return palette.map((color) => (color.startsWith("--") ? style.getPropertyValue(color) : color));
  }

  /** Parts of a legend: the scale between two words, and a single colour with its meaning. */
  const scale = (low, high) => [h("span", {}, low), h("span.ramp", {}, ramp(24).map((color) => h("i", { style: { background: color } }))), h("span", {}, high)];
  const key = (color, text) => h("span", {}, h("i", { style: { background: color } }), text);

  return { viridis, css, ramp, kind, inTheme, scale, key, nKinds: KINDS.length };
})();
