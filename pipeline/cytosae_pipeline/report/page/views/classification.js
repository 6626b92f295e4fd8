// How well patients' groups are predicted from their counts, and from which latents.
"use strict";

/** @param {PatientsRecord} data */
function classificationPanel(data) {
  const found = data.classification;
  if (!found) return noGroups(data);
  const chance = percent(1 / found.names.length);
  const about = `${found.n_folds}-fold cross-validation over ${unitsOf(data)}; each fold chooses latents and penalty.`;
  return h(
    "div",
    {},
    aboutSubjects(data),
    h(
      "div.tiles.compact",
      {},
      tile(percent(found.balanced_accuracy), `balanced accuracy (chance: ${chance})`),
      tile(percent(found.accuracy), `accuracy (always predicting the largest group: ${percent(found.chance)})`),
    ),
    h(
      "div.columns",
      {},
      section("Confusion matrix", about, h("div.scroll", {}, confusionTable(found))),
      predictiveLatents(found),
    ),
  );
}

/** @param {Classification} found */
function confusionTable({ confusion, names }) {
  const largest = Math.max(...confusion.flat(), 1);
  const head = names.map((name) => h("th", { scope: "col" }, name));
  const rows = confusion.map((row, i) => {
    const counts = row.map((count, j) =>
      h("td", { class: i === j ? "right" : "", style: { "--share": count / largest } }, String(count)),
    );
    return h("tr", {}, h("th", { scope: "row" }, names[i]), counts);
  });
  return h(
    "table.confusion",
    {},
    h("caption.quiet", {}, "Rows: true group. Columns: predicted group."),
    h("thead", {}, h("tr", {}, h("td"), head)),
    h("tbody", {}, rows),
  );
}

/** @param {Classification} found */
function predictiveLatents({ latents, names }) {
  const title = "Most predictive latents";
  const rows = latents.map(({ latent, share, weights }) => [
    h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
    percent(share),
    ...weights.map((weight) => weight.toFixed(2)),
  ]);
  const numeric = [1, ...names.map((_, i) => i + 2)];
  return section(
    title,
    "Chosen in more than half of the folds, with their mean coefficients.",
    rows.length
      ? table(["latent", "folds", ...names], rows, { numeric, caption: title })
      : h("p.quiet", {}, "No latent was chosen in more than half of the folds."),
  );
}
