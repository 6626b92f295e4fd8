// Patients: barcodes, two groups compared, how alike patients are, and whether their group can be told.
"use strict";

const PATIENT_TABS = [["barcodes", "Barcodes"], ["compare", "Compare groups"], ["correlation", "Correlation"], ["classification", "Classification"]];

const patientsView = (tab = "barcodes", which = "0") => {
  if (!state.overview.has_patients) {
    return h("div", {}, h("h1", {}, "Patients"), h("p.notice", {}, "The store's images have no patients. Build it from a CSV with a patient column, or from folders with --layout patient or class/patient."));
  }
  const tabs = h("nav.tabs", { "aria-label": "Views of patients" }, PATIENT_TABS.map(([name, text]) =>
    h("a", { href: `#/patients/${name}`, "aria-current": name === tab ? "page" : null }, text)));
  const panels = new Map([["barcodes", barcodesPanel], ["compare", (data) => comparePanel(data, which)], ["correlation", correlationPanel], ["classification", classificationPanel]]);
  return h("div", {}, h("h1", {}, "Patients"), tabs, panels.has(tab) ? later(cytosae.load("patients"), panels.get(tab))
    : h("p.notice", {}, `There is no view “${tab}” of patients. Choose one above.`));
};

/** A patient, with the group where there are any. */
function patientText(data, place) {
  if (!data.group_names.length) return data.names[place];
  return `${data.names[place]} (${data.groups[place] >= 0 ? data.group_names[data.groups[place]] : "no group"})`;
}

/** Patients' names beside rows that are high enough to read them. */
const namesFor = (data, height) => (height >= 12 ? data.names : null);
const noGroups = (data) => h("p.notice", {}, data.no_groups);

/** What the colours of the strip mean; nothing where there are no groups. */
function groupLegend(data) {
  if (!data.group_names.length) return null;
  const used = [...new Set(data.groups)];
  return h("div.legend", {}, used.map((group) => (group < 0 ? colors.key("var(--undefined)", "no group")
    : colors.key(colors.kind(group), `${data.group_names[group]} (${data.groups.filter((other) => other === group).length})`))));
}

/** A narrow strip that shows where each group begins and ends. */
function groupStrip(data) {
  return data.group_names.length ? stripOf(data.groups) : null;
}

function stripOf(groups) {
  return h("div.strip", { "aria-hidden": "true" }, groups.map((group) =>
    h("i", { style: { background: group < 0 ? "var(--undefined)" : colors.kind(group) } })));
}

function barcodesPanel(data) {
  const { latents, values, peaks, means } = data.barcodes;
  const bytes = cytosae.decode(values);
  const top = cytosae.decode(peaks);
  const n = latents.length;
  const height = Math.max(1, Math.min(16, 560 / data.names.length));
  const read = (names, levels) => (row, column) => `${names[row]}, latent ${latents[column]}: ${format((levels[row * n + column] / 255) * top[column])} tokens an image`;
  const pick = (row, column) => { location.hash = `#/latent/${latents[column]}`; };
  const shade = (level) => colors.viridis(level / 255);
  const patientNames = data.names.map((_, place) => patientText(data, place));
  const parts = [section("Each patient's barcode", `Tokens above ${format(data.threshold)} an image, as a share of the latent's largest; one column a latent of this report, one row a patient${data.group_names.length ? ", ordered by group" : ""}. Click a column to open the latent.`,
    groupLegend(data), h("div.legend", {}, colors.scale("0", "latent's largest", colors.viridis)), charts.matrix({ strip: groupStrip(data),
      values: bytes, rows: data.names.length, columns: n, color: shade, label: "Patients by latents", describe: read(patientNames, bytes), onpick: pick, cellHeight: height, rowNames: namesFor(data, height) || (means ? [] : null) }))];
  if (means) {
    const levels = cytosae.decode(means);
    parts.unshift(section("Each group's mean", "Of its patients' barcodes below.", charts.matrix({
      strip: stripOf(data.group_names.map((_, group) => group)), values: levels, rows: data.group_names.length, columns: n, color: shade, label: "Groups by latents", cellHeight: 26, rowNames: data.group_names,
      describe: read(data.group_names, levels), onpick: pick })));
  }
  return h("div", {}, parts);
}

function correlationPanel(data) {
  if (!data.correlation) return h("p.notice", {}, `${format(data.names.length)} patients are too many for a matrix of all pairs.`);
  const levels = cytosae.decode(data.correlation);
  const n = data.names.length;
  const value = (level) => level / 127 - 1;
  let [low, high] = [254, 0];
  levels.forEach((level, i) => { if (i % n !== Math.floor(i / n)) { low = Math.min(low, level); high = Math.max(high, level); } });
  if (low >= high) [low, high] = [0, 254];
  const side = Math.max(1, Math.min(18, 640 / n));
  return section("How alike patients are", `Pearson correlation of log(1 + count) over all latents${data.group_names.length ? ", ordered by group" : ""}.`, groupLegend(data),
    h("div.legend", {}, colors.scale(value(low).toFixed(2), value(high).toFixed(2), colors.viridis)),
    h("div.square", { style: { width: `${side * n + (namesFor(data, side) ? 154 : 18)}px` } }, charts.matrix({ strip: groupStrip(data),
      values: levels, rows: n, columns: n, color: (level) => colors.viridis((level - low) / (high - low)), label: "Patients by patients", cellHeight: side, rowNames: namesFor(data, side),
      describe: (row, column) => `${patientText(data, row)} and ${patientText(data, column)}: ${value(levels[row * n + column]).toFixed(2)}` })));
}

