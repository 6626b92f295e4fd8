// Patients: the tabs, each patient's barcode, and how patients correlate.
"use strict";

/** @type {[path: string, text: string][]} */
const PATIENT_TABS = [
  ["barcodes", "Barcodes"],
  ["compare", "Compare groups"],
  ["audit", "Confounders"],
  ["correlation", "Correlation"],
  ["classification", "Classification"],
];

const patientsView = (tab = "barcodes", which = "0") => {
  const heading = h("h1", {}, "Patients");
  if (!state.overview.has_patients) {
    const text =
      "The store's images have no patients. Build it from a CSV with a patient column, or from folders with " +
      "--layout patient or class/patient.";
    const foreign = "These results came without the images' patients.";
    return h("div", {}, heading, h("p.notice", {}, state.overview.image_pages ? text : foreign));
  }
  const links = PATIENT_TABS.map(([name, text]) =>
    h("a", { href: `#/patients/${name}`, "aria-current": name === tab ? "page" : null }, text),
  );
  const panels = new Map([
    ["barcodes", barcodesPanel],
    ["compare", (/** @type {PatientsRecord} */ data) => comparisonsPanel(data, which)],
    ["audit", auditPanel],
    ["correlation", correlationPanel],
    ["classification", classificationPanel],
  ]);
  const panel = panels.get(tab);
  return h(
    "div",
    {},
    heading,
    h("nav.tabs", { "aria-label": "Views of patients" }, links),
    panel
      ? later(cytosae.load("patients"), panel)
      : h("p.notice", {}, `There is no view “${tab}” of patients. Choose one above.`),
  );
};

/**
 * What is compared, in the plural: subjects where several patients are one person.
 *
 * @param {PatientsRecord} data
 */
const unitsOf = (data) => (data.subjects ? "subjects" : "patients");

/**
 * Says what is compared where it is not every patient with all images.
 *
 * @param {PatientsRecord} data
 */
function aboutSubjects({ names, subjects, n_each }) {
  const parts = [];
  if (subjects) {
    const [patients, persons] = [countOf(names.length, "patient"), countOf(subjects.names.length, "subject")];
    parts.push(`${patients} of ${persons}: subjects are compared, with the images of their patients together.`);
  }
  if (n_each) {
    parts.push(`${countOf(n_each, "image")} of each, drawn at random, are counted: no side is more certain.`);
  }
  return parts.length ? h("p.quiet", {}, parts.join(" ")) : null;
}

/**
 * A patient, with the person and the group where these are known.
 *
 * @param {PatientsRecord} data
 * @param {number} place
 */
function patientText(data, place) {
  const { names, subjects, groups, group_names } = data;
  const person = subjects && `of ${subjects.names[subjects.of[place]]}`;
  const group = group_names.length && (groups[place] >= 0 ? group_names[groups[place]] : "no group");
  const known = [person, group].filter(Boolean).join(", ");
  return known ? `${names[place]} (${known})` : names[place];
}

/**
 * Patients' names beside rows that are high enough to read them.
 *
 * @param {PatientsRecord} data
 * @param {number} height - pixels
 */
const namesFor = (data, height) => (height >= 12 ? data.names : null);

/** @param {PatientsRecord} data */
const noGroups = (data) => h("p.notice", {}, data.no_groups);

/** @param {PatientsRecord} data */
const byGroup = (data) => (data.group_names.length ? ", ordered by group" : "");

/**
 * What the colours of the strip mean; nothing if there are no groups.
 *
 * @param {PatientsRecord} data
 */
function groupLegend({ group_names, groups }) {
  if (!group_names.length) return null;
  /** @param {number} group */
  const text = (group) => {
    if (group < 0) return "no group";
    return `${group_names[group]} (${groups.filter((other) => other === group).length})`;
  };
  return h(
    "div.legend",
    {},
    [...new Set(groups)].map((group) => {
      const key = colors.key(colors.group(group), text(group));
      return group < 0 ? key : h("a", { href: `#/group/${group}` }, key);
    }),
  );
}

