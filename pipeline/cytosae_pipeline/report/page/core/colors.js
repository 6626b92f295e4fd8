// Colours that people with any colour vision can read, from the overview: a scale for values, and colours for kinds.
"use strict";

const colors = (() => {
  /**
   * Red, green and blue of a share between 0 and 1 on the scale of values.
   *
   * @param {number} share
   * @returns {Rgb}
   */
  function scaled(share) {
    const anchors = state.overview.palette.scale;
    const at = Math.min(Math.max(share, 0), 1) * (anchors.length - 1);
    const low = Math.min(Math.floor(at), anchors.length - 2);
    return anchors[low].map((value, i) => Math.round(value + (at - low) * (anchors[low + 1][i] - value)));
  }

  /** @param {Rgb | Rgba} rgb */
  const css = (rgb) => `rgb(${rgb.join(",")})`;

  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => {
    const { theme } = document.documentElement.dataset;
    return theme ? theme === "dark" : systemIsDark.matches;
  };

  /**
   * Colour of a point by a share between 0 and 1: the end of the scale that would vanish on the background is left out.
   *
   * @param {number} share
   */
  const point = (share) => scaled(isDark() ? 0.35 + 0.65 * share : state.overview.palette.point_end * share);

  /**
   * Colour over a cell's patch, with alpha from 0 to 1, by its share of the image's largest activation.
   *
   * @param {number} share
   * @param {number} [opacity] - where the activation is largest
   * @returns {Rgba}
   */
  function heat(share, opacity = state.overview.palette.heat_opacity) {
    const { heat_shade: shade, heat_alpha: alpha } = state.overview.palette;
    return [...scaled(shade[0] + shade[1] * share), share === 0 ? 0 : opacity * (alpha[0] + alpha[1] * share)];
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

  return { scaled, css, point, heat, kind, group, nKinds, inTheme, isDark, systemIsDark, scale, key };
})();
