// The header on every view: navigation, search, theme, and a dialog that explains keys and words.
"use strict";

/** @type {[path: string, text: string, key: string][]} */
const NAVIGATION = [
  ["", "Overview", "o"],
  ["latents", "Latents", "l"],
  ["patients", "Patients", "p"],
];
/** @type {[path: string, text: string, key: string][]} */
const EXPLORE_NAVIGATION = [["upload", "Your image", "u"]];
const mainViews = () => [...NAVIGATION, ...(state.overview.explore ? EXPLORE_NAVIGATION : [])];

function headerParts() {
  const links = mainViews().map(([path, text]) => h("a", { href: `#/${path}`, "data-path": path }, text));
  const theme = { type: "button", id: "theme", title: "Dark or light (t)", "aria-label": "Dark or light" };
  const help = { type: "button", id: "help", title: "Keys and words (?)", "aria-label": "Keys and words" };
  return [
    h("a.brand", { href: "#/" }, h("span", {}, "cytosae"), h("small", {}, state.overview.store.dataset)),
    h("nav", { "aria-label": "Views" }, links),
    searchForm(),
    h("button", { ...theme, onclick: switchTheme }, "◐"),
    h("button", { ...help, onclick: showHelp }, "?"),
  ];
}

function searchForm() {
  const about = { placeholder: "latent or name  /", "aria-label": "Go to a latent by number or name" };
  const search = h("input", { type: "search", id: "search", ...about });
  const go = (/** @type {Event} */ event) => {
    event.preventDefault();
    const text = search.value.trim();
    const latent = findLatent(text);
    search.setCustomValidity(latent === null ? searchHint(text) : "");
    if (latent === null) {
      search.reportValidity();
      return;
    }
    location.hash = `#/latent/${latent}`;
    search.value = "";
  };
  search.addEventListener("input", () => search.setCustomValidity(""));
  return h("form", { role: "search", onsubmit: go }, search);
}

/**
 * The latent of a number or of a part of its name, as its address calls it; null if there is none.
 *
 * @param {string} text
 */
function findLatent(text) {
  if (wholeNumber(text) < state.latents.n) return text;
  const wanted = text.toLowerCase();
  const named = Object.entries(state.overview.notes).filter(([, note]) => note.name.toLowerCase().includes(wanted));
  return text && named.length ? named[0][0] : null;
}

/** @param {string} text */
function searchHint(text) {
  const last = state.latents.n - 1;
  if (!text) return `Enter a number from 0 to ${last}, or part of a name.`;
  return `No latent has the number or name ${text}: numbers go from 0 to ${last}.`;
}

/** @returns {[word: string, meaning: string][]} */
function wordList() {
  const limit = state.overview.limits.significant_q;
  return [
    ["token", "the vision transformer's vector for one patch of the image; the CLS token stands for the whole image"],
    ["latent", "one direction that the autoencoder has learned, active on some tokens"],
    ["score", "a latent's mean activation over an image's tokens"],
    ["sparsity", "share of the images on which a latent is active at all"],
    ["dead", "active on no image"],
    ["L0", "mean number of active latents per token"],
    ["label entropy", "how mixed the labels of a latent's top images are: 0 means a single label"],
    ["cluster", "latents with a similar sparsity and mean activation, found by k-means"],
    [
      "q",
      `p adjusted for many tests: of the latents with q below ${limit}, at most ${percent(limit)} are false on average`,
    ],
  ];
}

/** @param {Event} event */
const closeDialog = (event) => /** @type {HTMLDialogElement} */ (event.target).remove();

function showHelp() {
  const views = mainViews();
  /** @type {[keys: string, meaning: string][]} */
  const keys = [
    [views.map(([, , key]) => key).join(", "), views.map(([, text]) => text.toLowerCase()).join(", ")],
    ["/", "go to a latent"],
    ["← →", "previous or next latent"],
    ["h, m, c", "heat map, mask, plain cell"],
    ["arrows", "on an image or a barcode: move over its patches or cells"],
    ["+ − 0", "on a scatter plot: zoom, show all"],
    ["Enter", "on a scatter plot: choose the point nearest to its centre"],
    ["t", "dark or light"],
  ];
  const dialog = h(
    "dialog",
    { "aria-labelledby": "keys", onclose: closeDialog },
    h("h2", { id: "keys" }, "Keys"),
    h(
      "dl.facts",
      {},
      keys.flatMap(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)]),
    ),
    h("h2", {}, "Words"),
    facts(wordList()),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")),
  );
  document.body.append(dialog);
  dialog.showModal();
}

const THEME_KEY = "cytosae-theme";

/** @param {string} value */
function rememberTheme(value) {
  try {
    localStorage.setItem(THEME_KEY, value);
  } catch {
    // A private window stores nothing.
  }
}

function rememberedTheme() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
}

function switchTheme() {
  const theme = colors.isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  rememberTheme(theme);
  repaint();
}

/** Draw what does not follow the style sheet by itself; what is chosen, zoomed or written stays as it is. */
function repaint() {
  for (const host of htmlElements(".scatter, .mini, .ramp")) host.repaint?.();
}
