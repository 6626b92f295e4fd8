// A matrix as a picture, with a line of text that reads one of its cells.
"use strict";

/**
 * @typedef {object} MatrixOptions
 * @property {Uint8Array} values - row by row
 * @property {number} rows
 * @property {number} columns
 * @property {(level: number) => Rgb} color
 * @property {string} label
 * @property {(row: number, column: number) => string} describe - text of the cell under the pointer or the arrow keys
 * @property {(row: number, column: number) => void} [onpick] - called on a click or Enter
 * @property {number} [cellHeight] - pixels
 * @property {string[] | null} [rowNames]
 * @property {(row: number) => string} [rowLink] - address that a row's name links to
 * @property {Leaf} [strip] - colours of the rows, at the left
 * @property {boolean} [scrolls] - whether it scrolls inside a box of limited size
 */

/** @param {MatrixOptions} options */
function matrixChart(options) {
  const { rows, columns, describe, onpick, cellHeight = 12, rowNames = null, rowLink, strip = null, scrolls } = options;
  const canvas = matrixCanvas(options);
  canvas.style.height = `${rows * cellHeight}px`;
  const hint = "Point at a cell, or move with the arrow keys, to read it.";
  const readout = h("p.readout.quiet", { "aria-live": "polite" }, hint);
  const mark = h("div.mark", { hidden: true });
  /** @type {(event: MouseEvent) => [row: number, column: number]} */
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    return inside(row, column);
  };
  /** @type {(row: number, column: number) => [row: number, column: number]} */
  const inside = (row, column) => [Math.min(rows - 1, Math.max(0, row)), Math.min(columns - 1, Math.max(0, column))];
  let place = inside(0, 0);
  /** @param {[row: number, column: number]} cell */
  const read = ([row, column]) => {
    if (!rows || !columns) return;
    place = [row, column];
    mark.hidden = false;
    setStyle(mark, {
      left: `${(100 * column) / columns}%`,
      top: `${(100 * row) / rows}%`,
      width: `${100 / columns}%`,
      height: `${100 / rows}%`,
    });
    readout.textContent = describe(row, column);
  };
  canvas.addEventListener("pointermove", (event) => read(at(event)));
  canvas.addEventListener("focus", () => read(place));
  canvas.addEventListener("keydown", (event) => {
    const by = ARROWS.get(event.key);
    if (by) read(inside(place[0] + by[0], place[1] + by[1]));
    else if (event.key === "Enter" && onpick) onpick(...place);
    else return;
    if (scrolls) mark.scrollIntoView({ block: "nearest", inline: "nearest" });
    event.preventDefault();
    event.stopPropagation();
  });
  if (onpick) {
    canvas.classList.add("pickable");
    canvas.addEventListener("click", (event) => onpick(...at(event)));
  }
  const height = `${cellHeight}px`;
  const names = rowNames?.map((name, row) => {
    const about = { title: name, style: { height, "line-height": height } };
    return rowLink ? h("a", { href: rowLink(row), ...about }, name) : h("span", about, name);
  });
  return h(
    "div.matrix-host",
    {},
    readout,
    h(
      "div.matrix-box",
      { class: scrolls ? "matrix-box scrolls" : "matrix-box" },
      strip,
      names && h("div.row-names", {}, names),
      h("div.matrix-picture", {}, canvas, mark),
    ),
  );
}

/** Rows and columns by which an arrow key moves. */
const ARROWS = new Map([
  ["ArrowLeft", [0, -1]],
  ["ArrowRight", [0, 1]],
  ["ArrowUp", [-1, 0]],
  ["ArrowDown", [1, 0]],
]);

/** @param {MatrixOptions} options */
function matrixCanvas({ values, rows, columns, color, label }) {
  const about = `${label}. Arrow keys move from cell to cell.`;
  const canvas = h("canvas", {
    class: "matrix",
    width: columns,
    height: rows,
    tabindex: "0",
    role: "img",
    "aria-label": about,
  });
  const context = contextOf(canvas);
  const picture = context.createImageData(Math.max(columns, 1), Math.max(rows, 1));
  const lookup = Array.from({ length: 256 }, (_, level) => color(level));
  for (let i = 0; i < rows * columns; i++) {
    const [red, green, blue] = lookup[values[i]];
    picture.data.set([red, green, blue, 255], 4 * i);
  }
  context.putImageData(picture, 0, 0);
  return canvas;
}
