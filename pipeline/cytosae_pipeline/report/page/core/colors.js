// Colour scales that people with any colour vision can read: viridis for values, Okabe and Ito's colours for kinds.
"use strict";

const colors = (() => {
  const VIRIDIS = [
    [68, 1, 84],
    [72, 36, 117],
    [65, 68, 135],
    [53, 95, 141],
    [42, 120, 142],
    [33, 145, 140],
    [34, 168, 132],
    [68, 191, 112],
    [122, 209, 81],
    [189, 223, 38],
    [253, 231, 37],
  ];

  /**
   * Red, green and blue of a share between 0 and 1.
   *
   * @param {number} share
   * @returns {Rgb}
   */
  function viridis(share) {
    const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
    const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
    return VIRIDIS[low].map((value, i) => Math.round(value + (at - low) * (VIRIDIS[low + 1][i] - value)));
  }

  /** @param {Rgb | Rgba} rgb */
  const css = (rgb) => `rgb(${rgb.join(",")})`;

  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => {
    const { theme } = document.documentElement.dataset;
    return theme ? theme === "dark" : systemIsDark.matches;
  };

  /**
   * Colour of a point by a share between 0 and 1: the end of viridis that would vanish on the background is left out.
   *
   * @param {number} share
   */
  const point = (share) => viridis(isDark() ? 0.35 + 0.65 * share : 0.85 * share);

  /**
   * Colour over a cell's patch, with alpha from 0 to 1, by its share of the image's largest activation.
   *
   * @param {number} share
   * @returns {Rgba}
   */
  function heat(share) {
    const { heat_shade: shade, heat_alpha: alpha } = state.overview.palette;
    return [...viridis(shade[0] + shade[1] * share), share === 0 ? 0 : alpha[0] + alpha[1] * share];
  }

  /** Number of colours for kinds. */
  const nKinds = () => state.overview.palette.kinds.length;

  /** @param {number} index */
  const kind = (index) => state.overview.palette.kinds[index % nKinds()];

  /**
   * Colour of a group of patients; of no group, and of all others together, one of their own.
   *
   * @param {number | null} group
   */
  function group(group) {
    if (group === null) return "var(--ink)";
    return group < 0 ? "var(--undefined)" : kind(group);
  }

  /**
   * Value of a CSS variable in the current theme.
   *
   * @param {string} name
   */
  const inTheme = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);

  /**
   * Parts of a legend: a colour scale between two words.
   *
   * @param {string} low
   * @param {string} high
   * @param {(share: number) => Rgb | Rgba} color
   */
  function scale(low, high, color) {
    const steps = Array.from({ length: 24 }, () => h("i"));
    const host = h("span.ramp", {}, steps);
    host.repaint = () => {
      for (const [i, step] of steps.entries()) step.style.setProperty("background", css(color(i / (steps.length - 1))));
    };
    host.repaint();
    return [h("span", {}, low), host, h("span", {}, high)];
  }

  /**
   * Part of a legend: one colour and its meaning.
   *
   * @param {string} color
   * @param {string} text
   */
  const key = (color, text) => h("span", {}, h("i", { style: { background: color } }), text);

  return { viridis, css, point, heat, kind, group, nKinds, inTheme, isDark, systemIsDark, scale, key };
})();
