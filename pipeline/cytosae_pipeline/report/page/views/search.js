// Search: latents by name, labels, groups, patients, and images by their paths.
"use strict";

const FOUND_AT_MOST = 50;

/** @param {string} text */
const searchView = (text) => {
  const wanted = text.toLowerCase();
  const { labels, patients, has_patients, notes, book } = state.overview;
  const isFound = (/** @type {string} */ name) => name.toLowerCase().includes(wanted);
  const latents = Object.entries(notes)
    .filter(([number, note]) => number === text || isFound(note.name) || isFound(note.note))
    .map(([number]) => h("a", { href: `#/latent/${number}` }, latentTitle(Number(number))));
  const named = (/** @type {string[]} */ names, /** @type {string} */ kind) =>
    [...names.keys()].filter((i) => isFound(names[i])).map((i) => h("a", { href: `#/${kind}/${i}` }, names[i]));
  const labelNames = labels.map(({ name }) => name);
  const groups =
    has_patients &&
    later(cytosae.load("patients"), (data) => foundPanel("Groups", named(data.group_names, "group"), false));
  const number = wholeNumber(text);
  const direct = number < state.overview.store.images && [
    h("p", {}, h("a.button", { href: `#/image/${number}` }, `Image ${number}`)),
  ];
  return h(
    "div",
    {},
    h("h1", {}, `Search: ${text}`),
    h("p.quiet", {}, `Latents are numbered 0 to ${state.latents.n - 1}; a number opens one.`),
    direct,
    foundPanel("Latents by name or note", latents, false),
    foundPanel("Labels", book ? named(labelNames, "label") : [], false),
    groups,
    foundPanel("Patients", named(patients, "patient"), false),
    book && pathPanel(isFound),
  );
};

/**
 * @param {string} title
 * @param {HTMLElement[]} links
 * @param {boolean} isUnfinished
 */
function foundPanel(title, links, isUnfinished) {
  const shown = links.slice(0, FOUND_AT_MOST).map((link) => h("li", {}, link));
  const more = links.length - shown.length;
  const nothing = isUnfinished ? "Searching…" : "None.";
  return section(
    title,
    null,
    shown.length ? h("ul.found", {}, shown) : h("p.quiet", {}, nothing),
    more > 0 && h("p.quiet", {}, `and ${format(more)} more: enter more of the name.`),
  );
}

/**
 * Images by path, file after file, until enough are found.
 *
 * @param {(path: string) => boolean} isFound
 */
function pathPanel(isFound) {
  const title = "Images by path";
  const host = h("div", { "aria-busy": "true", "aria-live": "polite" }, foundPanel(title, [], true));
  const search = async () => {
    const { images } = state.overview.store;
    /** @type {HTMLElement[]} */
    const links = [];
    for (
      let first = 0;
      first < images && links.length < FOUND_AT_MOST;
      first += state.overview.book?.rows_per_file ?? images
    ) {
      const { paths } = await cytosae.load(`rows/${placeOfRow(first)[0]}`);
      if (!paths) return section(title, "This page is pseudonymous: it contains no paths.");
      for (const [i, path] of paths.entries()) {
        if (isFound(path) && links.length < FOUND_AT_MOST) {
          links.push(h("a", { href: `#/image/${first + i}` }, path));
        }
      }
    }
    const panel = foundPanel(title, links, false);
    if (links.length >= FOUND_AT_MOST) panel.append(h("p.quiet", {}, `The first ${FOUND_AT_MOST}.`));
    return panel;
  };
  search()
    .then(
      (panel) => host.replaceChildren(panel),
      (error) => host.replaceChildren(h("p.notice", {}, error.message)),
    )
    .finally(() => host.removeAttribute("aria-busy"));
  return host;
}
