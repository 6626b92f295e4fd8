// How well patients' groups are predicted from their counts, and from which latents.
"use strict";

/** @param {PatientsRecord} data */
function classificationPanel(data) {
  const found = data.classification;
  if (!found) return noGroups(data);
  const { shuffled, interval } = found;
  const guessing = percent(1 / found.names.length);
  const chance = shuffled ? `${guessing}; shuffled groups: ${rangeText(shuffled.spread)}` : guessing;
  const about = `${found.n_folds}-fold cross-validation over ${unitsOf(data)}; each fold chooses latents and penalty.`;
  return h(
    "div",
    {},
    aboutSubjects(data),
    h(
      "div.tiles.compact",
      {},
      tile(percent(found.balanced_accuracy), `balanced accuracy (${rangeText(interval)}; chance: ${chance})`),
      shuffled && tile(format(shuffled.p, 2), `p, of ${countOf(shuffled.n, "shuffle")} of the groups`),
      tile(percent(found.accuracy), `accuracy (always predicting the largest group: ${percent(found.chance)})`),
    ),
    h(
      "div.columns",
      {},
      section("Confusion matrix", about, h("div.scroll", {}, confusionTable(found))),
      predictiveLatents(found),
      calibrationSection(found, unitsOf(data)),
    ),
  );
}

/** @param {[number, number]} range */
const rangeText = ([low, high]) => `${percent(low)} to ${percent(high)}`;

/**
 * @param {Classification} found
 * @param {string} units - patients or subjects
 */
function calibrationSection({ calibration }, units) {
  const { predicted, right, n_subjects, brier } = calibration;
  const rows = predicted.map((value, i) => [percent(value), percent(right[i]), format(n_subjects[i])]);
  const about =
    `Of ${units} ordered by the probability of the group predicted for them: the mean of it, and the share for whom ` +
    `it was right. Brier score ${brier.toFixed(2)} (0 is best). The range beside the accuracy is a 95 % credible ` +
    `interval by the numbers of ${units}; that of shuffled groups holds 95 % of them, each cross-validated as the ` +
    "true groups are.";
  const title = "Calibration";
  return section(title, about, table(["probability", "right", units], rows, { numeric: [0, 1, 2], caption: title }));
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
