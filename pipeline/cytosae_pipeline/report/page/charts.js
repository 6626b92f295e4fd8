// Small charts: lines, bars and matrices. Numbers behind them are in tables or titles nearby.
"use strict";

const charts = (() => {
  /** Round numbers across a range. */
  function ticks(low, high, wanted = 5) {
    if (!(high > low)) return [low];
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    const first = Math.ceil(low / step);
    const n = Math.max(0, Math.floor(high / step + 1e-9) - first + 1);
    return Array.from({ length: Math.min(n, 100) }, (_, i) => (first + i) * step);
  }

  /** Lines over a common x: `[{name, values, color}]`; gaps where a value is null. */
  function lines(x, series, { title, xLabel = "", xTicks = null, width = 360, height = 190, low = null, high = null } = {}) {
    const all = series.flatMap((line) => line.values).filter((value) => value !== null && Number.isFinite(value));
    if (!all.length) return h("p.quiet", {}, `${title}: nothing was recorded.`);
    const bottom = low ?? Math.min(...all);
    const top = Math.max(high ?? Math.max(...all), bottom + 1e-9);
    const box = { left: 52, right: width - 22, top: 10, bottom: height - 34 };
    const first = x[0];
    const last = Math.max(x[x.length - 1], first + 1e-9);
    const px = (value) => box.left + ((value - first) / (last - first)) * (box.right - box.left);
    const py = (value) => box.bottom - ((value - bottom) / (top - bottom)) * (box.bottom - box.top);
    const grid = ticks(bottom, top, 4).flatMap((value) => [
      svg("line", { class: "grid", x1: box.left, x2: box.right, y1: py(value), y2: py(value) }),
      svg("text", { class: "tick", x: box.left - 6, y: py(value) + 4, "text-anchor": "end" }, format(value)),
    ]);
    const below = (xTicks || ticks(first, last).map((value) => [value, format(value)])).map(([value, text]) =>
      svg("text", { class: "tick", x: px(value), y: box.bottom + 16, "text-anchor": "middle" }, text));
    const paths = series.map((line) => {
      let open = false;
      const path = line.values.map((value, i) => {
        if (value === null || !Number.isFinite(value)) { open = false; return ""; }
        const step = `${open ? "L" : "M"}${px(x[i]).toFixed(1)},${py(value).toFixed(1)}`;
        open = true;
        return step;
      }).join("");
      return svg("path", { class: "line", d: path, stroke: line.color || "var(--accent)", "stroke-dasharray": line.dash },
        svg("title", {}, line.name));
    });
    const end = series.length === 1 ? format(series[0].values[series[0].values.length - 1]) : "";
    return h("figure.chart", {}, h("figcaption", {}, title, end && h("b", {}, ` ${end}`)),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} ${end}` }, grid, below,
        // What lies outside the scale is cut off by a picture of the plot's size, and not moved to the edge.
        svg("svg", { x: box.left, y: box.top - 2, width: box.right - box.left, height: box.bottom - box.top + 4,
          viewBox: `${box.left} ${box.top - 2} ${box.right - box.left} ${box.bottom - box.top + 4}`, overflow: "hidden" }, paths),
        svg("text", { class: "tick", x: (box.left + box.right) / 2, y: height - 3, "text-anchor": "middle" }, xLabel)),
      series.length > 1 && h("div.legend", {}, series.map((line) =>
        h("span", {}, line.dash ? h("i.dashed", { style: { "border-color": line.color } }) : h("i", { style: { background: line.color } }), line.name))));
  }

  /** Horizontal bars: `[{name, value, text, href}]`. */
  function bars(items, { label, color = "var(--accent)" } = {}) {
    const largest = Math.max(...items.map((item) => item.value), 1e-12);
    return h("div.bars", { role: "list", "aria-label": label }, items.map((item) =>
      h("div.bar", { role: "listitem", title: item.title },
        item.href ? h("a.bar-name", { href: item.href }, item.name) : h("span.bar-name", { title: item.name }, item.name),
        h("span.bar-track", {}, h("span.bar-fill", {
          style: { width: `${(100 * item.value) / largest}%`, background: item.color || color } })),
        h("span.bar-text", {}, item.text))));
  }

  /** Upright bars of a histogram, with what stands at its two ends. */
  function histogram(values, titles, { title, marks, width = 360, height = 150 } = {}) {
    const largest = Math.max(...values, 1e-12);
    const box = { left: 8, right: width - 8, top: 8, bottom: height - 24 };
    const step = (box.right - box.left) / Math.max(values.length, 1);
    return h("figure.chart.histogram", {}, h("figcaption", {}, title),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
        values.map((value, i) => svg("rect", {
          class: "column", x: (box.left + i * step).toFixed(1), width: Math.max(step - 1.5, 1).toFixed(1),
          y: (box.bottom - (value / largest) * (box.bottom - box.top)).toFixed(1),
          height: ((value / largest) * (box.bottom - box.top)).toFixed(1) }, svg("title", {}, titles[i]))),
        svg("line", { class: "grid", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
        svg("text", { class: "tick", x: box.left, y: height - 8 }, marks[0]),
        svg("text", { class: "tick", x: box.right, y: height - 8, "text-anchor": "end" }, marks[1])));
  }

  /**
   * A matrix of bytes as a picture with a readout: rows x columns, `color(byte)` gives red, green, blue.
   * `describe(row, column)` of the cell under the pointer or reached by arrow keys is shown above, `onpick(row, column)` is
   * called on a click or Enter.
   */
  function matrix({ values, rows, columns, color, label, describe, onpick, cellHeight = 12, rowNames = null, strip = null }) {
    const canvas = h("canvas", { class: "matrix", width: columns, height: rows, tabindex: "0", role: "img", "aria-label": `${label}. Arrows move from cell to cell.` });
    const context = canvas.getContext("2d");
    const picture = context.createImageData(Math.max(columns, 1), Math.max(rows, 1));
    const lookup = Array.from({ length: 256 }, (_, level) => color(level));
    for (let i = 0; i < rows * columns; i++) {
      const [red, green, blue] = lookup[values[i]];
      picture.data.set([red, green, blue, 255], 4 * i);
    }
    context.putImageData(picture, 0, 0);
    canvas.style.height = `${rows * cellHeight}px`;
    const readout = h("p.readout.quiet", { "aria-live": "polite" }, "Point at a cell, or move with the arrow keys, to read it.");
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const column = Math.min(columns - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * columns)));
      const row = Math.min(rows - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * rows)));
      return [row, column];
    };
    let place = [0, 0];
    const mark = h("div.mark", { hidden: true });
    const read = ([row, column]) => {
      if (!rows || !columns) return;
      place = [row, column];
      mark.hidden = false;
      for (const [name, at, n] of [["left", column, columns], ["top", row, rows]]) mark.style.setProperty(name, `${(100 * at) / n}%`);
      for (const [name, n] of [["width", columns], ["height", rows]]) mark.style.setProperty(name, `${100 / n}%`);
      readout.textContent = describe(row, column);
    };
    canvas.addEventListener("pointermove", (event) => read(at(event)));
    canvas.addEventListener("focus", () => read(place));
    canvas.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (by) read([Math.min(rows - 1, Math.max(0, place[0] + by[0])), Math.min(columns - 1, Math.max(0, place[1] + by[1]))]);
      else if (event.key === "Enter" && onpick) onpick(...place);
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    if (onpick) {
      canvas.classList.add("pickable");
      canvas.addEventListener("click", (event) => onpick(...at(event)));
    }
    const names = rowNames && h("div.row-names", {}, rowNames.map((name) =>
      h("span", { title: name, style: { height: `${cellHeight}px`, "line-height": `${cellHeight}px` } }, name)));
    return h("div.matrix-host", {}, readout, h("div.matrix-box", {}, strip, names, h("div.matrix-picture", {}, canvas, mark)));
  }

  return { ticks, lines, bars, histogram, matrix };
})();
