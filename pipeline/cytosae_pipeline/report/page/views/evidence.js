// One latent on images that were not chosen to show it: at quantiles of its activation, and on held-out halves.
"use strict";

/** @param {LatentRecord} latent */
function latentQuantiles(latent) {
  if (!latent.quantiles.length) return null;
  const bands = latent.quantiles.map(({ quantile, value, images }) =>
    h(
      "div.band",
      { "data-quantile": quantile },
      h("h3", {}, quantile ? `${Math.round(100 * quantile)}\u00a0% quantile: ${format(value)}` : "Just above 0"),
      h(
        "div.grid-band",
        {},
        images.map((item) => topImage(item, latent.latent)),
      ),
    ),
  );
  const about =
    "What the largest values do not show: images at quantiles of the activation (mean over an image's tokens) among " +
    `the ${countOf(latent.n_active, "image")} in which the latent is active.`;
  return section("Images by activation", about, h("div.bands", {}, bands));
}

/** @param {LatentRecord} latent */
function latentRules({ rules }) {
  const title = "Labels told from its activation";
  if (!rules) {
    const why = state.overview.labels.length ? "There are no two halves with labels." : "The images have no labels.";
    return section(title, null, state.overview.image_pages ? h("p.quiet", {}, why) : notKnown());
  }
  const { unit, best, n_images } = rules;
  const chosen = rules.rules.find(({ label }) => label === best);
  const about =
    `The rule “activation ≥ threshold” has the largest F1 on one half of the ${unit}s ` +
    `(${countOf(n_images[0], "image")}) and is shown on the other half (${format(n_images[1])}). AUROC: how often an ` +
    "image of the label has the larger activation than one without it; 0.5 is chance.";
  const verdict = chosen
    ? h(
        "p",
        {},
        "Chosen label: ",
        h("b", {}, labelName(best)),
        `, held-out AUROC ${format(chosen.auroc[1])}, F1 ${format(chosen.f1[1])} at activation ≥ ` +
          `${format(chosen.threshold)} (precision ${format(chosen.precision)}, recall ${format(chosen.recall)}).`,
      )
    : h("p.quiet", {}, "No label has enough images in both halves to be chosen.");
  const rows = [...rules.rules]
    .sort((a, b) => (b.auroc[0] ?? -1) - (a.auroc[0] ?? -1))
    .map(({ label, n_images: n, auroc, threshold, f1, precision, recall }) => [
      labelLink(label),
      ...[...n, auroc[0], auroc[1], threshold, f1[0], f1[1], precision, recall].map((value) => format(value)),
    ]);
  const head = [
    "label",
    "images",
    "held out",
    "AUROC",
    "held out",
    "threshold",
    "F1",
    "held out",
    "precision",
    "recall",
  ];
  return section(title, about, verdict, table(head, rows, { numeric: head.map((_, i) => i).slice(1), caption: title }));
}

/** @param {LatentRecord} latent */
function latentValues({ values }) {
  if (!values) return null;
  const title = "Image values";
  const limit = format(state.overview.limits.significant_q);
  const about =
    `Spearman's rank correlation of the activation with each image's value, on one half of the ${values.unit}s and ` +
    "on the other, held-out half. q (Benjamini-Hochberg over " +
    `${format(values.n_tested)} pairs of latent and value) is of the first half and takes images as independent; ` +
    `bold where it is below ${limit}.`;
  const rows = values.columns.map(({ name, n, rho, q, selected }) => [
    selected ? h("b", {}, name) : name,
    ...[n[0], rho[0], q, n[1], rho[1]].map((value) => format(value)),
  ]);
  const head = ["value", "images", "rho", "q", "held out", "rho held out"];
  const more = values.n_columns - values.columns.length;
  const rest = more > 0 && h("p.quiet", {}, `${countOf(more, "value")} with smaller correlations left out.`);
  return section(title, about, table(head, rows, { numeric: [1, 2, 3, 4, 5], caption: title }), rest);
}

/** @param {LatentRecord} latent */
function latentCompartments({ compartments }) {
  if (!compartments) return null;
  const title = "Compartments";
  const share = (/** @type {number | null} */ value) => (value === null ? "–" : percent(value));
  const without = compartments.n_without ? ` (${countOf(compartments.n_without, "image")} without one)` : "";
  const about =
    `Where it is active on ${countOf(compartments.n_images, "image")} with a mask${without}: the share of the ` +
    "activation beside that of the area, and the average precision of the heat map for patches that lie in the " +
    "compartment with at least half of their pixels, beside that of chance.";
  const rows = compartments.compartments.map((one) => [
    one.name,
    share(one.share),
    share(one.area),
    format(one.precision),
    format(one.inside),
  ]);
  const head = ["compartment", "activation", "area", "average precision", "chance"];
  return section(title, about, table(head, rows, { numeric: [1, 2, 3, 4], caption: title }));
}
