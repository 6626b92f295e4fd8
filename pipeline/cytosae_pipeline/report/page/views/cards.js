// Short cards: what a report knows of latents and images that have no page of their own in it.
"use strict";

/**
 * @param {number} latent
 */
const shortCard = (latent) =>
  h(
    "div",
    {},
    h(
      "p.notice",
      {},
      `This report has a short card of latent ${latent}, without heat maps. For a page add it with ` +
        `cytosae-cache report --latents ${latent} …, or open any latent with cytosae-cache explore.`,
    ),
    latentCardBody(latent),
  );

/** @param {number} latent */
function latentCardBody(latent) {
  if (!state.latents.sparsity[latent]) return h("p.quiet", {}, "It is dead: not active on any image.");
  const place = latent % CARDS_PER_FILE;
  return later(cytosae.load(`cards/${Math.floor(latent / CARDS_PER_FILE)}`), (cards) =>
    h("div.columns", {}, cardImages(cards, place, latent), cardLabels(cards, place)),
  );
}

const CARDS_PER_FILE = 1024;

/**
 * @param {CardsRecord} cards
 * @param {number} place
 * @param {number} latent
 */
function cardImages({ top_rows, top_values }, place, latent) {
  const n = top_rows.shape[1];
  const rows = cytosae.decode(top_rows).subarray(place * n, (place + 1) * n);
  const values = cytosae.decode(top_values).subarray(place * n, (place + 1) * n);
  const known = state.overview.image_pages;
  const items = [...rows.keys()]
    .filter((i) => rows[i] >= 0)
    .map((i) => [
      known ? h("a", { href: `#/image/${rows[i]}/${latent}` }, `image ${rows[i]}`) : `row ${rows[i]}`,
      format(values[i]),
    ]);
  return section("Top images", null, table(["image", "score"], items, { numeric: [1], caption: "Top images" }));
}

/**
 * @param {CardsRecord} cards
 * @param {number} place
 */
function cardLabels({ means, largest, rates }, place) {
  if (!means || !largest || !rates) return section("Labels", null, notKnown());
  const n = means.shape[1];
  const [levels, shares] = [means, rates].map((part) => cytosae.decode(part).subarray(place * n, (place + 1) * n));
  const peak = cytosae.decode(largest)[place];
  const items = [...levels.keys()]
    .map((label) => ({
      name: labelName(label),
      href: `#/label/${label}`,
      value: (levels[label] / 255) * peak,
      text: `${format((levels[label] / 255) * peak, 2)} · active on ${percent(shares[label] / 255)}`,
    }))
    .sort((a, b) => b.value - a.value);
  return section("Labels", "Mean score per label, to about 1/255.", barChart(items, { label: "Mean score per label" }));
}

/**
 * What a report knows of an image without a page of its own.
 *
 * @param {number} row
 */
function imageCard(row) {
  const [file, place] = placeOfRow(row);
  return later(cytosae.load(`rows/${file}`), (record) => {
    const [label, patient] = [record.labels, record.patients].map((part) => cytosae.decode(part)[place]);
    const tops = record.tops[place].map(([latent, value]) => [
      h("a", { href: `#/latent/${latent}` }, latentTitle(latent)),
      format(value),
    ]);
    const readable = cytosae.decode(record.valid)[place] > 0;
    const why = readable
      ? "This report has a short card of this image: it has pages for the top images of its latents. " +
        "Open any image with cytosae-cache explore."
      : "This image could not be read when the store was built, so it has no activations.";
    return h(
      "div",
      {},
      h("h1", {}, `Image ${row}: ${labelName(label)}`),
      h(
        "p.quiet",
        {},
        label >= 0 && ["Label ", labelLink(label), ". "],
        patient >= 0 && ["Patient ", patientLink(patient), ". "],
        record.paths && `File ${record.paths[place]}.`,
      ),
      h("p.notice", {}, why),
      readable &&
        section(
          "Latents that have it among their top images",
          null,
          tops.length ? table(["latent", "score"], tops, { numeric: [1] }) : h("p.quiet", {}, "None."),
        ),
    );
  });
}
