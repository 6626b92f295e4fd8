// A cell with the map of a latent: a heat map, an outline or a mask over the picture, or the bare cell, also beside it.
"use strict";

const cells = (() => {
  /** @type {[CellMode, string][]} */
  const MODES = [
    ["heat", "Heat map"],
    ["outline", "Outline"],
    ["mask", "Mask"],
    ["plain", "Plain"],
  ];
  const MODES_LABEL = "How cells are shown";
  const SIDE = 448;
  const MASK = [22, 22, 28];
  /** @type {CellMode} */
  let mode = "heat";
  let beside = false;
  /** Opacity of heat maps that the user chose. @type {number | null} */
  let chosenOpacity = null;
  const opacity = () => chosenOpacity ?? state.overview.palette.heat_opacity;
  const heat = (/** @type {number} */ share) => colors.heat(share, opacity());

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
    if (mode === "outline") {
      paintOutline(context, levels);
      return;
    }
    const small = new OffscreenCanvas(columns, rows);
    const picture = new ImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const share = levels[i] / 255;
      const [red, green, blue, alpha] = mode === "heat" ? heat(share) : [...MASK, 0.93 * (1 - Math.sqrt(share))];
      picture.data.set([red, green, blue, Math.round(255 * alpha)], 4 * i);
    }
    small.getContext("2d")?.putImageData(picture, 0, 0);
    context.imageSmoothingEnabled = smooth;
    context.imageSmoothingQuality = "high";
    context.drawImage(small, 0, 0, SIDE, SIDE);
  }

  /**
   * A line around the patches with a large share; dark below light, so that it stands out on any stain.
   *
   * @param {CanvasRenderingContext2D} context
   * @param {Uint8Array} levels
   */
  function paintOutline(context, levels) {
    const [rows, columns] = state.overview.store.grid;
    const least = 255 * state.overview.palette.outline_share;
    /** @type {(row: number, column: number) => boolean} */
    const isInside = (row, column) =>
      row >= 0 && column >= 0 && row < rows && column < columns && levels[row * columns + column] >= least;
    const [wide, high] = [SIDE / columns, SIDE / rows];
    const path = new Path2D();
    for (let row = 0; row <= rows; row++) {
      for (let column = 0; column <= columns; column++) {
        const here = isInside(row, column);
        if (here !== isInside(row - 1, column)) {
          path.moveTo(column * wide, row * high);
          path.lineTo((column + 1) * wide, row * high);
        }
        if (here !== isInside(row, column - 1)) {
          path.moveTo(column * wide, row * high);
          path.lineTo(column * wide, (row + 1) * high);
        }
      }
    }
    context.lineCap = "square";
    for (const [color, width] of /** @type {[string, number][]} */ ([
      [colors.css(MASK), 9],
      [colors.css(colors.scaled(1)), 4],
    ])) {
      context.strokeStyle = color;
      context.lineWidth = width;
      context.stroke(path);
    }
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
    const image = () =>
      source ? h("img", { src: source, alt, loading: "lazy", decoding: "async", onerror }) : nothing();
    const host = h("div.cell", {}, image(), canvas);
    const repaint = () => {
      paint(canvas, levels, smooth);
      const isDouble = beside && levels !== null && hasMaps();
      if (isDouble === host.classList.contains("beside")) return;
      host.classList.toggle("beside", isDouble);
      if (isDouble) host.append(h("div.bare", { "aria-hidden": "true" }, image()));
      else host.querySelector(".bare")?.remove();
    };
    const show = (/** @type {Uint8Array} */ bytes) => {
      levels = bytes;
      repaint();
    };
    repaint();
    return Object.assign(host, { show, repaint });
  }

  /** Controls of how all cells on the page look, and what the colours and lines of maps mean; none without maps. */
  function toggle() {
    if (!hasMaps()) return null;
    const outlined = `at least ${percent(state.overview.palette.outline_share)} of the image's largest`;
    const line = { "border-color": colors.css(colors.scaled(1)), outline: `1.5px solid ${colors.css(MASK)}` };
    const onbeside = () => setBeside(!beside);
    const parts = h(
      "div.bar-row.cell-controls",
      {},
      choice(MODES_LABEL, MODES, mode, set),
      h(
        "button.beside-button",
        { type: "button", "aria-pressed": String(beside), title: "Cell and map side by side (b)", onclick: onbeside },
        "Side by side",
      ),
      h("label.opacity", {}, h("span", {}, "opacity"), opacitySlider()),
      h("div.legend.heat-legend", {}, colors.scale("0", "image's largest", heat)),
      h("div.legend.outline-legend", {}, h("span", {}, h("i.outline-key", { style: line }), outlined)),
    );
    showControls([parts]);
    return parts;
  }

  function opacitySlider() {
    const oninput = (/** @type {InputEvent & {target: HTMLInputElement}} */ event) => {
      chosenOpacity = Number(event.target.value) / 100;
      repaintAll();
    };
    const range = { min: "0", max: "100", step: "5", value: Math.round(100 * opacity()) };
    return h("input", { type: "range", "aria-label": "Opacity of heat maps in percent", ...range, oninput });
  }

  /**
   * Show the controls that the mode needs.
   *
   * @param {Iterable<HTMLElement>} bars
   */
  function showControls(bars) {
    for (const bar of bars) {
      for (const [part, wanted] of [
        [".opacity", "heat"],
        [".heat-legend", "heat"],
        [".outline-legend", "outline"],
      ]) {
        const element = /** @type {HTMLElement} */ (bar.querySelector(part));
        element.hidden = mode !== wanted;
      }
      bar.querySelector(".beside-button")?.setAttribute("aria-pressed", String(beside));
    }
  }

  function repaintAll() {
    for (const host of htmlElements(".cell, .heat-legend .ramp")) host.repaint?.();
  }

  /** @param {CellMode} value */
  function set(value) {
    mode = value;
    showControls(htmlElements(".cell-controls"));
    repaintAll();
    for (const button of htmlElements(`.choice[aria-label='${MODES_LABEL}'] button`)) {
      button.setAttribute("aria-pressed", String(button.dataset.value === value));
    }
  }

  /** @param {boolean} value */
  function setBeside(value) {
    beside = value;
    showControls(htmlElements(".cell-controls"));
    repaintAll();
  }

  /** What each key does. @type {Map<string, () => void>} */
  const keys = new Map([
    ["h", () => set("heat")],
    ["e", () => set("outline")],
    ["m", () => set("mask")],
    ["c", () => set("plain")],
    ["b", () => setBeside(!beside)],
  ]);

  return { make, toggle, set, keys };
})();