/**
 * A narrow strip that shows the group of each row.
 *
 * @param {number[]} groups
 * @param {number} [height] - pixels of a row; by default all rows share the height of the matrix
 */
const groupStrip = (groups, height) =>
  h(
    "div.strip",
    { "aria-hidden": "true" },
    groups.map((group) =>
      h("i", { style: { background: colors.group(group), ...(height && { height: `${height}px` }) } }),
    ),
  );

/** Pixels of a row whose name can be read. */
const READABLE = 14;

/** @param {PatientsRecord} data */
function barcodesPanel(data) {
  const { latents, values, peaks, means } = data.barcodes;
  const bytes = cytosae.decode(values);
  const top = cytosae.decode(peaks);
  const n = latents.length;
  /** @type {(row: number, column: number) => void} */
  const onpick = (_row, column) => {
    location.hash = `#/latent/${latents[column]}`;
  };
  /** @type {(names: string[], levels: Uint8Array) => (row: number, column: number) => string} */
  const reader = (names, levels) => (row, column) => {
    const count = (levels[row * n + column] / 255) * top[column];
    return `${names[row]}, latent ${latents[column]}: ${format(count)} tokens per image`;
  };
  const shared = { columns: n, color: (/** @type {number} */ level) => colors.scaled(level / 255), onpick };
  /** @param {number[]} places - patients to show, in order */
  const patientsMatrix = (places) => {
    const levels = new Uint8Array(places.length * n);
    for (const [row, place] of places.entries()) levels.set(bytes.subarray(place * n, (place + 1) * n), row * n);
    const groups = places.map((place) => data.groups[place]);
    const names = places.map((place) => patientText(data, place));
    return matrixChart({
      ...shared,
      values: levels,
      rows: places.length,
      label: "Patients by latents",
      strip: data.group_names.length ? groupStrip(groups, READABLE) : null,
      rowLink: (row) => `#/patient/${places[row]}`,
      cellHeight: READABLE,
      rowNames: places.map((place) => data.names[place]),
      describe: reader(names, levels),
      scrolls: true,
    });
  };
  const about =
    `Tokens above ${format(data.threshold)} per image, as a share of the latent's largest; one column per latent of ` +
    "this report, one row per patient. Click a column to open the latent, a name to open the patient.";
  const scale = h("div.legend", {}, colors.scale("0", "latent's largest", colors.scaled));
  const host = h("div");
  const column = (/** @type {number} */ latent) => {
    const at = latents.indexOf(latent);
    return at < 0 ? null : (/** @type {number} */ place) => bytes[place * n + at];
  };
  const order = patientOrder(data, column, (places) => {
    host.replaceChildren(
      places.length ? patientsMatrix(places) : h("p.quiet", {}, "No patient or group has that in its name."),
    );
  });
  const parts = [section("Each patient's barcode", about, groupLegend(data), order, scale, host)];
  if (means) {
    const levels = cytosae.decode(means);
    const groups = matrixChart({
      ...shared,
      values: levels,
      rows: data.group_names.length,
      label: "Groups by latents",
      cellHeight: 26,
      rowNames: data.group_names,
      rowLink: (row) => `#/group/${row}`,
      strip: groupStrip([...data.group_names.keys()]),
      describe: reader(data.group_names, levels),
    });
    parts.unshift(
      section(
        "Each group's mean",
        `Mean of its ${unitsOf(data)}${data.subjects ? ", each with all its patients" : "' barcodes below"}.`,
        groups,
      ),
    );
  }
  return h("div", {}, parts);
}

/**
 * Fields that order and filter the patients.
 *
 * @param {PatientsRecord} data
 * @param {(latent: number) => ((place: number) => number) | null} column - values of a latent; null if there are none
 * @param {(places: number[]) => void} onchange - called with the patients to show, at once, too
 */
