// One latent: what activates it, on which labels and patients, and which latents are similar.
"use strict";

/**
 * @param {number} index
 * @param {string} text - the number as the address gives it
 */
const latentView = (index, text) => {
  const { overview, latents } = state;
  if (!(index < latents.n)) {
    const range = `they are numbered 0 to ${latents.n - 1}.`;
    return h("div", {}, h("h1", {}, "No such latent"), h("p.notice", {}, `There is no latent ${text}: ${range}`));
  }
  const { featured } = overview;
  const at = featured.indexOf(index);
  const neighbour = (/** @type {number} */ by) => featured[(at + by + featured.length) % featured.length];
  if (at >= 0) {
    state.step = (by) => {
      location.hash = `#/latent/${neighbour(by)}`;
    };
  }
  const steps =
    at >= 0 &&
    h(
      "nav.steps",
      { "aria-label": `Latents with a ${featuredWord()}` },
      h("a.button", { href: `#/latent/${neighbour(-1)}`, title: "Left arrow" }, "← previous"),
      h("a.button", { href: `#/latent/${neighbour(1)}`, title: "Right arrow" }, "next →"),
    );
  const [entropy, cluster] = [latents.entropy[index], latents.cluster[index]];
  const entropyText = "label entropy of its top images";
  return h(
    "div",
    {},
    h("div.title-row", {}, h("h1", {}, latentTitle(index)), steps),
    h(
      "div.tiles.compact",
      {},
      tile(percent(latents.sparsity[index]), "of images active (sparsity)"),
      tile(format(latents.mean[index]), "mean activation where active"),
      tile(entropy < 0 ? "–" : format(entropy), entropyText, "nats; 0 means a single label"),
      latents.lift[index] > 1 && tile(`${format(latents.lift[index])} ×`, liftText(index), "lift, a lower bound"),
      cluster >= 0 && tile(String(cluster), "cluster"),
    ),
    positionNotice(index),
    sourceNotice(index),
    latentParts(index),
  );
};

/**
 * What is below the tiles: all that is known, or a short card if this report has no page for the latent.
 *
 * @param {number} index
 */
function latentParts(index) {
  const { explore } = state.overview;
  if (!explore && !state.latents.isFeatured[index]) return h("div", {}, notePanel(index), shortCard(index));
  return later(cytosae.load(`latents/${index}`), latentBody, explore && NO_ANSWER);
}

/** @param {number} latent */
const liftText = (latent) => `more often on ${labelName(state.latents.best[latent])} than by chance`;

/** @param {number} latent */
function positionNotice(latent) {
  if (!dependsOnPosition(latent)) return null;
  const text =
    "This latent depends on position: its maps on two different images correlate by " +
    `${format(state.latents.position[latent], 2)} on average. It may say where a patch lies, not what it shows.`;
  return h("p.notice", {}, text);
}

/** @param {LatentRecord} latent */
function latentBody(latent) {
  const images = latent.top.length
    ? h(
        "div.grid",
        {},
        latent.top.map((item) => topImage(item, latent.latent)),
      )
    : h("p.notice", {}, "It is not active on any image.");
  return h(
    "div",
    {},
    notePanel(latent.latent),
    section("Top activating images", aboutTopImages(), cells.toggle(), images),
    latentQuantiles(latent),
    h(
      "div.columns",
      {},
      h(
        "div.stack",
        {},
        latentLabels(latent),
        latentPatients(latent),
        latentConfounders(latent),
        latentSources(latent),
        latentSites(latent),
      ),
      h(
        "div.stack",
        {},
        latentActivations(latent),
        latentNeighbours(latent),
        latentPartners(latent),
        meanEffectPanel(latent.effect),
      ),
    ),
    latentRules(latent),
    latentValues(latent),
    latentCompartments(latent),
  );
}

function aboutTopImages() {
  if (!state.overview.image_pages) {
    return "Rows of the list of images that these results were made from; the images themselves are not known here.";
  }
  if (!hasMaps())
    return "Each image is a single token, so there is no map of a latent. Click a cell to open the image.";
  return "Each patch's activation, as a share of the image's largest. Click a cell to open the image.";
}

/** What these results do not contain. */
const notKnown = () => h("p.quiet", {}, "These results do not contain it.");

