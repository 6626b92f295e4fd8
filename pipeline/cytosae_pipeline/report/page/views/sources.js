// Where a latent's activity comes from, and whether other autoencoders have the same latent.
"use strict";

/**
 * That most of a latent's active tokens are one person's.
 *
 * @param {number} latent
 */
function oneSourceText(latent) {
  const { sources } = state.overview;
  const at = state.latents.source[latent];
  return sources && at >= 0
    ? `of one ${sources.unit}: ${sources.names[at]} (${percent(state.latents.sourceShare[latent])})`
    : "";
}

/** @param {number} latent */
function sourceNotice(latent) {
  const { sources } = state.overview;
  if (!sources || !state.latents.oneSource[latent]) return null;
  const name = sources.names[state.latents.source[latent]];
  const text =
    `This latent is of one ${sources.unit}: ${percent(state.latents.sourceShare[latent])} of its active tokens are ` +
    `of ${name}, who has far fewer of the images. It may show a ${sources.unit} or a stain, not a kind of cell.`;
  return h("p.notice", {}, text);
}

/** @param {LatentRecord} latent */
function latentSources({ sources, threshold }) {
  if (!sources) return null;
  const patients = sources.unit === "patient";
  const items = sources.largest.map(({ source, share, of_images }) => ({
    name: state.overview.sources?.names[source] ?? "",
    href: patients ? `#/patient/${source}` : undefined,
    value: share,
    text: `${percent(share)} (has ${percent(of_images)} of the images)`,
  }));
  const about = `Share of the latent's ${format(sources.total)} tokens above ${format(threshold)} by ${sources.unit}.`;
  return shareSection(`Share by ${sources.unit}`, about, items);
}

/** @param {LatentRecord} latent */
function latentSites({ sites }) {
  if (!sites) return null;
  const items = sites.largest.map(({ name, share, of_images }) => ({
    name,
    value: share,
    text: `${percent(share)} (has ${percent(of_images)} of the images)`,
  }));
  const one = sites.is_one ? ` This latent is of one ${sites.column}.` : "";
  const tokens = `${format(sites.total)} tokens above ${format(sites.threshold)}`;
  return shareSection(`Share by ${sites.column}`, `Share of the latent's ${tokens} by ${sites.column}.${one}`, items);
}

/**
 * @param {string} title
 * @param {string} about
 * @param {{name: string, href?: string, value: number, text: string}[]} items
 */
function shareSection(title, about, items) {
  const nothing = h("p.quiet", {}, "No token is above it.");
  return section(title, about, items.length ? barChart(items, { label: title, color: "var(--second)" }) : nothing);
}

/** @param {LatentRecord} latent */
function latentPartners({ partners }) {
  if (!partners.length) return null;
  const title = "In other autoencoders";
  const rows = partners.map(({ name, partner, cosine }) => [
    name,
    partner < 0 ? "none" : `Latent ${partner}`,
    cosine.toFixed(3),
  ]);
  const about = "The latent with the most similar decoder row; a cosine near 1 means that the latent was found again.";
  return section(title, about, table(["autoencoder", "nearest", "cosine"], rows, { numeric: [2], caption: title }));
}