function patientOrder(data, column, onchange) {
  const all = [...data.names.keys()];
  const search = h("input", { type: "search", id: "find-patient", placeholder: "part of a name or group" });
  const by = h(
    "select",
    { id: "order-patients" },
    h("option", { value: "name" }, data.group_names.length ? "group, then name" : "name"),
    h("option", { value: "images" }, "readable images, most first"),
    h("option", { value: "latent" }, "count of a latent"),
  );
  const latent = h("input", { type: "number", id: "order-latent", min: "0", "aria-label": "Latent to order by" });
  latent.value = String(data.barcodes.latents[0] ?? "");
  const status = h("span.quiet", { role: "status" });
  const apply = () => {
    latent.hidden = by.value !== "latent";
    const wanted = search.value.trim().toLowerCase();
    const shown = all.filter((place) => patientText(data, place).toLowerCase().includes(wanted));
    const counts = column(wholeNumber(latent.value));
    const value = by.value === "images" ? (/** @type {number} */ place) => data.n_images[place] : counts;
    status.textContent =
      `${format(shown.length)} of ${countOf(all.length, "patient")}.` +
      (by.value === "latent" && !counts ? " The latent has no column here." : "");
    if (by.value !== "name" && value) shown.sort((a, b) => value(b) - value(a) || a - b);
    onchange(shown);
  };
  search.addEventListener("input", apply);
  by.addEventListener("change", apply);
  latent.addEventListener("change", apply);
  apply();
  return h(
    "form.filters",
    { onsubmit: (event) => event.preventDefault() },
    h("label", {}, h("span", {}, "find"), search),
    h("label", {}, h("span", {}, "order by"), by),
    latent,
    status,
  );
}

/** @param {PatientsRecord} data */
function correlationPanel(data) {
  const n = data.names.length;
  if (!data.correlation) return h("p.notice", {}, `${format(n)} patients are too many for a matrix of all pairs.`);
  const levels = cytosae.decode(data.correlation);
  const value = (/** @type {number} */ level) => level / 127 - 1;
  const others = levels.filter((_, i) => i % n !== Math.floor(i / n));
  let [low, high] = [254, 0];
  for (const level of others) [low, high] = [Math.min(low, level), Math.max(high, level)];
  if (low >= high) [low, high] = [0, 254];
  const fitted = Math.max(1, Math.min(18, 640 / n));
  const host = h("div");
  /** @param {"fit" | "readable"} size */
  const draw = (size) => {
    const side = size === "fit" ? fitted : READABLE;
    const scrolls = side > fitted;
    const rowNames = namesFor(data, side);
    const matrix = matrixChart({
      values: levels,
      rows: n,
      columns: n,
      label: "Patients by patients",
      cellHeight: side,
      rowNames,
      rowLink: (row) => `#/patient/${row}`,
      strip: data.group_names.length ? groupStrip(data.groups, scrolls ? side : undefined) : null,
      color: (level) => colors.scaled((level - low) / (high - low)),
      describe: (row, column) =>
        `${patientText(data, row)} and ${patientText(data, column)}: ${value(levels[row * n + column]).toFixed(2)}`,
      scrolls,
    });
    const box = /** @type {HTMLElement} */ (matrix.querySelector(".matrix-box"));
    box.classList.toggle("wide", scrolls);
    const picture = /** @type {HTMLElement} */ (matrix.querySelector(".matrix-picture"));
    if (scrolls) picture.style.flex = `0 0 ${side * n}px`;
    const style = scrolls ? {} : { width: `${side * n + (rowNames ? 154 : 18)}px` };
    host.replaceChildren(h("div.square", { style }, matrix));
  };
  draw("fit");
  const sizes = choice(
    "Size",
    [
      ["fit", "All at once"],
      ["readable", "With names, scrolling"],
    ],
    "fit",
    (size) => draw(size === "fit" ? "fit" : "readable"),
  );
  return section(
    "Correlation between patients",
    `Pearson correlation of log(1 + count) over all latents${byGroup(data)}.`,
    groupLegend(data),
    fitted < 12 && sizes,
    h("div.legend", {}, colors.scale(value(low).toFixed(2), value(high).toFixed(2), colors.scaled)),
    host,
  );
}
