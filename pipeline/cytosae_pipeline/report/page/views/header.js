// The header on every view: navigation, search, theme, and a dialog that explains keys and words.
"use strict";

/** @type {[path: string, text: string, key: string][]} */
const NAVIGATION = [
  ["", "Overview", "o"],
  ["latents", "Latents", "l"],
  ["images", "Images", "i"],
  ["map", "Map", "a"],
  ["patients", "Patients", "p"],
];
/** @type {[path: string, text: string, key: string][]} */
const EXPLORE_NAVIGATION = [["upload", "Your images", "u"]];
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
  const about = { placeholder: "search  /", "aria-label": "Go to a latent, label, patient or file" };
  const search = h("input", { type: "search", id: "search", ...about });
  const go = (/** @type {Event} */ event) => {
    event.preventDefault();
    const text = search.value.trim();
    search.setCustomValidity(text ? "" : "Enter a latent's number, or part of a name or path.");
    if (!text) {
      search.reportValidity();
      return;
    }
    location.hash = wholeNumber(text) < state.latents.n ? `#/latent/${text}` : `#/search/${encodeURIComponent(text)}`;
    search.value = "";
  };
  search.addEventListener("input", () => search.setCustomValidity(""));
  return h("form", { role: "search", onsubmit: go }, search);
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
    [
      "lift",
      "how many times more often than by chance the images that activate a latent have a label: the lower end of a " +
        "95 % interval",
    ],
    [
      "depends on position",
      `a latent whose maps on two different images correlate by ${state.overview.limits.position} or more on average`,
    ],
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
    ["/", "search: a latent, label, group, patient or file"],
    ["← →", "previous or next latent"],
    ["h, e, m, c", "heat map, outline (edges), mask, plain cell"],
    ["b", "cell and map side by side"],
    ["arrows", "on an image or a barcode: move over its patches or cells"],
    ["+ − 0", "on a scatter plot: zoom, show all"],
    ["Shift + drag", "on the map of cells: select cells"],
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
