// Bars: one per name, and histograms.
"use strict";

/**
 * Horizontal bars.
 *
 * @param {{name: string, value: number, text: string, href?: string | null}[]} items
 * @param {{label: string, color?: string}} options
 */
function barChart(items, { label, color = "var(--accent)" }) {
  const largest = Math.max(...items.map((item) => item.value), 1e-12);
  const bars = items.map((item) => {
    const style = { width: `${(100 * item.value) / largest}%`, background: color };
    return h(
      "div.bar",
      { role: "listitem" },
      h("span.bar-name", { title: item.name }, item.href ? h("a", { href: item.href }, item.name) : item.name),
      h("span.bar-track", {}, h("span.bar-fill", { style })),
      h("span.bar-text", {}, item.text),
    );
  });
  return h("div.bars", { role: "list", "aria-label": label }, bars);
}

/**
 * Upright bars.
 *
 * @param {number[]} values
 * @param {string[]} titles - shown when a bar is pointed at
 * @param {{title: string, marks: [string, string], width?: number, height?: number}} options - marks stand at the ends
 */
function histogramChart(values, titles, { title, marks, width = 360, height = 150 }) {
  const largest = Math.max(...values, 1e-12);
  const box = { left: 52, right: width - 14, top: 8, bottom: height - 24 };
  const grid = axisTicks(0, largest, 3).flatMap((value) => {
    const y = box.bottom - (value / largest) * (box.bottom - box.top);
    return [
      svg("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }),
      svg("text", { class: "tick", x: box.left - 6, y: y + 4, "text-anchor": "end" }, format(value)),
    ];
  });
  const step = (box.right - box.left) / Math.max(values.length, 1);
  const columns = values.map((value, i) => {
    const size = (value / largest) * (box.bottom - box.top);
    const place = {
      x: (box.left + i * step).toFixed(1),
      y: (box.bottom - size).toFixed(1),
      width: Math.max(step - 1.5, 1).toFixed(1),
      height: size.toFixed(1),
    };
    return svg("rect", { class: "column", ...place }, svg("title", {}, titles[i]));
  });
  return h(
    "figure.chart.histogram",
    {},
    h("figcaption", {}, title),
    svg(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
      grid,
      columns,
      svg("text", { class: "tick", x: box.left, y: height - 8 }, marks[0]),
      svg("text", { class: "tick", x: box.right, y: height - 8, "text-anchor": "end" }, marks[1]),
    ),
  );
}
