// The page as a whole: reads the overview, shows the view that the address names, themes and keys.
"use strict";

const state = { overview: null, latents: null, filters: null, scatter: null, imageAt: new Map(), step: null, left: null };

/** What all views need of every latent. */
function prepareLatents(overview) {
  const [sparsity, mean, entropy] = ["sparsity", "mean_acts", "entropy"].map((name) => cytosae.decode(overview.latents[name]));
  const cluster = cytosae.decode(overview.latents.cluster);
  const n = sparsity.length;
  const log = (values) => Float32Array.from(values, (value) => (value > 0 ? Math.log10(value) : NaN));
  const maxEntropy = Math.max(Math.log(Math.max(overview.labels.length, 2)), 1e-9);
  const isHeld = new Uint8Array(n);
  for (const latent of overview.held) isHeld[latent] = 1;
  const steps = 24;
  const byEntropy = () => [
    Uint8Array.from(entropy, (value) => (value < 0 ? steps : Math.min(steps - 1, Math.max(0, Math.floor((value / maxEntropy) * steps))))),
    () => [...Array.from({ length: steps }, (_, i) => colors.css(colors.point(i / (steps - 1)))), colors.inTheme("--undefined")]];
  const byCluster = () => [Uint8Array.from(cluster, (value) => (value < 0 ? colors.nKinds : value % colors.nKinds)),
    () => [...Array.from({ length: colors.nKinds }, (_, i) => colors.kind(i)), colors.inTheme("--undefined")]];
  const [bins, palette] = byEntropy();
  return { n, sparsity, mean, entropy, cluster, isHeld, maxEntropy, x: log(sparsity), y: log(mean), bins, palette,
    colorsBy: (name) => (name === "cluster" ? byCluster() : byEntropy()) };
}

const NAV = [["", "Overview", "o"], ["latents", "Latents", "l"], ["patients", "Patients", "p"]];
const LIVE_NAV = [["upload", "Your image", "u"]];
const views = () => [...NAV, ...(state.overview.live ? LIVE_NAV : [])];

function header() {
  const { overview } = state;
  const search = h("input", { type: "search", id: "search", placeholder: "latent or name  /", "aria-label": "Go to a latent by number or name" });
  const go = (event) => {
    event.preventDefault();
    const text = search.value.trim();
    if (/^\d+$/.test(text) && Number(text) < state.latents.n) { location.hash = `#/latent/${text}`; search.value = ""; return; }
    const found = Object.entries(overview.notes).find(([, note]) => text && (note.name || "").toLowerCase().includes(text.toLowerCase()));
    search.setCustomValidity(found ? "" : `${text ? `No latent ${text}: numbers` : "Numbers"} go from 0 to ${state.latents.n - 1}${text ? ", and no name holds that." : "; a part of a name does, too."}`);
    if (found) { location.hash = `#/latent/${found[0]}`; search.value = ""; } else search.reportValidity();
  };
  search.addEventListener("input", () => search.setCustomValidity(""));
  return [
    h("a.brand", { href: "#/" }, h("span", {}, "cytosae"), h("small", {}, overview.store.dataset)),
    h("nav", { "aria-label": "Views" }, views().map(([path, text]) =>
      h("a", { href: `#/${path}`, "data-path": path }, text))),
    h("form", { role: "search", onsubmit: go }, search),
    h("button", { type: "button", id: "theme", title: "Dark or light (t)", "aria-label": "Dark or light", onclick: switchTheme }, "◐"),
    h("button", { type: "button", id: "help", title: "Keys and words (?)", "aria-label": "Keys and words", onclick: showKeys }, "?"),
  ];
}

const WORDS = [
  ["token", "what the vision transformer holds of one patch of the image; the CLS token stands for the whole image"],
  ["latent", "one direction that the autoencoder has learned, active on some tokens"],
  ["score", "a latent's mean activation over an image's tokens"],
  ["sparsity", "share of the images on which a latent is active at all"],
  ["dead", "active on no image"],
  ["L0", "latents that are active on a token, on average"],
  ["label entropy", "how mixed the labels of a latent's top images are: 0 is one label only"],
  ["cluster", "latents that are about as often and as strongly active, by k-means"],
  ["q", "p after correction for testing many latents: below 0.05, at most 5 % of such finds are false on average"],
];

