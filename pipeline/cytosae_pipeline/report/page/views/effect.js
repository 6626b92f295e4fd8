// What a latent changes in the labels: a probe of the encoder's embedding, before and after it is scaled.
"use strict";

/** @type {[value: string, text: string][]} */
const FACTORS = [
  ["0", "without it"],
  ["50", "halved"],
  ["200", "doubled"],
];

/**
 * Probabilities of the labels before and after, those that change most first.
 *
 * @param {[label: number, before: number, after: number][]} labels
 * @param {string} caption
 */
function effectTable(labels, caption) {
  const change = (/** @type {[number, number, number]} */ [, before, after]) => after - before;
  const rows = [...labels]
    .sort((a, b) => Math.abs(change(b)) - Math.abs(change(a)))
    .map((item) => [labelLink(item[0]), item[1].toFixed(3), item[2].toFixed(3), signed(change(item))]);
  return table(["label", "before", "after", "change"], rows, { numeric: [1, 2, 3], caption });
}

/** @param {number} value */
const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(3)}`;

/** @param {number} n */
const aboutProbe = (n) =>
  `Probabilities of a linear probe of the encoder's embedding, trained on ${countOf(n, "image")}.`;

/**
 * What the shown latent changes in an image, computed by the server for each factor.
 *
 * @param {number} row
 */
function effectPanel(row) {
  let [latent, percent] = [-1, FACTORS[0][0]];
  const body = h("div", { "aria-live": "polite" }, h("p.quiet", {}, "Nothing is selected yet."));
  const load = () => {
    if (latent < 0) return;
    const wanted = `effects/${latent}/${row}/${percent}`;
    const made = later(cytosae.load(/** @type {`effects/${string}`} */ (wanted)), effectBody, NO_ANSWER);
    body.replaceChildren(made);
  };
  const factors = choice("How the latent is changed", FACTORS, percent, (value) => {
    percent = value;
    load();
  });
  const element = section("What the latent changes", null, factors, body);
  element.classList.add("effect");
  /** @param {number} chosen */
  const show = (chosen) => {
    latent = chosen;
    load();
  };
  return { element, show };
}

/** @param {EffectRecord} effect */
const effectBody = (effect) =>
  h(
    "div",
    {},
    h("p", {}, h("a", { href: `#/latent/${effect.latent}` }, latentTitle(effect.latent))),
    effectTable(effect.labels, "Labels before and after"),
    h("p.quiet", {}, `Cosine similarity of the embeddings: ${effect.cosine.toFixed(4)}. ${aboutProbe(effect.n_train)}`),
  );

/**
 * What a latent changes on average over its top images, on its page; nothing where it is not known.
 *
 * @param {MeanEffect | null | undefined} effect
 */
function meanEffectPanel(effect) {
  if (!effect) return null;
  const images = countOf(effect.n_images, "top image");
  const about = `Mean over its ${images}, without the latent. ${aboutProbe(effect.n_train)}`;
  const cosine = `Mean cosine similarity of the embeddings: ${effect.cosine.toFixed(4)}.`;
  return section(
    "What the latent changes",
    about,
    effectTable(effect.labels, "Labels before and after"),
    h("p.quiet", {}, cosine),
  );
}
