// What the page keeps while it is open, and the columns that all views need of every latent.
"use strict";

const state = {
  overview: /** @type {Overview} */ (/** @type {unknown} */ (null)),
  latents: /** @type {Latents} */ (/** @type {unknown} */ (null)),
  filters: /** @type {Filters} */ (/** @type {unknown} */ (null)),
  /** The scatter plot of all latents while it is shown. */
  scatter: /** @type {Scatter | null} */ (null),
  /** How that scatter plot looked when its view was left. */
  left: /** @type {{view: View, selected: number} | null} */ (null),
  /** Place of each image in the overview's columns, by the image's number. */
  imageAt: /** @type {Map<number, number>} */ (new Map()),
  /** What the left and right arrow keys do. */
  step: /** @type {((by: number) => void) | null} */ (null),
};

/**
 * @param {Overview} overview
 * @returns {Latents}
 */
function prepareLatents(overview) {
  const { decode } = cytosae;
  const [sparsity, mean, entropy] = [
    overview.latents.sparsity,
    overview.latents.mean_acts,
    overview.latents.entropy,
  ].map((column) => decode(column));
  const cluster = decode(overview.latents.cluster);
  const n = sparsity.length;
  const log = (/** @type {Float32Array} */ values) =>
    Float32Array.from(values, (value) => (value > 0 ? Math.log10(value) : NaN));
  const maxEntropy = Math.max(Math.log(Math.max(overview.labels.length, 2)), 1e-9);
  const isFeatured = new Uint8Array(n);
  for (const latent of overview.featured) isFeatured[latent] = 1;
  const steps = 24;
  /** @type {(value: number) => number} */
  const entropyBin = (value) => {
    if (value < 0) return steps;
    return Math.min(steps - 1, Math.max(0, Math.floor((value / maxEntropy) * steps)));
  };
  /** @type {() => PointColors} */
  const byEntropy = () => [
    Uint8Array.from(entropy, entropyBin),
    () => [
      ...Array.from({ length: steps }, (_, i) => colors.css(colors.point(i / (steps - 1)))),
      colors.inTheme("--undefined"),
    ],
  ];
  const nKinds = colors.nKinds();
  /** @type {() => PointColors} */
  const byCluster = () => [
    Uint8Array.from(cluster, (value) => (value < 0 ? nKinds : value % nKinds)),
    () => [...Array.from({ length: nKinds }, (_, i) => colors.kind(i)), colors.inTheme("--undefined")],
  ];
  const best = decode(overview.latents.best);
  /** @type {() => PointColors} */
  const byLabel = () => [Uint8Array.from(best, (value) => (value < 0 ? nKinds : value % nKinds)), byCluster()[1]];
  const [bins, palette] = byEntropy();
  return {
    n,
    sparsity,
    mean,
    entropy,
    cluster,
    position: decode(overview.latents.position),
    lift: decode(overview.latents.lift),
    best,
    source: decode(overview.latents.source),
    sourceShare: decode(overview.latents.source_share),
    oneSource: decode(overview.latents.one_source),
    partner: smallestCosine(overview, n),
    isFeatured,
    maxEntropy,
    x: log(sparsity),
    y: log(mean),
    bins,
    palette,
    colorsBy: (name) => ({ entropy: byEntropy, label: byLabel, cluster: byCluster })[name](),
  };
}

/**
 * Smallest cosine of each latent's nearest latents in other autoencoders.
 *
 * @param {Overview} overview
 * @param {number} n
 */
function smallestCosine(overview, n) {
  const smallest = new Float32Array(n).fill(overview.partners.length ? 1 : NaN);
  for (const { cosine } of overview.partners) {
    cytosae.decode(cosine).forEach((value, i) => {
      smallest[i] = Math.min(smallest[i], value);
    });
  }
  return smallest;
}

function resetFilters() {
  state.filters = {
    sparsity: [null, null],
    mean: [null, null],
    entropy: [null, null],
    cluster: "",
    color: "entropy",
    featured: false,
    oneSource: false,
    partner: [null, null],
  };
}

/** Numbers of the clusters in use, rising. */
const clusterNumbers = () => [...new Set(state.latents.cluster)].filter((value) => value >= 0).sort((a, b) => a - b);

/**
 * @param {number} latent
 */
const latentName = (latent) => state.overview.notes[latent]?.name ?? "";

/** @param {number} latent */
function latentTitle(latent) {
  const name = latentName(latent);
  return name ? `Latent ${latent}: ${name}` : `Latent ${latent}`;
}

/** @param {number} index */
const labelName = (index) => (index >= 0 ? state.overview.labels[index].name : "no label");

/** @param {number} index */
const patientName = (index) => (index >= 0 ? state.overview.patients[index] : "no patient");

/**
 * Whether a latent's maps are nearly the same on all images.
 *
 * @param {number} latent
 */
const dependsOnPosition = (latent) => state.latents.position[latent] >= state.overview.limits.position;

/**
 * A label's name as a link to its page.
 *
 * @param {number} index
 */
const labelLink = (index) =>
  index >= 0 && state.overview.book ? h("a", { href: `#/label/${index}` }, labelName(index)) : labelName(index);

/**
 * A patient's name as a link to its page.
 *
 * @param {number} index
 */
const patientLink = (index) => (index >= 0 ? h("a", { href: `#/patient/${index}` }, patientName(index)) : "no patient");

/** Whether images have patches, over which a latent's map can be drawn. */
const hasMaps = () => state.overview.store.grid[0] * state.overview.store.grid[1] > 0;

/** What featured latents have that others lack: in a report a page, in the explorer a card. */
const featuredWord = () => (state.overview.explore ? "card" : "page");