function comparePanel(data, which) {
  if (!data.comparisons.length) return noGroups(data);
  const chosen = wholeNumber(which);
  if (!(chosen < data.comparisons.length)) return h("p.notice", {}, `There is no comparison ${which}: they are numbered 0 to ${data.comparisons.length - 1}.`);
  const select = h("select", { id: "compared", "aria-label": "Groups compared", onchange: (event) => { location.hash = `#/patients/compare/${event.target.value}`; } },
    data.comparisons.map((item, i) => h("option", { value: i, selected: i === chosen }, `${item.first} (${item.n_first}) against ${item.second} (${item.n_second})`)));
  return h("div", {}, h("p", {}, select), later(cytosae.load(`comparisons/${chosen}`), (result) => comparisonBody(result, data.comparisons[chosen])));
}

/** A group's name where there is little room for it. */
const short = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);

function comparisonBody(result, { first, second, groups }) {
  const latents = cytosae.decode(result.latents);
  const [fold, effect, p, q] = ["log2_fold_change", "effect", "minus_log10_p", "minus_log10_q"].map((name) => cytosae.decode(result[name]));
  // Groups have their own colours, all others together none.
  const bins = Uint8Array.from(cytosae.decode(result.direction), (side, i) => (q[i] <= -Math.log10(0.05) || side === 0 ? 0 : side > 0 ? 1 : 2));
  const palette = () => [colors.inTheme("--undefined"), ...groups.map((group) => (group === null ? colors.inTheme("--ink") : colors.kind(group)))];
  const key = (group, name) => colors.key(group === null ? "var(--ink)" : colors.kind(group), `q < 0.05, more in ${name}`);
  const significant = bins.reduce((sum, bin) => sum + (bin > 0), 0);
  const host = h("div.plot.volcano", {});
  const held = [];
  latents.forEach((latent, i) => { if (state.latents.isHeld[latent]) held.push(i); });
  const picked = h("div", { "aria-live": "polite" }, h("div.panel.quiet", {}, "Click a point to see the latent."));
  queueMicrotask(() => new Scatter(host, {
    xs: fold, ys: p, bins, palette, marked: held, lines: [{ x: 0 }], label: "Volcano plot",
    xLabel: `log2 fold change: more in ${short(second)}  ←  →  more in ${short(first)}`, yLabel: "−log10 p",
    describe: (i) => `${latentTitle(latents[i])}\nfold change 2^${format(fold[i])}\neffect ${format(effect[i])}\np ${format(10 ** -p[i])}, q ${format(10 ** -q[i])}`,
    onpick: (i) => picked.replaceChildren(h("div.panel", {}, latentSummary(latents[i]))) }));
  const rows = (places) => places.map((i) => [h("a", { href: `#/latent/${latents[i]}` }, latentTitle(latents[i])), fold[i].toFixed(2), effect[i].toFixed(2), format(10 ** -p[i], 2), format(10 ** -q[i], 2)]);
  const head = ["latent", "log2 fold", "effect", "p", "q"];
  const sideTable = (title, places) => section(title, null, places.length ? table(head, rows(places), { numeric: [1, 2, 3, 4], caption: title }) : h("p.quiet", {}, "None."));
  return h("div", {},
    h("p.quiet", {}, `${format(latents.length)} of ${format(state.latents.n)} latents vary among these patients and were tested (${result.method}); ${format(significant)} differ at a false discovery rate of 5 % (Benjamini–Hochberg). Effect is the rank-biserial correlation.${significant ? "" : " None does; the tables name the largest differences all the same."}`),
    h("div.plot-and-side", {}, h("div.panel", {}, host, h("div.legend", {}, key(groups[0], first), key(groups[1], second),
      colors.key("var(--undefined)", "q ≥ 0.05"), h("span", {}, h("i.ring"), `has a ${heldWord()}`))), h("div", {}, picked)),
    h("div.columns", {}, sideTable(`More in ${first}`, result.more_in_first), sideTable(`More in ${second}`, result.more_in_second)));
}

function classificationPanel(data) {
  const found = data.classification;
  if (!found) return noGroups(data);
  const largest = Math.max(...found.confusion.flat(), 1);
  const matrix = h("table.confusion", {}, h("caption.quiet", {}, "Rows: the true group. Columns: the group told."),
    h("thead", {}, h("tr", {}, h("td"), found.names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, found.confusion.map((row, i) => h("tr", {}, h("th", { scope: "row" }, found.names[i]), row.map((count, j) =>
      h("td", { class: i === j ? "right" : "", style: { "--share": count / largest } }, String(count)))))));
  return h("div", {}, h("div.tiles.compact", {},
    h("div.tile", {}, h("b", {}, percent(found.balanced_accuracy)), h("span", {}, `balanced accuracy (guessing: ${percent(1 / found.names.length)})`)),
    h("div.tile", {}, h("b", {}, percent(found.accuracy)), h("span", {}, `of patients right (always naming the largest group: ${percent(found.chance)})`))),
  h("div.columns", {},
    section("Who is taken for whom", `${found.n_folds}-fold cross-validation over patients; the latents and the penalty are chosen inside each training part.`, h("div.scroll", {}, matrix)),
    section("Latents that carry it", "Chosen in more than half of the folds, with their mean coefficient for each group.", found.latents.length
      ? table(["latent", "folds", ...found.names], found.latents.map((item) => [h("a", { href: `#/latent/${item.latent}` }, latentTitle(item.latent)), percent(item.share), ...item.weights.map((weight) => weight.toFixed(2))]),
        { numeric: [1, ...found.names.map((_, i) => i + 2)], caption: "Latents that carry it" })
      : h("p.quiet", {}, "No latent was chosen in more than half of the folds."))));
}
