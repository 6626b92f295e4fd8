// Patients: the tabs, each patient's barcode, and how patients correlate.
"use strict";

/** @type {[path: string, text: string][]} */
const PATIENT_TABS = [
  ["barcodes", "Barcodes"],
  ["compare", "Compare groups"],
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
 * A patient, with the group if there are groups.
 *
 * @param {PatientsRecord} data
 * @param {number} place
 */
function patientText(data, place) {
  if (!data.group_names.length) return data.names[place];
  return `${data.names[place]} (${data.groups[place] >= 0 ? data.group_names[data.groups[place]] : "no group"})`;
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
 * A narrow strip that shows where each group begins and ends.
 *
 * @param {number[]} groups
 */
const groupStrip = (groups) =>
  h(
    "div.strip",
    { "aria-hidden": "true" },
    groups.map((group) => h("i", { style: { background: colors.group(group) } })),
  );

/** @param {PatientsRecord} data */
const patientStrip = (data) => (data.group_names.length ? groupStrip(data.groups) : null);

/** @param {PatientsRecord} data */
function barcodesPanel(data) {
  const { latents, values, peaks, means } = data.barcodes;
  const bytes = cytosae.decode(values);
  const top = cytosae.decode(peaks);
  const n = latents.length;
  const height = Math.max(1, Math.min(16, 560 / data.names.length));
  /** @type {(names: string[], levels: Uint8Array) => (row: number, column: number) => string} */
  const reader = (names, levels) => (row, column) => {
    const count = (levels[row * n + column] / 255) * top[column];
    return `${names[row]}, latent ${latents[column]}: ${format(count)} tokens per image`;
  };
  /** @type {(row: number, column: number) => void} */
  const onpick = (_row, column) => {
    location.hash = `#/latent/${latents[column]}`;
  };
  const shade = (/** @type {number} */ level) => colors.scaled(level / 255);
  const shared = { columns: n, color: shade, onpick };
  const patientNames = data.names.map((_, place) => patientText(data, place));
  const patients = matrixChart({
    ...shared,
    values: bytes,
    rows: data.names.length,
    label: "Patients by latents",
    strip: patientStrip(data),
    rowLink: (row) => `#/patient/${row}`,
    cellHeight: height,
    rowNames: namesFor(data, height) ?? (means ? [] : null),
    describe: reader(patientNames, bytes),
  });
  const about =
    `Tokens above ${format(data.threshold)} per image, as a share of the latent's largest; one column per latent of ` +
    `this report, one row per patient${byGroup(data)}. Click a column to open the latent.`;
  const scale = h("div.legend", {}, colors.scale("0", "latent's largest", colors.scaled));
  const parts = [section("Each patient's barcode", about, groupLegend(data), scale, patients)];
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
    parts.unshift(section("Each group's mean", "Mean of its patients' barcodes below.", groups));
  }
  return h("div", {}, parts);
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
  const side = Math.max(1, Math.min(18, 640 / n));
  const rowNames = namesFor(data, side);
  const matrix = matrixChart({
    values: levels,
    rows: n,
    columns: n,
    label: "Patients by patients",
    cellHeight: side,
    rowNames,
    rowLink: (row) => `#/patient/${row}`,
    strip: patientStrip(data),
    color: (level) => colors.scaled((level - low) / (high - low)),
    describe: (row, column) =>
      `${patientText(data, row)} and ${patientText(data, column)}: ${value(levels[row * n + column]).toFixed(2)}`,
  });
  return section(
    "Correlation between patients",
    `Pearson correlation of log(1 + count) over all latents${byGroup(data)}.`,
    groupLegend(data),
    h("div.legend", {}, colors.scale(value(low).toFixed(2), value(high).toFixed(2), colors.scaled)),
    h("div.square", { style: { width: `${side * n + (rowNames ? 154 : 18)}px` } }, matrix),
  );
}
