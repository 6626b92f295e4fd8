// A cell with the map of a latent: a heat map over the picture, a mask that leaves only active patches, or neither.
"use strict";

const cells = (() => {
  /** @type {[CellMode, string][]} */
  const MODES = [
    ["heat", "Heat map"],
    ["mask", "Mask"],
    ["plain", "Plain"],
  ];
  const MODES_LABEL = "How cells are shown";
  const SIDE = 448;
  const MASK = [22, 22, 28];
  /** @type {CellMode} */
  let mode = "heat";

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {Uint8Array | null} levels
   * @param {boolean} smooth
   */
  function paint(canvas, levels, smooth) {
    const [rows, columns] = state.overview.store.grid;
    canvas.width = SIDE;
    canvas.height = SIDE;
    const context = contextOf(canvas);
    context.clearRect(0, 0, SIDE, SIDE);
    if (!levels || mode === "plain" || !hasMaps()) return;
    const small = new OffscreenCanvas(columns, rows);
    const picture = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const share = levels[i] / 255;
      const [red, green, blue, alpha] = mode === "heat" ? colors.heat(share) : [...MASK, 0.93 * (1 - Math.sqrt(share))];
      picture.data.set([red, green, blue, Math.round(255 * alpha)], 4 * i);
    }
    small.getContext("2d")?.putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, SIDE, SIDE);
  }

  /**
   * A cell of the store, or of another picture.
   *
   * @param {number | null} row
   * @param {Uint8Array | null} [levels] - bytes of a map over its patches
   * @param {{smooth?: boolean, alt?: string, picture?: string | null}} [options]
   * @returns {CellElement}
   */
  function make(row, levels = null, { smooth = true, alt = `image ${row}`, picture = null } = {}) {
    const canvas = h("canvas", { "aria-hidden": "true" });
    const source = picture ?? (state.overview.thumbnails ? `thumbnails/${row}.jpg` : null);
    const nothing = () => h("div.no-picture", { role: "img", "aria-label": `${alt}, no picture` });
    const onerror = (/** @type {Event} */ event) => /** @type {Element} */ (event.target).replaceWith(nothing());
    const image = source ? h("img", { src: source, alt, loading: "lazy", decoding: "async", onerror }) : nothing();
    const repaint = () => paint(canvas, levels, smooth);
    const show = (/** @type {Uint8Array} */ bytes) => {
      levels = bytes;
      repaint();
    };
    repaint();
    return Object.assign(h("div.cell", {}, image, canvas), { show, repaint });
  }

  /** Buttons that choose how all cells on the page look, and what the colours of heat maps mean; none without maps. */
  function toggle() {
    if (!hasMaps()) return null;
    return h(
      "div.bar-row",
      {},
      choice(MODES_LABEL, MODES, mode, set),
      h("div.legend.heat-legend", { hidden: mode !== "heat" }, colors.scale("0", "image's largest", colors.heat)),
    );
  }

  /** @param {CellMode} value */
  function set(value) {
    mode = value;
    for (const legend of htmlElements(".heat-legend")) legend.hidden = mode !== "heat";
    for (const host of htmlElements(".cell")) host.repaint?.();
    for (const button of htmlElements(`.choice[aria-label='${MODES_LABEL}'] button`)) {
      button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
  }

  /** @type {Map<string, CellMode>} */
  const keys = new Map([
    ["h", "heat"],
    ["m", "mask"],
    ["c", "plain"],
  ]);

  return { make, toggle, set, keys };
})();