function showKeys() {
  const keys = [[views().map(([, , key]) => key).join(", "), views().map(([, text]) => text.toLowerCase()).join(", ")], ["/", "go to a latent"], ["← →", "previous or next latent"], ["h, m, c", "heat map, mask, plain cell"],
    ["arrows", "on an image or a barcode: move over its patches or cells"], ["+ − 0", "on a scatter: zoom, show all"], ["Enter", "on a scatter: choose the point nearest to its middle"], ["t", "dark or light"]];
  const dialog = h("dialog", { "aria-labelledby": "keys", onclose: () => dialog.remove() }, h("h2", { id: "keys" }, "Keys"), h("dl.facts", {}, keys.flatMap(([key, text]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, text)])),
    h("h2", {}, "Words"), h("dl.facts", {}, WORDS.flatMap(([word, text]) => [h("dt", {}, word), h("dd", {}, text)])),
    h("form", { method: "dialog" }, h("button", { autofocus: true }, "Close")));
  document.body.append(dialog);
  dialog.showModal();
}

const remember = (value) => { try { localStorage.setItem("cytosae-theme", value); } catch { /* a private window keeps nothing */ } };
const remembered = () => { try { return localStorage.getItem("cytosae-theme"); } catch { return null; } };

function switchTheme() {
  const root = document.documentElement;
  root.dataset.theme = colors.isDark() ? "light" : "dark";
  remember(root.dataset.theme);
  repaint();
}

/** Canvases do not follow the style sheet by themselves; what is chosen, zoomed or written stays as it is. */
function repaint() {
  for (const host of document.querySelectorAll(".scatter, .mini, .ramp")) host.repaint();
}

/** The number that a part of an address is, or NaN. */
const wholeNumber = (text) => (/^\d+$/.test(text) ? Number(text) : NaN);

function route() {
  const [name = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/");
  state.step = null;
  const number = wholeNumber(rest[0]);
  const makers = new Map(Object.entries({
    "": overviewView, latents: latentsView, latent: () => latentView(number, rest[0] || "without a number"), image: () => imageView(number, rest[0] || "without a number"),
    patients: () => patientsView(...rest), upload: uploadView }));
  const view = document.getElementById("view");
  if (state.scatter) {
    state.scatter.resizer.disconnect();
    state.left = { view: state.scatter.view, selected: state.scatter.selected };
    state.scatter = null;
  }
  view.replaceChildren((makers.get(name) || (() => h("div", {}, h("h1", {}, "Nothing here"),
    h("p.notice", {}, `There is no view “${name}”. Choose one above.`))))());
  for (const link of document.querySelectorAll("header nav a")) {
    if (link.dataset.path === (["latent", "image"].includes(name) ? "latents" : name)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  retitle();
  window.scrollTo(0, 0);
}

/** The window's title; again when a heading arrives late or changes. */
function retitle() {
  const heading = document.querySelector("#view h1");
  document.title = `${heading ? heading.textContent : "cytosae"} · ${state.overview.title}`;
}

/** Another address: the keyboard's focus goes to the view, or to what it was on in the view before, if that is there again. */
function onAddress() {
  const view = document.getElementById("view");
  const id = view.contains(document.activeElement) ? document.activeElement.id : "";
  route();
  setTimeout(() => ((id && document.getElementById(id)) || view).focus({ preventScroll: true }));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select, dialog")) return;
  const view = views().find(([, , key]) => key === event.key);
  if (view) location.hash = `#/${view[0]}`;
  else if (event.key === "/") { event.preventDefault(); document.getElementById("search").focus(); }
  else if (event.key === "t") switchTheme();
  else if (event.key === "?") showKeys();
  else if (event.key in cells.keys) cells.set(cells.keys[event.key]);
  else if (event.target.closest(".scroll")) return; // there, arrows scroll
  else if (event.key === "ArrowLeft" && state.step) state.step(-1);
  else if (event.key === "ArrowRight" && state.step) state.step(1);
}

async function start() {
  if (["dark", "light"].includes(remembered())) document.documentElement.dataset.theme = remembered();
  try {
    state.overview = await cytosae.load("overview");
  } catch {
    document.getElementById("view").replaceChildren(h("p.notice", {}, "data/overview.js is missing: was the whole folder copied?"));
    return;
  }
  state.overview.images.rows.forEach((row, at) => state.imageAt.set(row, at));
  state.latents = prepareLatents(state.overview);
  resetFilters();
  document.getElementById("top").replaceChildren(...header());
  addEventListener("hashchange", onAddress);
  document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); document.getElementById("view").focus(); });
  addEventListener("keydown", onKey);
  colors.systemIsDark.addEventListener("change", repaint);
  route();
}

start();