/** @param {LatentRecord} latent */
const latentActivations = ({ histogram }) =>
  section("Activations", null, histogram ? activationHistogram(histogram) : notKnown());

/** @param {LatentRecord} latent */
function latentLabels(latent) {
  if (!latent.labels) return section("Labels", "Mean score per label.", notKnown());
  const items = latent.labels
    .filter((label) => label.n_images)
    .map(({ label, mean, n_active, n_images }) => ({
      name: labelName(label),
      href: `#/label/${label}`,
      value: mean,
      text: `${format(mean)} · active on ${percent(n_active / n_images)}`,
    }))
    .sort((a, b) => b.value - a.value);
  return section(
    "Labels",
    `Mean score per label (over ${format(latent.n_images)} images).`,
    items.length ? barChart(items, { label: "Mean score per label" }) : h("p.quiet", {}, "The images have no labels."),
  );
}

/** @param {LatentRecord} latent */
function latentPatients(latent) {
  const { overview } = state;
  if (!overview.image_pages) return section("Patients", null, notKnown());
  const threshold = format(latent.threshold);
  const items = latent.patients.map(({ patient, per_image, count, n_images }) => ({
    name: patientName(patient),
    href: `#/patient/${patient}`,
    value: per_image,
    text: `${format(per_image)} (${format(count)} in ${countOf(n_images, "image")})`,
  }));
  const nothing = overview.has_patients ? `No patient has a token above ${threshold}.` : "The images have no patients.";
  const about = `Tokens above ${threshold} per image; the patients with the highest counts.`;
  return section(
    "Patients",
    items.length ? about : null,
    items.length ? barChart(items, { label: "Counts per patient", color: "var(--second)" }) : h("p.quiet", {}, nothing),
  );
}

/** @param {LatentRecord} latent */
function latentNeighbours({ neighbours }) {
  const title = "Similar latents";
  if (!neighbours) return section(title, "Cosine similarity of decoder rows.", notKnown());
  const rows = neighbours.map(([other, cosine]) => [
    h("a", { href: `#/latent/${other}` }, latentTitle(other)),
    cosine.toFixed(3),
    percent(state.latents.sparsity[other]),
  ]);
  return section(
    title,
    "Cosine similarity of decoder rows.",
    rows.length
      ? table(["latent", "cosine", "active on"], rows, { numeric: [1, 2], caption: title })
      : h("p.quiet", {}, "None."),
  );
}

/**
 * A top image with its heat map, value, label and patient; its page opens with the map of the same latent.
 *
 * @param {TopImage} item
 * @param {number} latent
 */
function topImage(item, latent) {
  const { overview } = state;
  const at = state.imageAt.get(item.row);
  const label = at === undefined ? item.label : overview.images.labels[at];
  const patient = at === undefined ? item.patient : overview.images.patients[at];
  const alt = `image ${item.row}, ${labelName(label)}`;
  const value = h("span", {}, h("b", {}, format(item.value)), " ", labelLink(label));
  if (!overview.image_pages) return h("div.top-image", {}, value, h("span.quiet", {}, `row ${item.row}`));
  return h(
    "div.top-image",
    { "data-row": item.row },
    h("a", { href: `#/image/${item.row}/${latent}` }, cells.make(item.row, cytosae.decode(item.map), { alt })),
    value,
    patient >= 0 && h("span.quiet", {}, patientLink(patient)),
  );
}

/** @param {ActivationHistogram} histogram */
function activationHistogram({ lowest, per_octave, counts, n_zero }) {
  const total = n_zero + counts.reduce((sum, count) => sum + count, 0);
  const share = percent(total ? 1 - n_zero / total : 0);
  const about = h("p.quiet", {}, `Active on ${share} of ${format(total)} tokens.`);
  const first = counts.findIndex((count) => count > 0);
  if (first < 0) return h("div", {}, about);
  const last = counts.findLastIndex((count) => count > 0);
  const edge = (/** @type {number} */ bin) => format(2 ** (lowest + bin / per_octave));
  const used = counts.slice(first, last + 1);
  const titles = used.map((count, i) => `${edge(first + i)} to ${edge(first + i + 1)}: ${format(count)} tokens`);
  const title = "Tokens by activation, from left to right on a log scale";
  return h("div", {}, histogramChart(used, titles, { title, marks: [edge(first), edge(last + 1)] }), about);
}
