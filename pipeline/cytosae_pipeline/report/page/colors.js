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

  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : systemIsDark.matches);

  /** Colour of a point by a share between 0 and 1: the end of viridis that would vanish on the ground is left out. */
  const point = (share) => viridis(isDark() ? 0.35 + 0.65 * share : 0.85 * share);

  /** Colour over a cell's patch, with alpha from 0 to 1, by its share of the image's largest activation. */
  const heat = (share) => [...viridis(0.15 + 0.85 * share), share === 0 ? 0 : 0.2 + 0.6 * share];

  const kind = (index) => KINDS[index % KINDS.length];

  /** Value of a CSS variable in the theme of now. */
  const inTheme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

  /** Parts of a legend: the scale between two words, drawn with its own `color(share)` as numbers, and one colour with its meaning. */
  function scale(low, high, color) {
    const steps = Array.from({ length: 24 }, () => h("i"));
    const host = h("span.ramp", {}, steps);
    host.repaint = () => steps.forEach((step, i) => step.style.setProperty("background", css(color(i / (steps.length - 1)))));
    host.repaint();
    return [h("span", {}, low), host, h("span", {}, high)];
  }
  const key = (color, text) => h("span", {}, h("i", { style: { background: color } }), text);

  return { viridis, css, point, heat, kind, inTheme, isDark, systemIsDark, scale, key, nKinds: KINDS.length };
})();
