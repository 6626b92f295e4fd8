// The map of cells: a point per image, coloured by label, patient or a latent; a lasso compares some with the rest.
"use strict";

const MAP_STEPS = 24;

const mapView = () => {
  const heading = h("h1", {}, "Map of cells");
  if (!state.overview.has_map) {
    const text = "There is no map of cells in this report: give --map_images, and a store with at least 3 images.";
    return h("div", {}, heading, h("p.notice", {}, text));
  }
  return h("div", {}, heading, later(cytosae.load("map"), mapBody, state.overview.explore && NO_ANSWER));
};

/** @param {MapRecord} map */
function mapBody(map) {
  const points = decodeMap(map);
  const host = h("div.plot.cell-map");
  const nothing = "Click a point to see the cell. Drag with Shift, or press Select, to compare cells with the rest.";
  const panel = h("aside.side.panel", { "aria-live": "polite" }, h("p.quiet", {}, nothing));
  const legend = h("div.legend");
  const status = h("span.quiet", { role: "status" });
  /** @type {Scatter} */
  let scatter;
  /** @type {Lasso} */
  let lasso;

  /** @param {MapColors} by */
  function recolor(by) {
    scatter.setColors(by.bins, by.palette);
    legend.replaceChildren(h("span", {}, by.legend()));
  }

  /** @param {number} latent */
  async function colorByLatent(latent) {
    const place = points.latents.indexOf(latent);
    status.textContent =
      place < 0 ? `The map has no scores of latent ${latent}: it has the active latents that vary most.` : "";
    if (place >= 0) recolor(mapColorsByLatent(latent, await mapScores(map, place)));
  }

  /** @param {InputEvent & {target: HTMLInputElement}} event */
  const onlatent = (event) => {
    const latent = wholeNumber(event.target.value);
    if (!Number.isNaN(latent)) colorByLatent(latent);
  };
  /** @param {InputEvent & {target: HTMLSelectElement}} event */
  const onby = (event) => {
    status.textContent = "";
    recolor(mapColorsByKind(points, event.target.value === "patient" ? "patient" : "label"));
  };
  const choose = (/** @type {number[]} */ inside) => {
    panel.replaceChildren(selectionPanel(map, points, inside));
  };
  /** @param {InputEvent & {target: HTMLSelectElement}} event */
  const onlabel = (event) => {
    const label = wholeNumber(event.target.value);
    if (!Number.isNaN(label)) choose([...points.labels.keys()].filter((i) => points.labels[i] === label));
  };
  const select = h("button", { type: "button", "aria-pressed": "false", title: "Or drag with Shift" }, "Select");
  select.addEventListener("click", () => {
    lasso.isOn = !lasso.isOn;
    select.setAttribute("aria-pressed", String(lasso.isOn));
  });
  queueMicrotask(() => {
    const colored = mapColorsByKind(points, "label");
    scatter = new Scatter(host, {
      xs: points.x,
      ys: points.y,
      bins: colored.bins,
      palette: colored.palette,
      label: "Map of cells",
      xLabel: map.axes[0],
      yLabel: map.axes[1],
      describe: (i) => `image ${points.rows[i]}\n${labelName(points.labels[i])}\n${patientName(points.patients[i])}`,
      onpick: (i) => panel.replaceChildren(pickedCell(points, i)),
    });
    lasso = new Lasso(scatter, choose);
    recolor(colored);
  });
  const labels = state.overview.labels.map(({ name }, i) => h("option", { value: i }, name));
  return h(
    "div",
    {},
    h("p.quiet", {}, map.method),
    h(
      "form.filters",
      { onsubmit: (event) => event.preventDefault() },
      h(
        "label",
        {},
        h("span", {}, "colour"),
        h(
          "select",
          { id: "map-color", onchange: onby },
          h("option", { value: "label" }, "label"),
          state.overview.has_patients && h("option", { value: "patient" }, "patient"),
        ),
      ),
      h(
        "label",
        {},
        h("span", {}, "or by latent"),
        h("input", { type: "number", id: "map-latent", min: "0", max: state.latents.n - 1, onchange: onlatent }),
      ),
      labels.length > 0 &&
        h(
          "label",
          {},
          h("span", {}, "compare with the rest"),
          h("select", { id: "map-label", onchange: onlabel }, h("option", { value: "" }, "choose a label"), labels),
        ),
      select,
      status,
    ),
    h("div.plot-and-side", {}, h("div.panel", {}, host, legend), panel),
  );
}

/**
 * The map's columns, decoded.
 *
 * @param {MapRecord} map
 * @returns {MapPoints}
 */
function decodeMap(map) {
  const { decode } = cytosae;
  return {
    rows: decode(map.numbers),
    labels: decode(map.labels),
    patients: decode(map.patients),
    x: decode(map.x),
    y: decode(map.y),
    latents: decode(map.latents),
  };
}

/**
 * Scores of a latent on the map's images, as shares of its largest in steps of 1/255.
 *
 * @param {MapRecord} map
 * @param {number} place - of the latent on the map
 * @returns {Promise<{levels: Uint8Array, peak: number}>}
 */
async function mapScores(map, place) {
  const record = await cytosae.load(`mapped/${Math.floor(place / map.latents_per_file)}`);
  const at = place % map.latents_per_file;
  const n = record.levels.shape[1];
  const levels = cytosae.decode(record.levels).subarray(at * n, (at + 1) * n);
  return { levels, peak: cytosae.decode(record.peaks)[at] };
}

/**
 * @param {MapPoints} points
 * @param {"label" | "patient"} kind
 * @returns {MapColors}
 */
function mapColorsByKind(points, kind) {
  const nKinds = colors.nKinds();
  const values = kind === "label" ? points.labels : points.patients;
  const name = kind === "label" ? labelLink : patientLink;
  const inUse = [...new Set(values)].sort((a, b) => a - b);
  const shown = inUse.filter((value) => value >= 0).slice(0, 2 * nKinds);
  return {
    bins: Uint8Array.from(values, (value) => (value < 0 ? nKinds : value % nKinds)),
    palette: () => [...Array.from({ length: nKinds }, (_, i) => colors.kind(i)), colors.inTheme("--undefined")],
    legend: () => [
      ...shown.map((value) => h("span", {}, h("i", { style: { background: colors.kind(value) } }), name(value))),
      ...(inUse[0] < 0 ? [colors.key("var(--undefined)", `no ${kind}`)] : []),
      h(
        "span",
        {},
        inUse.length > nKinds ? `Colours repeat after ${nKinds}: point at a cell to read its ${kind}.` : "",
      ),
    ],
  };
}

/**
 * @param {number} latent
 * @param {{levels: Uint8Array, peak: number}} scores
 * @returns {MapColors}
 */
function mapColorsByLatent(latent, { levels, peak }) {
  return {
    bins: Uint8Array.from(levels, (level) => (level ? 1 + Math.floor((level * (MAP_STEPS - 1)) / 255) : 0)),
    palette: () => [
      colors.inTheme("--undefined"),
      ...Array.from({ length: MAP_STEPS }, (_, i) => colors.css(colors.point(i / (MAP_STEPS - 1)))),
    ],
    legend: () => [
      h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
      colors.key("var(--undefined)", "not active"),
      ...colors.scale("score: 0", format(peak), colors.point),
    ],
  };
}

/**
 * @param {MapPoints} points
 * @param {number} i
 */
function pickedCell({ rows, labels, patients }, i) {
  const image = { row: rows[i], label: labels[i], patient: patients[i] };
  return h("div", {}, h("h2", {}, `Image ${rows[i]}`), h("div.grid-small", {}, imageTile(image)));
}
