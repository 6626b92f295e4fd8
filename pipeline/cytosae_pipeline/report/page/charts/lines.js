// Lines over a common x, and the round numbers of axes.
"use strict";

/**
 * Round numbers across a range.
 *
 * @param {number} low
 * @param {number} high
 * @param {number} [wanted]
 */
function axisTicks(low, high, wanted = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough) ?? 10 * power;
  const first = Math.ceil(low / step);
  const n = Math.max(0, Math.floor(high / step + 1e-9) - first + 1);
  return Array.from({ length: Math.min(n, 100) }, (_, i) => (first + i) * step);
}

/**
 * @typedef {object} Line
 * @property {string} name
 * @property {(number | null)[]} values - a null leaves a gap
 * @property {string} [color]
 * @property {string | null} [dash]
 */

/**
 * A chart of lines.
 *
 * @param {number[]} x
 * @param {Line[]} series
 * @param {object} options
 * @param {string} options.title
 * @param {string} [options.xLabel]
 * @param {[number, string][] | null} [options.xTicks] - places and texts; round numbers by default
 * @param {number} [options.width]
 * @param {number} [options.height]
 * @param {number | null} [options.low] - ends of the y axis; those of the values by default
 * @param {number | null} [options.high]
 */
function lineChart(
  x,
  series,
  { title, xLabel = "", xTicks = null, width = 360, height = 190, low = null, high = null },
) {
  /**
   * @param {number | null} value
   * @returns {value is number}
   */
  const isDrawn = (value) => value !== null && Number.isFinite(value);
  const all = series.flatMap((line) => line.values).filter(isDrawn);
  if (!all.length) return h("p.quiet", {}, `${title}: nothing was recorded.`);
  const bottom = low ?? Math.min(...all);
  const top = Math.max(high ?? Math.max(...all), bottom + 1e-9);
  const box = { left: 52, right: width - 22, top: 10, bottom: height - 34 };
  const first = x[0];
  const last = Math.max(x[x.length - 1], first + 1e-9);
  const px = (/** @type {number} */ value) => box.left + ((value - first) / (last - first)) * (box.right - box.left);
  const py = (/** @type {number} */ value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
  const grid = axisTicks(bottom, top, 4).flatMap((value) => [
    svg("line", { class: "grid", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }),
    svg("text", { class: "tick", x: box.left - 6, y: py(value) + 4, "text-anchor": "end" }, format(value)),
  ]);
  const below = (xTicks ?? axisTicks(first, last).map((value) => [value, format(value)])).map(([value, text]) =>
    svg("text", { class: "tick", x: px(Number(value)), y: box.bottom + 16, "text-anchor": "middle" }, String(text)),
  );
  const paths = series.map((line) => {
    let open = false;
    let path = "";
    for (const [i, value] of line.values.entries()) {
      if (isDrawn(value)) path += `${open ? "L" : "M"}${px(x[i]).toFixed(1)},${py(value).toFixed(1)}`;
      open = isDrawn(value);
    }
    const look = { class: "line", d: path, stroke: line.color || "var(--accent)", "stroke-dasharray": line.dash };
    return svg("path", look, svg("title", {}, line.name));
  });
  // What lies outside the scale is clipped by a nested picture of the plot's size, not moved to its edge.
  const plot = { x: box.left, y: box.top - 2, width: box.right - box.left, height: box.bottom - box.top + 4 };
  const viewBox = `${plot.x} ${plot.y} ${plot.width} ${plot.height}`;
  const end = series.length === 1 ? format(series[0].values[series[0].values.length - 1]) : "";
  const middle = (box.left + box.right) / 2;
  return h(
    "figure.chart",
    {},
    h("figcaption", {}, title, end && h("b", {}, ` ${end}`)),
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} ${end}` },
      grid,
      below,
      svg("svg", { ...plot, viewBox, overflow: "hidden" }, paths),
      svg("text", { class: "tick", x: middle, y: height - 3, "text-anchor": "middle" }, xLabel),
    ),
    series.length > 1 && h("div.legend", {}, series.map(lineKey)),
  );
}

/** @param {Line} line */
function lineKey(line) {
  const sample = line.dash
    ? h("i.dashed", { style: { "border-color": line.color } })
    : h("i", { style: { background: line.color } });
  return h("span", {}, sample, line.name);
}
