// A cell with what a latent sees on it: a heat map over the picture, a mask that leaves only that, or the plain picture.
"use strict";

const cells = (() => {
  const MODES = [["heat", "Heat map"], ["mask", "Mask"], ["plain", "Plain"]];
  let mode = "heat";

  function paint(canvas, patches, smooth) {
    const [rows, columns] = state.overview.store.grid;
    const side = 448;
    canvas.width = canvas.height = side;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, side, side);
    if (!patches || mode === "plain") return;
    const small = new OffscreenCanvas(columns, rows);
    const picture = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const share = patches[i] / 255;
      const [red, green, blue, alpha] = mode === "heat" ? colors.heat(share) : [22, 22, 28, 0.93 * (1 - Math.sqrt(share))];
      picture.data.set([red, green, blue, Math.round(255 * alpha)], 4 * i);
    }
    small.getContext("2d").putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, side, side);
  }

  /** A cell of the store, or of another picture; `levels` are the bytes of a map over its patches, or null. */
  function make(row, levels = null, { smooth = true, alt = "", picture = null } = {}) {
    const canvas = h("canvas", { "aria-hidden": "true" });
    const source = picture || (state.overview.thumbnails ? `thumbnails/${row}.jpg` : null);
    const nothing = () => h("div.no-picture", { role: "img", "aria-label": `${alt || `image ${row}`}, no picture` });
    const host = h("div.cell", {}, source
      ? h("img", { src: source, alt: alt || `image ${row}`, loading: "lazy", decoding: "async", onerror: (event) => event.target.replaceWith(nothing()) })
      : nothing(), canvas);
    host.show = (bytes) => { levels = bytes; host.repaint(); };
    host.repaint = () => paint(canvas, levels, smooth);
    host.repaint();
    return host;
  }

  /** Buttons that choose how all cells on the page look, and what the colours of heat maps mean. */
  function toggle() {
    return h("div.bar-row", {}, choice("How cells are shown", MODES, mode, set),
      h("div.legend.heat-legend", { hidden: mode !== "heat" }, colors.scale("0", "image's largest", colors.heat)));
  }

  function set(value) {
    mode = value;
    for (const legend of document.querySelectorAll(".heat-legend")) legend.hidden = mode !== "heat";
    for (const host of document.querySelectorAll(".cell")) if (host.repaint) host.repaint();
    for (const button of document.querySelectorAll(".choice[aria-label='How cells are shown'] button")) {
      button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
  }

  const nameOfLabel = (index) => (index >= 0 ? state.overview.labels[index].name : "no label");
  const nameOfPatient = (index) => (index >= 0 ? state.overview.patients[index] : "no patient");

  return { make, toggle, set, nameOfLabel, nameOfPatient, keys: { h: "heat", m: "mask", c: "plain" } };
})();
